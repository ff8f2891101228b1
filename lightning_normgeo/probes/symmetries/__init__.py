"""Scale symmetries of a running training."""
