"""Findings of a run, and what their words need: equation 16, names of attacks, and the title of the run."""
