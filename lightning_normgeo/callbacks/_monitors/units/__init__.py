"""Scale-invariant units of the observed weights: found in graphs, combined over a step, confirmed by its numbers."""
