"""The mathematics of Sun et al. 2020 as pure functions of tensors, with one value per unit. Needs torch only."""

from lightning_normgeo.utilities.versions import require

require("torch")

from lightning_normgeo.geometry.angles import UpdateParts as UpdateParts
from lightning_normgeo.geometry.angles import UpdateProducts as UpdateProducts
from lightning_normgeo.geometry.angles import angular_update as angular_update
from lightning_normgeo.geometry.angles import effective_lr as effective_lr
from lightning_normgeo.geometry.angles import joined_products as joined_products
from lightning_normgeo.geometry.angles import split_update as split_update
from lightning_normgeo.geometry.angles import update_products as update_products
from lightning_normgeo.geometry.batch_statistics import covariance as covariance
from lightning_normgeo.geometry.batch_statistics import covariance_rank as covariance_rank
from lightning_normgeo.geometry.batch_statistics import kernel_fraction as kernel_fraction
from lightning_normgeo.geometry.batch_statistics import pair_gradient as pair_gradient
from lightning_normgeo.geometry.batch_statistics import pair_standardize as pair_standardize
from lightning_normgeo.geometry.batch_statistics import patch_columns as patch_columns
from lightning_normgeo.geometry.batch_statistics import preactivation_variance as preactivation_variance
from lightning_normgeo.geometry.batch_statistics import scale_gap as scale_gap
from lightning_normgeo.geometry.batch_statistics import shift_gap as shift_gap
from lightning_normgeo.geometry.batch_statistics import squared_gain as squared_gain
from lightning_normgeo.geometry.equilibrium import equilibrium_angle as equilibrium_angle
from lightning_normgeo.geometry.equilibrium import steps_to_equilibrium as steps_to_equilibrium
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms as IncrementTerms
from lightning_normgeo.geometry.increments.increment_terms import UpdateRule as UpdateRule
from lightning_normgeo.geometry.increments.norm_increments import identity_terms as identity_terms
from lightning_normgeo.geometry.increments.norm_increments import measured_increment as measured_increment
from lightning_normgeo.geometry.increments.norm_increments import norm_increment as norm_increment
from lightning_normgeo.geometry.increments.norm_increments import predicted_increment as predicted_increment
from lightning_normgeo.geometry.increments.rounding_floors import arithmetic_floor as arithmetic_floor
from lightning_normgeo.geometry.increments.rounding_floors import decay_floor as decay_floor
from lightning_normgeo.geometry.increments.rounding_floors import lattice_floor as lattice_floor
from lightning_normgeo.geometry.increments.rounding_floors import storage_floor as storage_floor
from lightning_normgeo.geometry.increments.rounding_floors import systematic_floor as systematic_floor
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
from lightning_normgeo.geometry.rows import as_rows as as_rows
from lightning_normgeo.geometry.sphere import affine_decomposition as affine_decomposition
from lightning_normgeo.geometry.sphere import affine_norm as affine_norm
from lightning_normgeo.geometry.sphere import center as center
from lightning_normgeo.geometry.sphere import effective_bias as effective_bias
from lightning_normgeo.geometry.sphere import effective_weight as effective_weight
from lightning_normgeo.geometry.sphere import sphere_radius as sphere_radius
from lightning_normgeo.geometry.sphere import standardize as standardize
from lightning_normgeo.geometry.sphere import standardize_gradient as standardize_gradient
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule as ElementwiseRule
from lightning_normgeo.geometry.update_rules.elementwise import StepParts as StepParts
from lightning_normgeo.geometry.update_rules.optimizers.adafactor import AdafactorRule as AdafactorRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamaxRule as AdamaxRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule as AdamRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import NAdamRule as NAdamRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import NAdamWRule as NAdamWRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import RAdamRule as RAdamRule
from lightning_normgeo.geometry.update_rules.optimizers.adam_variants import AdEMAMixRule as AdEMAMixRule
from lightning_normgeo.geometry.update_rules.optimizers.adam_variants import AdoptRule as AdoptRule
from lightning_normgeo.geometry.update_rules.optimizers.adam_variants import LaPropRule as LaPropRule
from lightning_normgeo.geometry.update_rules.optimizers.adamp import AdamPRule as AdamPRule
from lightning_normgeo.geometry.update_rules.optimizers.adamp import SGDPRule as SGDPRule
from lightning_normgeo.geometry.update_rules.optimizers.adaptive_rates import AdadeltaRule as AdadeltaRule
from lightning_normgeo.geometry.update_rules.optimizers.adaptive_rates import AdagradRule as AdagradRule
from lightning_normgeo.geometry.update_rules.optimizers.adaptive_rates import RMSpropRule as RMSpropRule
from lightning_normgeo.geometry.update_rules.optimizers.adaptive_rates import RpropRule as RpropRule
from lightning_normgeo.geometry.update_rules.optimizers.lars_lamb import LambRule as LambRule
from lightning_normgeo.geometry.update_rules.optimizers.lars_lamb import LarsRule as LarsRule
from lightning_normgeo.geometry.update_rules.optimizers.lion import LionRule as LionRule
from lightning_normgeo.geometry.update_rules.optimizers.mars import MarsRule as MarsRule
from lightning_normgeo.geometry.update_rules.optimizers.muon import MuonRule as MuonRule
from lightning_normgeo.geometry.update_rules.optimizers.sgd import ASGDRule as ASGDRule
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule as SGDRule
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDWRule as SGDWRule
from lightning_normgeo.geometry.update_rules.whole_tensor import CautiousRule as CautiousRule
from lightning_normgeo.geometry.update_rules.whole_tensor import Direction as Direction
from lightning_normgeo.geometry.update_rules.whole_tensor import WholeTensorRule as WholeTensorRule
from lightning_normgeo.geometry.update_rules.whole_tensor import cautious as cautious
from lightning_normgeo.geometry.update_rules.whole_tensor import whole_products as whole_products
from lightning_normgeo.geometry.weight_decay import ExponentialSchedule as ExponentialSchedule
from lightning_normgeo.geometry.weight_decay import balanced_norm as balanced_norm
from lightning_normgeo.geometry.weight_normalizations import (
    centered_weight_normalization as centered_weight_normalization,
)
from lightning_normgeo.geometry.weight_normalizations import spectral_normalization as spectral_normalization
from lightning_normgeo.geometry.weight_normalizations import subtract_mean_row as subtract_mean_row
from lightning_normgeo.geometry.weight_normalizations import weight_normalization as weight_normalization
from lightning_normgeo.geometry.weight_normalizations import weight_standardization as weight_standardization
