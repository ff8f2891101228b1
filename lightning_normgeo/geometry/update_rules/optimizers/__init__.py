"""One file per optimizer family: its update rule, its description, and the names of its classes."""
