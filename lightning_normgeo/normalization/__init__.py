"""Normalizations and the scale symmetries they cause. Needs torch alone."""

from lightning_normgeo.normalization.registry import NORMS as NORMS
from lightning_normgeo.normalization.registry import Normalization as Normalization
from lightning_normgeo.normalization.registry import find_norm as find_norm
from lightning_normgeo.normalization.units import WeightUnits as WeightUnits
from lightning_normgeo.normalization.units import find_units as find_units
from lightning_normgeo.normalization.units import units_from_graph as units_from_graph
from lightning_normgeo.normalization.units import units_from_modules as units_from_modules
