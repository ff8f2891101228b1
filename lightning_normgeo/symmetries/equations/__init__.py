"""Linear equations between the exponents of slices, and their solutions."""
