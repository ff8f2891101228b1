"""Logged values of the geometry monitors: from tensors per unit to numbers in loggers."""
