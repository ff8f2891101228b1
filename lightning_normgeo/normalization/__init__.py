"""Normalization layers and weight normalizations. Needs only torch."""

from lightning_normgeo.utilities.versions import require

require("torch")

from lightning_normgeo.normalization.parametrizations import normalize_weight as normalize_weight
from lightning_normgeo.normalization.registry import NORMS as NORMS
from lightning_normgeo.normalization.registry import Normalization as Normalization
from lightning_normgeo.normalization.registry import find_norm as find_norm
from lightning_normgeo.normalization.surgery.swap import swap_norm as swap_norm
from lightning_normgeo.normalization.surgery.swap_report import SwapReport as SwapReport
