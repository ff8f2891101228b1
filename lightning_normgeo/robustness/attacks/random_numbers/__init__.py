"""Random numbers of attacks: the same for a sample in any batch, on any device."""
