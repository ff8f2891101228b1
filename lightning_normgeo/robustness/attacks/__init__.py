"""Attacks: projected gradient ascent (BIM, PGD), Gaussian noise, and those of torchattacks."""
