"""What one optimizer step did to the observed weights, as numbers per unit that stay on the device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.angles import UpdateProducts
from lightning_normgeo.geometry.increments import IncrementTerms, Scalar
from lightning_normgeo.normalization.units import WeightUnits

_ADDITIVE = ("predicted", "weight_sq", "inner", "gradient_sq", "quartic")


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
        terms: what the optimizer's formula adds to ‖W‖²; None for an optimizer without a known decomposition.
        equilibrium: angle at which weight decay and gradient noise balance, where a closed form is known.
        scale_gradient: ∂L/∂γ of the batch normalization behind the weight, at the same moment as g.
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
    terms: IncrementTerms | None
    equilibrium: Scalar | None
    scale_gradient: Tensor | None
    update: UpdateProducts | None = None

    def with_bias(self, bias: WeightStep) -> WeightStep:
        """Return the step of the units that weight and bias make up jointly; every product is a sum over both."""
        both = {name: getattr(self, name) + getattr(bias, name) for name in _ADDITIVE}
        known = self.terms is not None and bias.terms is not None
        terms = IncrementTerms(*map(torch.add, self.terms or (), bias.terms or ())) if known else None
        return replace(self, terms=terms, **both)


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


@dataclass
class StepMeasurement:
    """What was seen between two ends of a batch: a step for each weight that moved.

    Attributes:
        steps: by parameter name; the last step of a weight counts where there were several.
        valid: boolean scalars on the device; all have to hold, else the steps did not happen as described.
        stepped: whether any optimizer took a step, measured or not.
        unknown: how many weights of the optimizers have gradients but are in no graph that was seen.
    """

    steps: dict[str, WeightStep] = field(default_factory=dict)
    valid: list[Tensor] = field(default_factory=list)
    stepped: bool = False
    unknown: int = 0
