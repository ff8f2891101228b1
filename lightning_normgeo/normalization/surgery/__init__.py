"""Replacement of normalization layers in existing models: finding, planning, replacing and checking them."""
