"""Autograd graph of a forward pass, from which scale symmetries are read."""
