"""Increments of ‖W‖² from optimizer steps: eq 16 of Sun et al. 2020, its generalization, and rounding errors."""
