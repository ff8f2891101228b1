"""The parts of swap_norm: finding, planning, replacing and checking normalization layers."""
