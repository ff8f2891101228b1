"""Verdicts of several runs together: those of single runs summed up, and paired tests of weight decay."""
