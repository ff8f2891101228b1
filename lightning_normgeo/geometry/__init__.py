"""The paper's mathematics: pure functions from tensors to tensors, one value per unit. Needs torch alone."""

from lightning_normgeo.versions import require

require("torch")

from lightning_normgeo.geometry.adaptive import AdagradRule as AdagradRule
from lightning_normgeo.geometry.adaptive import AdamaxRule as AdamaxRule
from lightning_normgeo.geometry.adaptive import AdamRule as AdamRule
from lightning_normgeo.geometry.adaptive import LionRule as LionRule
from lightning_normgeo.geometry.adaptive import NAdamRule as NAdamRule
from lightning_normgeo.geometry.adaptive import RAdamRule as RAdamRule
from lightning_normgeo.geometry.adaptive import RMSpropRule as RMSpropRule
from lightning_normgeo.geometry.angles import UpdateParts as UpdateParts
from lightning_normgeo.geometry.angles import UpdateProducts as UpdateProducts
from lightning_normgeo.geometry.angles import angular_update as angular_update
from lightning_normgeo.geometry.angles import effective_lr as effective_lr
from lightning_normgeo.geometry.angles import joined_products as joined_products
from lightning_normgeo.geometry.angles import split_update as split_update
from lightning_normgeo.geometry.angles import update_products as update_products
from lightning_normgeo.geometry.batch import covariance as covariance
from lightning_normgeo.geometry.batch import covariance_rank as covariance_rank
from lightning_normgeo.geometry.batch import kernel_fraction as kernel_fraction
from lightning_normgeo.geometry.batch import pair_gradient as pair_gradient
from lightning_normgeo.geometry.batch import pair_standardize as pair_standardize
from lightning_normgeo.geometry.batch import patch_columns as patch_columns
from lightning_normgeo.geometry.batch import preactivation_variance as preactivation_variance
from lightning_normgeo.geometry.batch import scale_gap as scale_gap
from lightning_normgeo.geometry.batch import shift_gap as shift_gap
from lightning_normgeo.geometry.batch import squared_gain as squared_gain
from lightning_normgeo.geometry.constraints import centered_weight_normalization as centered_weight_normalization
from lightning_normgeo.geometry.constraints import spectral_normalization as spectral_normalization
from lightning_normgeo.geometry.constraints import subtract_mean_row as subtract_mean_row
from lightning_normgeo.geometry.constraints import weight_normalization as weight_normalization
from lightning_normgeo.geometry.constraints import weight_standardization as weight_standardization
from lightning_normgeo.geometry.decay import ExponentialSchedule as ExponentialSchedule
from lightning_normgeo.geometry.decay import balanced_norm as balanced_norm
from lightning_normgeo.geometry.elementwise import ElementwiseRule as ElementwiseRule
from lightning_normgeo.geometry.elementwise import StepParts as StepParts
from lightning_normgeo.geometry.equilibrium import equilibrium_angle as equilibrium_angle
from lightning_normgeo.geometry.equilibrium import steps_to_equilibrium as steps_to_equilibrium
from lightning_normgeo.geometry.increments import IncrementTerms as IncrementTerms
from lightning_normgeo.geometry.increments import SGDRule as SGDRule
from lightning_normgeo.geometry.increments import UpdateRule as UpdateRule
from lightning_normgeo.geometry.increments import arithmetic_floor as arithmetic_floor
from lightning_normgeo.geometry.increments import decay_floor as decay_floor
from lightning_normgeo.geometry.increments import identity_terms as identity_terms
from lightning_normgeo.geometry.increments import lattice_floor as lattice_floor
from lightning_normgeo.geometry.increments import measured_increment as measured_increment
from lightning_normgeo.geometry.increments import norm_increment as norm_increment
from lightning_normgeo.geometry.increments import predicted_increment as predicted_increment
from lightning_normgeo.geometry.increments import storage_floor as storage_floor
from lightning_normgeo.geometry.increments import systematic_floor as systematic_floor
from lightning_normgeo.geometry.layerwise import AdafactorRule as AdafactorRule
from lightning_normgeo.geometry.layerwise import LambRule as LambRule
from lightning_normgeo.geometry.layerwise import LarsRule as LarsRule
from lightning_normgeo.geometry.layerwise import MarsRule as MarsRule
from lightning_normgeo.geometry.orthogonality import batch_instances as batch_instances
from lightning_normgeo.geometry.orthogonality import batch_norm_epsilon_inner as batch_norm_epsilon_inner
from lightning_normgeo.geometry.orthogonality import cosine as cosine
from lightning_normgeo.geometry.orthogonality import epsilon_inner as epsilon_inner
from lightning_normgeo.geometry.orthogonality import group_instances as group_instances
from lightning_normgeo.geometry.orthogonality import preactivation_epsilon_inner as preactivation_epsilon_inner
from lightning_normgeo.geometry.orthogonality import weight_gradient_cosine as weight_gradient_cosine
from lightning_normgeo.geometry.orthogonality import weight_gradient_products as weight_gradient_products
from lightning_normgeo.geometry.orthogonality import (
    weight_standardization_epsilon_inner as weight_standardization_epsilon_inner,
)
from lightning_normgeo.geometry.orthogonalized import AdamPRule as AdamPRule
from lightning_normgeo.geometry.orthogonalized import MuonRule as MuonRule
from lightning_normgeo.geometry.orthogonalized import SGDPRule as SGDPRule
from lightning_normgeo.geometry.rows import as_rows as as_rows
from lightning_normgeo.geometry.sphere import affine_decomposition as affine_decomposition
from lightning_normgeo.geometry.sphere import affine_norm as affine_norm
from lightning_normgeo.geometry.sphere import center as center
from lightning_normgeo.geometry.sphere import effective_bias as effective_bias
from lightning_normgeo.geometry.sphere import effective_weight as effective_weight
from lightning_normgeo.geometry.sphere import sphere_radius as sphere_radius
from lightning_normgeo.geometry.sphere import standardize as standardize
from lightning_normgeo.geometry.sphere import standardize_gradient as standardize_gradient
from lightning_normgeo.geometry.variants import AdadeltaRule as AdadeltaRule
from lightning_normgeo.geometry.variants import AdEMAMixRule as AdEMAMixRule
from lightning_normgeo.geometry.variants import AdoptRule as AdoptRule
from lightning_normgeo.geometry.variants import ASGDRule as ASGDRule
from lightning_normgeo.geometry.variants import LaPropRule as LaPropRule
from lightning_normgeo.geometry.variants import NAdamWRule as NAdamWRule
from lightning_normgeo.geometry.variants import RpropRule as RpropRule
from lightning_normgeo.geometry.variants import SGDWRule as SGDWRule
from lightning_normgeo.geometry.whole import CautiousRule as CautiousRule
from lightning_normgeo.geometry.whole import Direction as Direction
from lightning_normgeo.geometry.whole import WholeTensorRule as WholeTensorRule
from lightning_normgeo.geometry.whole import cautious as cautious
from lightning_normgeo.geometry.whole import whole_products as whole_products
