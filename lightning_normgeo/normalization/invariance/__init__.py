"""Scale-invariant slices of weights, found from the autograd graph."""

from lightning_normgeo.normalization.invariance.discovery import REENTRANT as REENTRANT
from lightning_normgeo.normalization.invariance.discovery import find_units as find_units
from lightning_normgeo.normalization.invariance.discovery import scale_invariant_units as scale_invariant_units
from lightning_normgeo.normalization.invariance.discovery import units_from_graph as units_from_graph
from lightning_normgeo.normalization.invariance.guess import guess_units as guess_units
from lightning_normgeo.normalization.invariance.node_context import UNKNOWN_CONSTANT as UNKNOWN_CONSTANT
