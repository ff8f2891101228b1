"""Geometry of steps on the sphere: angles, weight decay, and the equilibrium of both."""
