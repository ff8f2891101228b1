"""Charges of scale symmetries: what they conserve, how steps change it, and the part of ε."""
