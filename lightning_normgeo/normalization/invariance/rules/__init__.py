"""Rules of the search for scale-invariant units, by the kind of autograd node."""
