"""Shared machinery of RobustnessEvaluation: data loaders, Trainer hooks, logging and progress."""
