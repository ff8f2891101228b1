"""AdamP and SGDP, which project the steps of scale-invariant weights onto the plane orthogonal to W."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.geometry.update_rules.elementwise import StepParts, shrunk
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.recipe import Described, Group, Recipe, State, averages, moments, recipe
from lightning_normgeo.geometry.update_rules.timm_options import ADAM_STATE, with_decoupled_decay
from lightning_normgeo.geometry.update_rules.whole_tensor import Direction, WholeTensorRule, zeros_if_new


@dataclass(frozen=True, kw_only=True)
class ProjectedRule(WholeTensorRule):
    r"""Base of AdamP and SGDP, which remove the step's part along W if W looks scale invariant (Heo et al. 2021).

    W counts as scale invariant, by channel or as a whole, where |cos(W, g)| < δ/√n. Then s = 1 - ηλρ. The rule repeats
    the optimizer's operations in its precision, since the remaining part along W consists of rounding errors. All of
    the step counts as G.

    Args:
        delta: δ. Default: 0.1.
        ratio: ρ. Default: 0.1.
        eps: added to the norms that are divided by. Default: 1e-8.
        caution: whether the step is masked, see :class:`CautiousRule`. Default: False.
    """

    delta: float = 0.1
    ratio: float = 0.1
    eps: float = 1e-8
    caution: bool = False

    def projected(self, weight: Tensor, gradient: Tensor, step: Tensor, size: Scalar, decay: Scalar) -> Direction:
        """Return the projected step times its size, and s, in which ρ multiplies the decay of invariant weights.

        Args:
            weight: W.
            gradient: g.
            step: the step before projection, without the learning rate.
            size: the factor of the step, that is the learning rate with its corrections.
            decay: 1 - s of weights that are not scale invariant.
        """
        step, invariant = self._project(weight, gradient, step)
        wide = wide_dtype(weight.device)
        shrink = shrunk(1 - decay * (self.ratio if invariant else 1.0), self.dtype) if self.weight_decay else 1.0
        return Direction(StepParts(step.to(wide) * size), torch.as_tensor(shrink, dtype=wide, device=weight.device))

    def _project(self, weight: Tensor, gradient: Tensor, step: Tensor) -> tuple[Tensor, bool]:
        """Return the step, projected if the weight looks scale invariant, and whether it does."""
        shape = (-1,) + (1,) * (weight.ndim - 1)
        if weight.ndim <= 1:
            units: tuple[int, ...] = ()
        else:
            units = (weight.shape[0], 1)  # by channel, then as a whole
        for rows in units:
            w, g = weight.reshape(rows, -1), gradient.reshape(rows, -1)
            cosine = F.cosine_similarity(g, w, dim=1, eps=self.eps).abs_()
            if cosine.max() < self.delta / math.sqrt(w.size(1)):
                unit = weight / w.norm(p=2, dim=1).add_(self.eps).reshape(shape)

                def tangential(x: Tensor, unit: Tensor = unit, rows: int = rows) -> Tensor:
                    return x - unit * (unit * x).reshape(rows, -1).sum(dim=1).reshape(shape)

                step = tangential(step)
                if self.caution:
                    step = tangential(_masked(step, tangential(gradient)))
                return step, True
        if self.caution:
            step = _masked(step, gradient)
        return step, False


@dataclass(frozen=True, kw_only=True)
class AdamPRule(ProjectedRule, AdamRule):
    """AdamP as in timm and adamp: the projected step of AdamW. State as for Adam.

    Args:
        nesterov: whether the step averages g into m once more. Default: False.
    """

    nesterov: bool = False

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the part G and the factor s of decay."""
        first, second = zeros_if_new(state, weight, 2)
        beta1, beta2 = self.betas
        first = first.mul(beta1).add_(gradient, alpha=float(1 - beta1))
        second = second.mul(beta2).addcmul_(gradient, gradient, value=float(1 - beta2))
        by = (second.sqrt() / (1 - beta2**self.step) ** 0.5).add_(self.eps)
        step = (beta1 * first + (1 - beta1) * gradient if self.nesterov else first) / by
        return self.projected(weight, gradient, step, self.lr / (1 - beta1**self.step), self.lr * self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class SGDPRule(ProjectedRule):
    """SGDP as in timm and adamp: the projected step of SGD, with decay ηλρ/(1-μ).

    The state is (b⁻,), and empty before the first step.

    Args:
        momentum: μ. Default: 0.
        dampening: τ. Default: 0.
        nesterov: whether the step is g + μb instead of b. Default: False.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the part G and the factor s of decay."""
        (buffer,) = zeros_if_new(state, weight, 1)
        buffer = buffer.mul(self.momentum).add_(gradient, alpha=1.0 - self.dampening)
        step = gradient + self.momentum * buffer if self.nesterov else buffer
        return self.projected(weight, gradient, step, self.lr, self.lr * self.weight_decay / (1 - self.momentum))


def _masked(step: Tensor, gradient: Tensor) -> Tensor:
    """Return a step masked as by :class:`CautiousRule`, with the optimizer's operations."""
    mask = (step * gradient > 0).to(gradient.dtype)
    return step * mask.div_(mask.mean().clamp_(min=1e-3))


def _adamp(group: Group, state: State, dtype: torch.dtype) -> Described:
    rule = AdamPRule(
        **with_decoupled_decay(group, dtype),
        **moments(group, state),
        delta=group["delta"],
        ratio=group["wd_ratio"],
        nesterov=bool(group["nesterov"]),
        caution=bool(group.get("caution", False)),
    )
    return rule, averages(state, *ADAM_STATE)


def _sgdp(group: Group, state: State, dtype: torch.dtype) -> Described:
    rule = SGDPRule(
        **with_decoupled_decay(group, dtype),
        momentum=group["momentum"],
        dampening=group["dampening"],
        nesterov=bool(group["nesterov"]),
        delta=group["delta"],
        ratio=group["wd_ratio"],
        eps=group["eps"],
        caution=bool(group.get("caution", False)),
    )
    return rule, averages(state, "momentum")


_OPTIONS = "lr eps weight_decay delta wd_ratio nesterov caution"
RECIPES: dict[str, Recipe] = {
    "timm.optim.adamp.AdamP": recipe(_adamp, f"{_OPTIONS} betas"),
    "timm.optim.sgdp.SGDP": recipe(_sgdp, f"{_OPTIONS} momentum dampening"),
}
