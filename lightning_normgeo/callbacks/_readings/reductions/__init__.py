"""Reductions of per-unit tensors to values by layer, over units and over processes."""
