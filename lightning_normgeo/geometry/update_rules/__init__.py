"""Update rules of optimizers: the formula of one step and the terms it adds to ‖W‖², as pure functions."""
