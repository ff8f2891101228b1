"""Changes of gradients and weights between a backward pass and the step of the optimizer."""
