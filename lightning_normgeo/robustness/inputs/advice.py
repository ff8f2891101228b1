"""Advice in error messages on models and batches that are not understood, with and without a Trainer."""

LOGITS = "Override RobustnessEvaluation.logits, or give evaluate_robustness(logits=…),"
UNPACK = "Override RobustnessEvaluation.unpack, or give evaluate_robustness(unpack=…),"
