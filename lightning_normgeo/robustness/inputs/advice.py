"""What to do about models and batches of other forms, with and without a Trainer."""

LOGITS = "Override RobustnessEvaluation.logits, or give evaluate_robustness(logits=…),"
UNPACK = "Override RobustnessEvaluation.unpack, or give evaluate_robustness(unpack=…),"
