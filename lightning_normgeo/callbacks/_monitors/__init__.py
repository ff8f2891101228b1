"""Shared machinery of the geometry monitors: cadence, session, units and messages."""
