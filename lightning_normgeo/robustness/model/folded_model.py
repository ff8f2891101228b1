"""The same function, faster: batch normalization folded into the layer in front, weights in channels-last order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.normalization.autograd.graph import is_compiled
from lightning_normgeo.normalization.folding import foldable, scale_and_shift, tied_parameters
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer, normalization_layers, overrides
from lightning_normgeo.normalization.surgery.preceding_layers import PrecedingLayer, inputs_by_graph
from lightning_normgeo.robustness.model.parameter_swap import LogitsModule, logit_change, swapped_parameters
from lightning_normgeo.robustness.model.precision import full_float32
from lightning_normgeo.robustness.model.preserved_state import preserved_state

_TOLERANCE = 1e-4
"""Largest change of a logit, relative to the largest logit, that rounding explains in float32."""
_CHECKED = 16
"""Images that are looked at: what folding changes by mistake, it changes for all."""


class FoldedModel:
    r"""Stand-ins for a model's parameters with which evaluation mode computes the same in less time.

    .. math:: W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}, \quad b' = \beta + \gamma(b - \mu) / \sqrt{\sigma^2 +
              \varepsilon}

    for every batch normalization whose input is the output of one convolution or linear layer and of nothing else, as
    the autograd graph says. W' is the effective weight: its norm is what the function sees, whatever ‖W‖ is.

    The model itself is not changed: parameters are exchanged while :meth:`active` lasts, and put back.

    Args:
        module: in evaluation mode.
        logits: calls it.
        images: a few, as ``logits`` takes them.
        channels_last: whether to store the weights of convolutions in that order.

    Attributes:
        folded: names of the layers that a normalization was folded into, with the norms of W and W'.
    """

    def __init__(
        self, module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, channels_last: bool = True
    ) -> None:
        self.folded: dict[str, tuple[float, float]] = {}
        self._parameters: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._skipped: list[nn.Module] = []
        convolves = any(isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)) for child in module.modules())
        self.channels_last = channels_last and images.ndim == 4 and convolves
        self._parametrized = any(parametrize.is_parametrized(child) for child in module.modules())
        if not is_compiled(module):
            for norm_layer, preceding in _pairs(module, logits, images[:2]):
                self._fold(norm_layer, preceding)
        if self.channels_last:
            self._turn(module)

    @property
    def norms(self) -> dict[str, dict[str, float]]:
        """For each layer in :attr:`folded` the norm of its weight, and of the effective one."""
        return {name: {"raw": raw, "effective": effective} for name, (raw, effective) in self.folded.items()}

    def arranged(self, images: Tensor) -> Tensor:
        """Return images in the order that the stand-ins are fast with."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with the stand-ins meanwhile."""
        places = [(layer._parameters, name, value) for (layer, name), value in self._parameters.items()]
        skipped = [(vars(layer), "forward", _identity) for layer in self._skipped]
        with swapped_parameters([*places, *skipped]), parametrize.cached() if self._parametrized else nullcontext():
            yield

    @torch.no_grad()
    def _fold(self, norm_layer: NormLayer, preceding: PrecedingLayer) -> None:
        layer = preceding.layer
        weight, bias = cast("Tensor", layer.weight), layer._parameters.get("bias")
        wide = wide_dtype(weight.device)
        factors, shift = scale_and_shift(norm_layer, wide)
        folded = weight.to(wide) * factors.view(-1, *[1] * (weight.ndim - 1))
        offset = shift if bias is None else shift + factors * bias.to(wide)
        self._parameters[layer, "weight"] = _frozen(folded.to(weight.dtype))
        self._parameters[layer, "bias"] = _frozen(offset.to(weight.dtype))
        self._skipped.append(norm_layer.layer)
        self.folded[preceding.name] = float(weight.to(wide).norm()), float(folded.norm())

    def _turn(self, module: nn.Module) -> None:
        """Store the weights of two-dimensional convolutions with channels last."""
        for layer in module.modules():
            weight = layer._parameters.get("weight") if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else None
            if weight is not None:
                present = self._parameters.get((layer, "weight"), weight).detach()
                self._parameters[layer, "weight"] = _frozen(present.contiguous(memory_format=torch.channels_last))


def folded_model(
    module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, channels_last: bool = True
) -> FoldedModel | None:
    """Return a model's stand-ins, or None where they would not compute the same.

    Warns where folding changes logits by more than rounding.
    """
    try:
        folded = FoldedModel(module, logits, images, channels_last)
    except ConfigurationError:
        return None  # no graph to be had

    def fresh(batch: Tensor) -> Tensor:
        with preserved_state(module, fork_rng=False):  # buffers that a pass writes are no change by folding
            return logits(batch)

    with full_float32():  # else rounding that cuDNN has chosen counts as a change
        try:
            change = logit_change(folded.active(), fresh, images[:_CHECKED], folded.arranged)
        except Exception:  # a model that asks for the order of its images in memory, as .view does
            change = math.inf
    if not change <= _TOLERANCE and folded.channels_last:
        return folded_model(module, logits, images, channels_last=False)
    if change <= _TOLERANCE:
        return folded
    if not math.isfinite(change):  # nor are the logits, which the report says
        return None
    warn_once(
        "Folding batch normalization into the layers in front of it changes the logits by up to "
        f"{change:.1e} of the largest, more than rounding; the model is "
        "evaluated as it is, which takes longer."
    )
    return None


def _pairs(
    module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor
) -> Iterator[tuple[NormLayer, PrecedingLayer]]:
    """Yield the batch normalizations that can be folded, and the layer in front of each."""
    wanted = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not any(isinstance(child, wanted) for child in module.modules()):
        return
    calls = LogitsModule(module, logits)
    norm_layers = [s for s in normalization_layers(calls) if isinstance(s.layer, wanted) and _plain(s)]
    tied = tied_parameters(module)
    inputs = inputs_by_graph(calls, norm_layers, images)
    for norm_layer in norm_layers:
        preceding = foldable(norm_layer, nn.Identity(), inputs[norm_layer.layer].preceding_layers, tied)
        if isinstance(preceding, PrecedingLayer) and _foldable(preceding.layer):
            yield norm_layer, replace(preceding, name=LogitsModule.own_name(preceding.name))


def _plain(norm_layer: NormLayer) -> bool:
    """Whether a layer computes what the formula says, and with running statistics."""
    return (
        len(norm_layer.names) == 1
        and norm_layer.statistics[1] is not None
        and not norm_layer.layer.training
        and not norm_layer.followers
        and not overrides(norm_layer.layer, "forward")
        and not parametrize.is_parametrized(norm_layer.layer)
        and not _hooked(norm_layer.layer)
    )


def _foldable(layer: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain = "weight" in layer._parameters and not parametrize.is_parametrized(layer)
    return isinstance(layer, kinds) and plain and not _hooked(layer)


def _hooked(layer: nn.Module) -> bool:
    """Whether somebody looks at what goes in or comes out."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _identity(values: Tensor) -> Tensor:
    return values


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
