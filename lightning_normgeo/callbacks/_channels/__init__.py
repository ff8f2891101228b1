"""Parts of ChannelEvaluation: Trainer hooks, and output to loggers."""
