"""Per-unit measurements of the observed weights in one optimizer step; tensors stay on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.increments.increment_terms import Scalar, UpdateRule
from lightning_normgeo.geometry.increments.rounding_floors import storage_floor
from lightning_normgeo.geometry.products.unit_sums import BEFORE_TERMS, ExplainedSums
from lightning_normgeo.geometry.steps.angles import UpdateProducts
from lightning_normgeo.geometry.steps.equilibrium import equilibrium_angle, steps_to_equilibrium
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.normalization.names import has_rows
from lightning_normgeo.probes.explain import arithmetic_of
from lightning_normgeo.symmetries.units.weight_units import WeightUnits


@dataclass
class WeightStep(ExplainedSums):
    """Measurements of one weight in one optimizer step.

    Tensors have one value for each unit and are float64, on the device of the weight, or on the CPU if it has no
    float64. g is the gradient that the optimizer applies, after unscaling and clipping.

    Attributes:
        units: the units of the weight.
        dtype: dtype in which the weight is stored.
        lr: learning rate η of this step.
        sums: sums over the elements of each unit, ``(5, units)``: ‖W‖² before the step, ⟨W, g⟩, ‖g‖², Σ W_i⁴ for the
            storage floor, and η²‖g‖² of eq 16 in units of weight²; with a rule ``(9, units)``: also the terms that its
            formula adds to ‖W‖².
        rule: the formula of the optimizer; None if no decomposition of its increment is known.
        has_gradient: whether g is the gradient at W. For an optimizer that first moves W it is not, and ``inner``,
            ``gradient_sq`` and ``predicted`` are NaN. If W was moved between the backward pass and the step, they are
            those of the gradient that was applied, and the terms are right.
        edited: 0 or 1 on the device, whether values of W or its partners were changed between the backward
            pass and the step, as by edits of ``parameter.data``; None if this was not asked.
        uniform: whether SGD moves all parameters of the units by the same rule, so that ⟨W, g⟩ = 0 for all jointly
            determines the increment; always True for units of one parameter.
        alike: whether one rule of any kind moves all weights of joint units.
        optimizer: class name of the optimizer that moves the weight.
        shrink: factor by which decoupled weight decay multiplies W; for optimizers without a formula.
        update: inner products of D = W⁺ - W; None unless updates were asked for.
    """

    units: WeightUnits
    dtype: torch.dtype
    lr: Scalar
    sums: Tensor
    rule: UpdateRule | None = None
    has_gradient: bool = True
    edited: Tensor | None = None
    uniform: bool = True
    alike: bool = True
    optimizer: str = ""
    shrink: Scalar = 1.0
    update: UpdateProducts | None = None

    @property
    def equilibrium(self) -> Scalar | None:
        """The angle in radians at which weight decay and gradient noise balance; None without a closed form."""
        return None if self.rule is None or not self.alike else equilibrium_angle(self.rule)

    @property
    def relaxation(self) -> Scalar | None:
        """The time constant of the approach to that equilibrium, in steps; None without a closed form."""
        return None if self.rule is None or not self.alike else steps_to_equilibrium(self.rule)

    @property
    def is_plain_sgd(self) -> bool:
        """Whether eq 16 covers the step: plain SGD, without momentum and weight decay."""
        return self.rule is not None and self.rule.is_plain_sgd and self.uniform

    @property
    def storage_floor(self) -> Tensor:
        """The increment of ‖W‖² that rounding in storage can cause, per unit in units of weight²."""
        return storage_floor(self.quartic, self.dtype, self.stores)

    @property
    def arithmetic(self) -> torch.dtype:
        """The coarsest dtype that the optimizer computes in: the weight's, or that of a learning rate in a tensor."""
        return arithmetic_of(self.rule, self.dtype)

    @property
    def stores(self) -> int:
        """The number of times that the step stores the weight, as far as is known."""
        return 1 if self.rule is None else self.rule.stores

    def together(self, others: Sequence[WeightStep]) -> WeightStep:
        """Return the step of units that consist of this weight and others; every inner product is a sum over all.

        The learning rate is NaN if partners of joint units have other ones; a bias is taken to have that of its weight.
        """
        steps = (self, *others)
        joint = bool(self.units.partners)
        return replace(
            self,
            sums=torch.stack(common_sums(steps)).sum(0),
            uniform=all(self.moves_like(step) for step in others),
            has_gradient=all(step.has_gradient for step in steps),
            alike=not joint or all(step.rule is self.rule for step in others),
            lr=math.nan if joint and not all(_equal(step.lr, self.lr) for step in others) else self.lr,
        )

    def moves_like(self, other: WeightStep) -> bool:
        """Whether SGD moves both weights by the same rule.

        False if η is a tensor, since a comparison would wait for the device.
        """
        rule = self.rule
        return isinstance(rule, SGDRule) and not isinstance(rule.lr, Tensor) and rule == other.rule

    def unexplained(self) -> WeightStep:
        """Return the same step without rule and terms, as for an optimizer without a known decomposition."""
        return replace(self, rule=None, sums=self.sums[:BEFORE_TERMS])


