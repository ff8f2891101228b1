"""Spheres of scale-invariant blocks, and steps that stay on them."""
