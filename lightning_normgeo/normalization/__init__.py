"""Normalization layers, weight normalizations, and the scale symmetries they cause. Needs only torch."""

from lightning_normgeo.utilities.versions import require

require("torch")

from lightning_normgeo.normalization.invariance import find_units as find_units
from lightning_normgeo.normalization.invariance import guess_units as guess_units
from lightning_normgeo.normalization.invariance import scale_invariant_units as scale_invariant_units
from lightning_normgeo.normalization.invariance import units_from_graph as units_from_graph
from lightning_normgeo.normalization.parametrizations import normalize_weight as normalize_weight
from lightning_normgeo.normalization.registry import NORMS as NORMS
from lightning_normgeo.normalization.registry import Normalization as Normalization
from lightning_normgeo.normalization.registry import find_norm as find_norm
from lightning_normgeo.normalization.surgery.swap import swap_norm as swap_norm
from lightning_normgeo.normalization.surgery.swap_report import SwapReport as SwapReport
from lightning_normgeo.normalization.units import Units as Units
from lightning_normgeo.normalization.units import WeightUnits as WeightUnits
