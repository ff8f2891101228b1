"""Shared parts of the geometry monitors: cadence, session, tracking of units, and console lines."""
