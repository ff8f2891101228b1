"""Scale-invariant units: slices of single weights whose scale leaves the loss unchanged."""
