"""Rules of the search for scale-invariant units: how each kind of autograd node passes on the scale of the rows."""
