"""Batch statistics of one forward pass of a batch normalization, and the gradient of γ from its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.errors import skipped_on_error
from lightning_normgeo.geometry.columns import repeated
from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.normalization.autograd.reentrant_checkpoints import runs_again
from lightning_normgeo.probes.after_backward import changes_gradient
from lightning_normgeo.probes.batch_norm.autograd_node import (
    follows_hook,
    held,
    is_inside_backward,
    own_node,
    saved_statistics,
    saving_is_hooked,
)


class BatchStatistics(NamedTuple):
    """The statistics of one batch normalization in one forward pass.

    Tensors have shape ``(channels,)`` and are float64, on the CPU if the device has no float64.

    Attributes:
        scale: γ during the forward pass.
        shift: β during the forward pass.
        mean: μ of the pre-activation over the batch of this device (over all devices for SyncBatchNorm).
        variance: σ² of the same values, biased.
        eps: ε of the layer.
        samples: number of values per channel on this device.
        place: index of this run of the layer since the last backward pass, from 0, such as the view of a siamese
            network.
        gradient: ∂L/∂γ of this pass alone, as computed by the backward pass: neither clipped nor unscaled nor averaged
            over processes. None if there was no backward pass, or if it could not be observed.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor
    eps: float
    samples: int = 0
    place: int = 0
    gradient: Tensor | None = None


def epsilons(passes: Sequence[BatchStatistics]) -> Tensor:
    """Return the ε of each channel of several passes, concatenated: shape ``(sum of channels,)``."""
    return repeated([one.eps for one in passes], [one.scale.numel() for one in passes], passes[0].scale.device)


@dataclass
class ForwardPass:
    """One forward pass of a layer that is being observed.

    Attributes:
        samples: number of values per channel.
        place: index of this run of the layer since the last backward pass, from 0.
        saved: mean and 1/√(σ² + ε) saved on the autograd node; None where they cannot be read.
        affine: copies of γ and β, made if they are unsharded during the forward pass only.
        gradients: ∂L/∂γ of each backward pass that has gone through, as autograd has made them, and their versions.
        unknown: whether ∂L/∂γ is not that of the layer alone, or its share in the gradient of the weight is not known.
        statistics: the statistics, once they have been read.
        closed: whether the pass has been read.
    """

    samples: int
    place: int = 0
    saved: tuple[Tensor, Tensor] | None = None
    affine: tuple[Tensor, Tensor] | None = None
    gradients: list[tuple[Tensor, int]] = field(default_factory=list)
    unknown: bool = False
    statistics: BatchStatistics | None = None
    closed: bool = False


def held_pair(layer: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    """Return γ and β as a layer holds them; None if one of them is computed wherever it is accessed."""
    scale, shift = held(layer, "weight"), held(layer, "bias")
    return None if scale is None or shift is None else (scale, shift)


@skipped_on_error
def note_pass(
    passes: list[ForwardPass],
    sharded: bool,
    gradients: bool,
    layer: _BatchNorm,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    """Forward hook of a layer: record the pass and its saved statistics.

    Args:
        passes: to which the pass is added.
        sharded: whether the model is sharded, so that γ and β have to be copied now.
        gradients: whether to record ∂L/∂γ as well.
        layer: the batch normalization.
        args: its inputs.
        output: its output.
    """
    if not layer.training or not torch.is_grad_enabled() or not isinstance(output, Tensor) or runs_again():
        return
    hooked = saving_is_hooked()
    if hooked and is_inside_backward():  # a checkpoint repeats a forward pass that has been recorded already
        return
    node = own_node(layer, output.grad_fn)
    saved = None if hooked or node is None else saved_statistics(node)
    pair = held_pair(layer) if sharded else None
    affine = None if pair is None else (widened(pair[0]), widened(pair[1]))
    place = sum(not one.closed for one in passes)
    one = ForwardPass(output.numel() // output.shape[1], place, saved, affine)
    passes.append(one)
    if gradients:
        # without a gradient the pass has no graph, and no share in that of γ
        one.unknown = output.requires_grad and (
            node is None or follows_hook(node) or any(map(changes_gradient, args[:1]))
        )
        if node is not None:
            node.register_hook(partial(_note_gradient, one))


@skipped_on_error
def _note_gradient(one: ForwardPass, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
    """Backward hook of the layer's autograd node: keep ∂L/∂γ, of which autograd then makes a copy for ``.grad``."""
    gradient = inputs[1]
    if gradient is not None:  # γ is not frozen
        # with create_graph=True the gradient has a graph of its own, which would be kept
        kept = gradient.detach().clone() if gradient.requires_grad else gradient
        one.gradients.append((kept, kept._version))


def summed_gradients(passes: Sequence[ForwardPass]) -> list[Tensor | None]:
    """Return ∂L/∂γ of each pass in float64, summed over its backward passes; None without any, NaN if it is unknown.

    They are converted together, as one operation for each would cost more to launch.
    """
    parts = [gradient.detach() for one in passes for gradient, _ in one.gradients]
    wide = iter(torch.split(widened(torch.cat(parts)), list(map(len, parts))) if parts else ())
    found: list[Tensor | None] = []
    for one in passes:
        some = [next(wide) for _ in one.gradients]
        total = sum(some[1:], some[0]) if some else None
        # a hook of γ may write to the gradient that autograd hands from one to the next
        if one.unknown or any(gradient._version != version for gradient, version in one.gradients):
            total = None if one.statistics is None else torch.full_like(one.statistics.scale, torch.nan)
        found.append(total)
    return found


def widened(tensor: Tensor) -> Tensor:
    """Return a copy in float64, on the CPU if the device has no float64."""
    return on_observing_device(tensor.detach()).to(torch.float64, copy=True)
