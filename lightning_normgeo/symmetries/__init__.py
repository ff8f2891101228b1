"""Scale symmetries of whole networks: found from the autograd graph, as families of exponents."""

from lightning_normgeo.symmetries.balancing import BalancedFamily as BalancedFamily
from lightning_normgeo.symmetries.balancing import BalanceReport as BalanceReport
from lightning_normgeo.symmetries.balancing import balance as balance
from lightning_normgeo.symmetries.conserved_quantities import quantity_terms as quantity_terms
from lightning_normgeo.symmetries.families import Family as Family
from lightning_normgeo.symmetries.families import Member as Member
from lightning_normgeo.symmetries.roles import correct_weight_decay as correct_weight_decay
from lightning_normgeo.symmetries.roles import parameter_groups as parameter_groups
from lightning_normgeo.symmetries.search import scale_symmetries as scale_symmetries
from lightning_normgeo.symmetries.slices import Slices as Slices
from lightning_normgeo.symmetries.symmetries import Symmetries as Symmetries
from lightning_normgeo.symmetries.transformation import transform as transform
