"""Probe of batch normalizations: batch statistics and gradients of each forward pass."""
