"""The record of a run: writing it line by line, and reading it, also after a crash."""
