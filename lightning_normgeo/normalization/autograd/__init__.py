"""The autograd graph of a forward pass, as the trace from which scale symmetries are read."""
