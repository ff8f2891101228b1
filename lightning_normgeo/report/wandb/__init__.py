"""Reports of W&B, and records downloaded from it."""
