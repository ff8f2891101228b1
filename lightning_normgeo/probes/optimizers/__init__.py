"""What is known of optimizers: torch's own, and those of other libraries, which are never imported for it."""
