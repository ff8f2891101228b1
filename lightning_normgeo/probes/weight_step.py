"""What one optimizer step did to the observed weights, as numbers per unit that stay on the device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.angles import UpdateProducts
from lightning_normgeo.geometry.equilibrium import equilibrium_angle, steps_to_equilibrium
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms, Scalar, UpdateRule
from lightning_normgeo.geometry.increments.rounding_floors import storage_floor
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.normalization.units import WeightUnits

ADDITIVE = ("predicted", "weight_sq", "inner", "gradient_sq", "quartic")
"""What of a :class:`WeightStep` is a sum over the elements of a unit, besides its terms."""


@dataclass
class WeightStep:
    """One weight in one optimizer step; tensors hold one wide value per unit and stay on the device.

    Attributes:
        units: which slices of the weight are looked at.
        dtype: what the weight is stored in.
        lr: learning rate of this step.
        predicted: η²‖g‖² of eq 16.
        weight_sq: ‖W‖² before the step.
        inner: ⟨W, g⟩.
        gradient_sq: ‖g‖².
        quartic: Σ W_i⁴, for the storage floor.
        rule: the optimizer's formula; None for an optimizer without a known decomposition.
        terms: what it adds to ‖W‖².
        has_gradient: whether g is the gradient at W; if not, as for an optimizer that first moves W, ``inner``,
            ``gradient_sq`` and ``predicted`` are NaN.
        scale_gradient: ∂L/∂γ of the batch normalization behind the weight, at the same moment as g.
        uniform: whether weight and bias of its units move by one rule of SGD, so that ⟨W, g⟩ = 0 for both jointly says
            what the step adds; of units without a bias always.
        scale_shared: whether the gradients of W and γ are those of backward passes times one factor.
        optimizer: the class that moves the weight.
        shrink: what decoupled weight decay multiplies W with, where the optimizer says so; for optimizers without a
            formula.
        update: inner products of D = W⁺ - W; None unless updates were asked for.
    """

    units: WeightUnits
    dtype: torch.dtype
    lr: Scalar
    predicted: Tensor
    weight_sq: Tensor
    inner: Tensor
    gradient_sq: Tensor
    quartic: Tensor
    rule: UpdateRule | None = None
    terms: IncrementTerms | None = None
    has_gradient: bool = True
    uniform: bool = True
    scale_gradient: Tensor | None = None
    scale_shared: bool = True
    optimizer: str = ""
    shrink: Scalar = 1.0
    update: UpdateProducts | None = None

    @property
    def equilibrium(self) -> Scalar | None:
        """Angle at which weight decay and gradient noise balance, where a closed form is known."""
        return None if self.rule is None else equilibrium_angle(self.rule)

    @property
    def relaxation(self) -> Scalar | None:
        """Time constant of the way there, in steps."""
        return None if self.rule is None else steps_to_equilibrium(self.rule)

    @property
    def is_plain_sgd(self) -> bool:
        """Whether the step is of the kind that eq 16 is about."""
        return self.rule is not None and self.rule.is_plain_sgd and self.uniform

    @property
    def storage_floor(self) -> Tensor:
        """What rounding in storage can add to the increment of each unit."""
        return storage_floor(self.quartic, self.dtype, 1 if self.rule is None else self.rule.stores)

    def with_bias(self, bias: WeightStep) -> WeightStep:
        """Return the step of the units that weight and bias make up jointly; every product is a sum over both."""
        both = {name: getattr(self, name) + getattr(bias, name) for name in ADDITIVE}
        known = self.terms is not None and bias.terms is not None
        terms = IncrementTerms(*map(torch.add, self.terms or (), bias.terms or ())) if known else None
        return replace(self, terms=terms, uniform=self.moves_like(bias), **both)

    def moves_like(self, other: WeightStep) -> bool:
        """Whether SGD does the same to both; taken for different where η is on a device, which comparing waits for."""
        rule = self.rule
        return isinstance(rule, SGDRule) and not isinstance(rule.lr, Tensor) and rule == other.rule

    def unexplained(self) -> WeightStep:
        """Return the step as one of an optimizer without a known decomposition."""
        return replace(self, rule=None, terms=None)


@dataclass(frozen=True)
class Observed:
    """A weight as the probe sees it.

    Attributes:
        units: which slices of it are looked at.
        weight: the parameter.
        bias: the bias that belongs to the units, where only both jointly are invariant.
    """

    units: WeightUnits
    weight: nn.Parameter
    bias: nn.Parameter | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if it belongs to the units."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same by name."""
        names = [self.units.name, *([] if self.units.bias is None else [self.units.bias])]
        return dict(zip(names, self.parameters, strict=True))

    def as_control(self, reason: str) -> Observed:
        """Return the weight as a control, without its bias, whose rows are looked at one by one."""
        rows = self.weight.shape[self.units.dim] * self.units.groups
        return Observed(replace(self.units.without_invariance(reason), count=rows), self.weight)


@dataclass
class MeasuredWeights:
    """What was seen between two ends of a batch: a step for each weight that moved.

    Attributes:
        steps: by parameter name; the last step of a weight counts where there were several.
        valid: boolean scalars on the device; all have to hold, else the steps did not happen as described.
        optimizers: those that took a step, measured or not, by id.
    """

    steps: dict[str, WeightStep] = field(default_factory=dict)
    valid: list[Tensor] = field(default_factory=list)
    optimizers: set[int] = field(default_factory=set)
