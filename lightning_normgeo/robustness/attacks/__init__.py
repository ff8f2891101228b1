"""Attacks: projected gradient ascent, Gaussian noise, and those of torchattacks."""
