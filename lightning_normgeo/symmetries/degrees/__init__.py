"""Degrees of homogeneity of tensors, and where a loss is read."""
