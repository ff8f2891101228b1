"""Effective weights: the linear maps that a network with normalizations computes with in evaluation mode."""