def common_sums(steps: Sequence[WeightStep]) -> list[Tensor]:
    """Return the sums that all steps have: without terms unless the terms of all are known."""
    known = all(step.is_explained for step in steps)
    return [step.sums if known else step.sums[:BEFORE_TERMS] for step in steps]


def _equal(a: Scalar, b: Scalar) -> bool:
    """Whether two numbers are equal; tensors are so only if they are the same, since a comparison would wait."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


@dataclass(frozen=True)
class Observed:
    """A weight that a probe measures.

    Attributes:
        units: the units of the weight.
        weight: the parameter.
        bias: the bias of the same layer, if only weight and bias jointly are scale invariant; otherwise None.
        partners: the parameters of the partners of joint units, in their order.
    """

    units: WeightUnits
    weight: nn.Parameter
    bias: nn.Parameter | None = None
    partners: tuple[nn.Parameter, ...] = ()

    @cached_property
    def parts(self) -> list[tuple[WeightUnits, nn.Parameter]]:
        """The weight and all other parameters that belong to the units, each with the layout of its slices."""
        bias = [] if self.bias is None else [(self.units, self.bias)]
        return [(self.units, self.weight), *bias, *zip(self.units.partners, self.partners, strict=True)]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The weight and all other parameters that belong to the units."""
        return [parameter for _, parameter in self.parts]

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The weight and all other parameters that belong to the units, by parameter name."""
        return dict(zip((self.units.name, *self.units.others), self.parameters, strict=True))

    def as_control(self, reason: str) -> Observed:
        """Return the weight as a control: alone, without invariance, and with one unit per output channel."""
        rows = self.weight.shape[self.units.dim] * self.units.groups
        if self.units.part is not None:
            rows = self.units.part[1] - self.units.part[0]
        return Observed(replace(self.units.without_invariance(reason), count=rows), self.weight)

    def whole(self, reason: str) -> Observed:
        """Return the whole weight as a control, where this is a part of it."""
        units = WeightUnits(name=self.units.parameter, kind="none", count=self.weight.shape[0], reason=reason)
        return Observed(units, self.weight)

    def apart(self, reason: str) -> list[Observed]:
        """Return the weight and those of its partners that have rows as controls."""
        partners = zip(self.units.partners, self.partners, strict=True)
        others = [Observed(units, weight) for units, weight in partners if has_rows(weight)]
        return [one.as_control(reason) for one in (self, *others)]


@dataclass
class MeasuredWeights:
    """The measurements of one batch: a step for each weight that an optimizer has moved.

    Attributes:
        steps: by parameter name; the last step of a weight that was moved several times.
        valid: boolean scalars on the device. If any is False, the measurements are to be discarded, since a step was
            skipped or its gradient was not finite.
        optimizers: ids of the optimizers that took a step, measured or not.
        edited: numbers on the device, 0 or 1. If any is 1, the values of some parameter were changed between the
            backward pass and the step.
    """

    steps: dict[str, WeightStep] = field(default_factory=dict)
    valid: list[Tensor] = field(default_factory=list)
    optimizers: set[int] = field(default_factory=set)
    edited: list[Tensor] = field(default_factory=list)
