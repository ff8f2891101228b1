"""Publishing of reports at W&B, and download of runs from it."""
