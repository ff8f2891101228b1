"""Scale symmetries of whole networks, and the scale-invariant units of single weights, found from autograd graphs."""

from lightning_normgeo.symmetries.charges.conserved_quantities import quantity_terms as quantity_terms
from lightning_normgeo.symmetries.charges.epsilon_charges import epsilon_charges as epsilon_charges
from lightning_normgeo.symmetries.families import Family as Family
from lightning_normgeo.symmetries.families import Member as Member
from lightning_normgeo.symmetries.roles import correct_weight_decay as correct_weight_decay
from lightning_normgeo.symmetries.roles import parameter_groups as parameter_groups
from lightning_normgeo.symmetries.search import scale_symmetries as scale_symmetries
from lightning_normgeo.symmetries.slices import Slices as Slices
from lightning_normgeo.symmetries.spheres.spheres import Spheres as Spheres
from lightning_normgeo.symmetries.symmetries import Symmetries as Symmetries
from lightning_normgeo.symmetries.transformations.balancing import BalancedFamily as BalancedFamily
from lightning_normgeo.symmetries.transformations.balancing import BalanceReport as BalanceReport
from lightning_normgeo.symmetries.transformations.balancing import balance as balance
from lightning_normgeo.symmetries.transformations.transformation import transform as transform
from lightning_normgeo.symmetries.units.discovery import scale_invariant_units as scale_invariant_units
from lightning_normgeo.symmetries.units.discovery import units_from_graph as units_from_graph
from lightning_normgeo.symmetries.units.guess import guess_units as guess_units
from lightning_normgeo.symmetries.units.weight_units import Units as Units
from lightning_normgeo.symmetries.units.weight_units import WeightUnits as WeightUnits
