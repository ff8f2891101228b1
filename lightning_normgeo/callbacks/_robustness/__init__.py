"""Parts of RobustnessEvaluation: Trainer hooks, data loaders, evaluation of a loop, logging and progress bars."""
