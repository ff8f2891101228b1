"""Inputs of linear and convolution layers, read during a forward pass, and their covariance Σ_X."""
