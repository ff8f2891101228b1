"""Batch normalization folded into the preceding layers, for a faster model with the same function."""

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
from lightning_normgeo.geometry.rows import on_observing_device, stored_like
from lightning_normgeo.normalization.autograd.compiled_modules import is_compiled
from lightning_normgeo.normalization.folding import foldable, scale_and_shift, tied_parameters
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer, normalization_layers, overrides
from lightning_normgeo.normalization.surgery.preceding_layers import PrecedingLayer, inputs_by_graph
from lightning_normgeo.robustness.model.image_copies import on_copies
from lightning_normgeo.robustness.model.parameter_swap import LogitsModule, logit_change, swapped_parameters
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.utilities.tf32 import full_float32

_TOLERANCE = 1e-4
"""Largest change of a logit, relative to the largest logit, that rounding explains in float32."""
_CHECKED = 16
"""Number of images on which logits are compared: wrong folding would change the logits of every image."""


class FoldedModel:
    r"""Parameters with batch normalization folded in, with which a model computes the same function in less time.

    .. math:: W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}, \quad b' = \beta + \gamma(b - \mu) / \sqrt{\sigma^2 +
              \varepsilon}

    for every batch normalization whose input is the output of one convolution or linear layer and of nothing else,
    according to the autograd graph. W' is the effective weight: the function depends on its norm, not on ‖W‖.

    The model itself is not changed: its parameters are replaced only inside :meth:`active`.

    Args:
        module: the model, in evaluation mode.
        logits: maps images to the logits of ``module``.
        images: at least one image, ``(batch, channels, …)``, as ``logits`` takes them.
        channels_last: whether to store the weights of two-dimensional convolutions in channels-last order.

    Attributes:
        folded: for each layer that a normalization was folded into, by name, the norms of W and W'.

    Raises:
        ConfigurationError: if the autograd graph of the model cannot be read.

    Cost: one forward pass of at most two images to find the layers, and a copy of the folded weights.
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
            self._store_channels_last(module)

    @property
    def norms(self) -> dict[str, dict[str, float]]:
        """The norms of the weight (``raw``) and of the effective weight (``effective``) of each folded layer."""
        return {name: {"raw": raw, "effective": effective} for name, (raw, effective) in self.folded.items()}

    def arranged(self, images: Tensor) -> Tensor:
        """Return images in the memory format of the replacement parameters."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the model has the folded parameters and its folded normalizations do nothing."""
        places = [(layer._parameters, name, value) for (layer, name), value in self._parameters.items()]
        skipped = [(vars(layer), "forward", _identity) for layer in self._skipped]
        # weights do not change meanwhile, so parametrized ones are computed once instead of in every pass
        cached = parametrize.cached() if self._parametrized else nullcontext()
        with swapped_parameters([*places, *skipped]), cached:
            yield

    @torch.no_grad()
    def _fold(self, norm_layer: NormLayer, preceding: PrecedingLayer) -> None:
        layer = preceding.layer
        weight, bias = cast("Tensor", layer.weight), layer._parameters.get("bias")
        factors, shift = scale_and_shift(norm_layer, torch.float64)
        wide = on_observing_device(weight).double()
        folded = wide * factors.view(-1, *[1] * (weight.ndim - 1))
        offset = shift if bias is None else shift + factors * on_observing_device(bias).double()
        self._parameters[layer, "weight"] = _frozen(stored_like(weight, folded))
        self._parameters[layer, "bias"] = _frozen(stored_like(weight, offset))
        self._skipped.append(norm_layer.layer)
        self.folded[preceding.name] = float(wide.norm()), float(folded.norm())

    def _store_channels_last(self, module: nn.Module) -> None:
        """Store the weights of two-dimensional convolutions with channels last."""
        for layer in module.modules():
            weight = layer._parameters.get("weight") if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else None
            if weight is not None:
                present = self._parameters.get((layer, "weight"), weight).detach()
                self._parameters[layer, "weight"] = _frozen(present.contiguous(memory_format=torch.channels_last))


def folded_model(
    module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, channels_last: bool = True
) -> FoldedModel | None:
    """Return a model with folded batch normalization, or None if its logits would change by more than rounding.

    Warns if folding changes the logits by more than rounding.

    Args:
        module: the model, in evaluation mode.
        logits: maps images to the logits of ``module``.
        images: at least one image, ``(batch, channels, …)``, as ``logits`` takes them.
        channels_last: whether to try channels-last order first.

    Cost: as :class:`FoldedModel`, and two or four forward passes of at most 16 images.
    """
    try:
        folded = FoldedModel(module, logits, images, channels_last)
    except ConfigurationError:
        return None  # the model has no autograd graph that can be read

    call = on_copies(logits)

    def fresh(batch: Tensor) -> Tensor:
        # buffers that one pass writes must not change the logits of the next, which would be blamed on folding
        with preserved_state(module, fork_rng=False):
            return call(batch)

    with full_float32():  # the rounding of TF32 would look like a change by folding
        try:
            change = logit_change(folded.active(), fresh, images[:_CHECKED], folded.arranged)
        except Exception:  # the model may depend on the memory format of its images, as .view does
            change = math.inf
    if not change <= _TOLERANCE and folded.channels_last:
        return folded_model(module, logits, images, channels_last=False)
    if change <= _TOLERANCE:
        return folded
    if not math.isfinite(change):  # the logits themselves are not finite, which the report tells
        return None
    warn_once(
        "Folding batch normalization into the layers in front of it changes the logits by up to "
        f"{change:.1e} of the largest, more than rounding; the model is "
        "evaluated without folding, which takes longer."
    )
    return None


def _pairs(
    module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor
) -> Iterator[tuple[NormLayer, PrecedingLayer]]:
    """Yield each batch normalization that can be folded, with its preceding layer."""
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
    """Whether a batch normalization computes the formula of :class:`FoldedModel`, with running statistics."""
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
    """Whether a normalization can be folded into the weight and bias of a layer."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain = "weight" in layer._parameters and not parametrize.is_parametrized(layer)
    return isinstance(layer, kinds) and plain and not _hooked(layer)


def _hooked(layer: nn.Module) -> bool:
    """Whether a layer has hooks, which may read or change its inputs and outputs."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _identity(values: Tensor) -> Tensor:
    return values


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
