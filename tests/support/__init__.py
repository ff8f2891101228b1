"""Helpers of the tests: models, projects, float64 reference code, fake services, scripts of several processes."""
