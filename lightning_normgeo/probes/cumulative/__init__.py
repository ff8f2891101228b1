"""Cumulative norm increments: sums over all steps of a training."""
