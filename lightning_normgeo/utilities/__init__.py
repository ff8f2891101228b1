"""Helpers for files, texts, checked settings and versions that are independent of normalization."""
