"""Covariance Σ_X of the input vectors of a layer: spectrum, rank and kernel, exactly or from random probes."""
