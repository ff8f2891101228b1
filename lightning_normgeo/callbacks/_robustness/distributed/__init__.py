"""Evaluations in several processes: samples that are divided, and sharded models that are gathered."""
