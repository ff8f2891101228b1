"""Update rules of optimizers: the terms of one step for any weight, as pure functions."""
