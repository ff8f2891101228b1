"""Sums over the generators of all scale symmetries in one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_normgeo.symmetries.families import Family


@dataclass(frozen=True)
class SymmetryStep:
    """Sums over generators in one optimizer step; generators without all of their gradients are left out.

    Attributes:
        families: families with at least one generator, and the places of their generators in the tensors.
        charge: Σ s_i ⟨W_i, g_i⟩ over its bound √(Σ s_i²‖W_i‖² · Σ‖g_i‖²), in [-1, 1].
        uncanceled: Σ |s_i ⟨W_i, g_i⟩| over the same bound, in [0, 1]: the charge if its terms did not cancel.
        quantity: Q = Σ s_i ‖W_i‖² before the step.
        size: Σ |s_i| ‖W_i‖² before the step.
        increment: Q⁺ − Q, measured.
        noise: Σ s_i η² ‖g_i‖², the increment under plain SGD.
        decay: −2 Σ s_i η λ ‖W_i‖², the part of weight decay.
        angle: for each family that is invariant jointly, the angle by which its weights turn, as one vector.
        lr: for each such family η / Σ ‖W_i‖², the effective learning rate; NaN if its parameters have several η.
    """

    families: Sequence[tuple[Family, slice]]
    charge: Tensor
    uncanceled: Tensor
    quantity: Tensor
    size: Tensor
    increment: Tensor
    noise: Tensor
    decay: Tensor
    angle: Mapping[int, Tensor]
    lr: Mapping[int, Tensor]

    def without(self, names: set[str]) -> SymmetryStep:
        """Return the same step without some families."""
        kept = {k: pair for k, pair in enumerate(self.families) if str(pair[0]) not in names}
        return replace(
            self,
            families=list(kept.values()),
            angle={n: self.angle[k] for n, k in enumerate(kept) if k in self.angle},
            lr={n: self.lr[k] for n, k in enumerate(kept) if k in self.lr},
        )


def joined(steps: Sequence[SymmetryStep]) -> SymmetryStep:
    """Return the steps of several optimizers as one."""
    if len(steps) == 1:
        return steps[0]
    names = ("charge", "uncanceled", "quantity", "size", "increment", "noise", "decay")
    tensors = {name: torch.cat([getattr(step, name) for step in steps]) for name in names}
    families: list[tuple[Family, slice]] = []
    angle: dict[int, Tensor] = {}
    lr: dict[int, Tensor] = {}
    start = 0
    for step in steps:
        angle |= {len(families) + k: value for k, value in step.angle.items()}
        lr |= {len(families) + k: value for k, value in step.lr.items()}
        families += [(family, slice(start + own.start, start + own.stop)) for family, own in step.families]
        start += len(step.charge)
    return SymmetryStep(families, **tensors, angle=angle, lr=lr)
