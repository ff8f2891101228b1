"""Helpers of the tests: models, projects, float64 twins, stand-ins for services, scripts of several processes."""
