"""Statistics of batches: pre-activations, outputs of batch normalizations, and channels."""
