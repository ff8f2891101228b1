"""Scale symmetries of whole networks: found from the autograd graph, as families of exponents."""

from lightning_normgeo.symmetries.search import scale_symmetries as scale_symmetries
from lightning_normgeo.symmetries.symmetries import Symmetries as Symmetries
