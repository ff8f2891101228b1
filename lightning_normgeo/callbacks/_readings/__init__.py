"""Logged values of the geometry monitors, reduced from per-unit tensors to numbers for loggers."""
