"""Per-sample results of an evaluation, and the statistics computed from them."""
