"""Equation 16 and its exact generalization: what optimizer steps add to ‖W‖², by terms and over many steps."""
