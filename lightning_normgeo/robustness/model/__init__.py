"""The evaluated model: folded, rescaled, checked, and restored afterwards."""
