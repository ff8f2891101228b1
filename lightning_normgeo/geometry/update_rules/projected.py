"""Whole-tensor rules of optimizers that turn a weight's step: Muon, and AdamP and SGDP, which project it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.geometry.norm_increments import Scalar
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.geometry.update_rules.adam_family import AdamRule
from lightning_normgeo.geometry.update_rules.elementwise import StepParts, shrunk
from lightning_normgeo.geometry.update_rules.whole_tensor import Direction, WholeTensorRule, zeros_if_new


@dataclass(frozen=True, kw_only=True)
class MuonRule(WholeTensorRule):
    r"""torch.optim.Muon: W⁺ = sW - η'O, O close to the nearest orthogonal matrix of the momentum, Jordan et al. 2024.

    O is what torch's Newton-Schulz iteration in bfloat16 returns, recomputed; s = 1 - ηλ with η, η' adjusted to the
    shape. All of the step is G: O does not split. ⟨W, O⟩ is not zero for scale-invariant weights, and ‖O‖² is close to
    the rank, whatever ‖g‖ is: eq 16 does not predict Muon. The state is (b⁻,), or nothing at the first step.

    Args:
        momentum: μ.
        nesterov: whether g is averaged in once more.
        coefficients: of the iteration.
        iterations: how many.
        eps: the least norm that is divided by.
        adjusted: η'/η.
    """

    momentum: Scalar = 0.95
    nesterov: bool = True
    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    iterations: int = 5
    eps: float = 1e-7
    adjusted: float = 1.0

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return η'O."""
        from torch.optim._muon import _zeropower_via_newtonschulz  # torch >= 2.9

        (buffer,) = zeros_if_new(state, gradient, 1)
        average = buffer.lerp(gradient, 1 - self.momentum)
        update = gradient.lerp(average, self.momentum) if self.nesterov else average
        turned = _zeropower_via_newtonschulz(update, self.coefficients, self.iterations, self.eps)
        return Direction(StepParts(turned.to(wide_dtype(weight.device)) * (self.lr * self.adjusted)))


@dataclass(frozen=True, kw_only=True)
class ProjectedRule(WholeTensorRule):
    r"""What AdamP and SGDP share: a step without its part along W, if W looks scale invariant (Heo et al. 2021).

    W counts as scale invariant, by channel or as a whole, where |cos(W, g)| < δ/√n. Then s = 1 - ηλρ. By the
    optimizer's operations in its own precision: what is left along W is rounding. All of the step is G.

    Args:
        delta: δ.
        ratio: ρ.
        eps: of the norms.
        caution: whether the step is masked, see :class:`CautiousRule`.
    """

    delta: float = 0.1
    ratio: float = 0.1
    eps: float = 1e-8
    caution: bool = False

    def projected(self, weight: Tensor, gradient: Tensor, step: Tensor, size: Scalar, decay: Scalar) -> Direction:
        """Return a step times its size, and s for a decay that ρ multiplies."""
        step, invariant = self._project(weight, gradient, step)
        wide = wide_dtype(weight.device)
        shrink = shrunk(1 - decay * (self.ratio if invariant else 1.0), self.dtype) if self.weight_decay else 1.0
        return Direction(StepParts(step.to(wide) * size), torch.as_tensor(shrink, dtype=wide, device=weight.device))

    def _project(self, weight: Tensor, gradient: Tensor, step: Tensor) -> tuple[Tensor, bool]:
        shape = (-1,) + (1,) * (weight.ndim - 1)
        for rows in (weight.shape[0], 1) if weight.ndim > 1 else ():
            w, g = weight.reshape(rows, -1), gradient.reshape(rows, -1)
            cosine = F.cosine_similarity(g, w, dim=1, eps=self.eps).abs_()
            if cosine.max() < self.delta / math.sqrt(w.size(1)):
                unit = weight / w.norm(p=2, dim=1).add_(self.eps).reshape(shape)

                def tangential(x: Tensor, unit: Tensor = unit, rows: int = rows) -> Tensor:
                    return x - unit * (unit * x).reshape(rows, -1).sum(dim=1).reshape(shape)

                step = tangential(step)
                return (tangential(_masked(step, tangential(gradient))) if self.caution else step), True
        return (_masked(step, gradient) if self.caution else step), False


@dataclass(frozen=True, kw_only=True)
class AdamPRule(ProjectedRule, AdamRule):
    """AdamP as in timm and adamp: the step of AdamW, projected. State as for Adam.

    Args:
        nesterov: whether g is averaged in once more.
    """

    nesterov: bool = False

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return G and s."""
        first, second = zeros_if_new(state, weight, 2)
        beta1, beta2 = self.betas
        first = first.mul(beta1).add_(gradient, alpha=float(1 - beta1))
        second = second.mul(beta2).addcmul_(gradient, gradient, value=float(1 - beta2))
        by = (second.sqrt() / (1 - beta2**self.step) ** 0.5).add_(self.eps)
        step = (beta1 * first + (1 - beta1) * gradient if self.nesterov else first) / by
        return self.projected(weight, gradient, step, self.lr / (1 - beta1**self.step), self.lr * self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class SGDPRule(ProjectedRule):
    """SGDP as in timm and adamp: the step of SGD, projected; decay ηλρ/(1-μ). The state is (b⁻,), or nothing.

    Args:
        momentum: μ.
        dampening: τ.
        nesterov: whether the step is g + μb.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return G and s."""
        (buffer,) = zeros_if_new(state, weight, 1)
        buffer = buffer.mul(self.momentum).add_(gradient, alpha=1.0 - self.dampening)
        step = gradient + self.momentum * buffer if self.nesterov else buffer
        return self.projected(weight, gradient, step, self.lr, self.lr * self.weight_decay / (1 - self.momentum))


def _masked(step: Tensor, gradient: Tensor) -> Tensor:
    mask = (step * gradient > 0).to(gradient.dtype)
    return step * mask.div_(mask.mean().clamp_(min=1e-3))
