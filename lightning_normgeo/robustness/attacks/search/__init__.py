"""Search for adversarial points: balls, losses, rules of movement, and the samples that still need them."""
