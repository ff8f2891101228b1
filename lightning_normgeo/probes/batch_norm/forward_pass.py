"""One forward pass of a batch normalization: what it has computed, and the gradient that came back through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.errors import skipped_on_error
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.probes.batch_norm.autograd_node import (
    is_inside_backward,
    own_node,
    saved_statistics,
    saving_is_hooked,
)


@dataclass(frozen=True)
class BatchStatistics:
    """One batch normalization during one forward pass; wide tensors of shape ``(channels,)``.

    Attributes:
        scale: γ as the forward pass used it.
        shift: β.
        mean: μ of the pre-activation over this device's batch (over all devices for SyncBatchNorm).
        variance: σ², biased.
        eps: the layer's ε.
        samples: how many values each channel had on this device.
        place: which run of the layer this was since the last backward pass, from 0: the view of a siamese network.
        gradient: ∂L/∂γ of this pass alone, as backward passes left it: neither clipped nor unscaled nor averaged over
            processes. None where no backward pass went through, or none could be followed.
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
    """Return the ε of each channel of several passes, one after the other."""
    return torch.cat([one.scale.new_full((one.scale.numel(),), one.eps) for one in passes])


@dataclass
class ForwardPass:
    """One forward pass of a layer, while it is watched.

    Attributes:
        samples: how many values each channel had.
        place: which run of the layer since the last backward pass.
        saved: (mean, 1/std) of the autograd node, or None where they cannot be read.
        affine: (γ, β), where they are whole during the forward pass only.
        gradient: ∂L/∂γ, once a backward pass went through.
        statistics: what was made of it.
        closed: whether it was read.
    """

    samples: int
    place: int = 0
    saved: tuple[Tensor, Tensor] | None = None
    affine: tuple[Tensor, Tensor] | None = None
    gradient: Tensor | None = None
    statistics: BatchStatistics | None = None
    closed: bool = False


@skipped_on_error
def note_pass(passes: list[ForwardPass], divided: bool, layer: _BatchNorm, args: tuple[Any, ...], output: Any) -> None:
    """Note a forward pass; a hook of the layer."""
    if not layer.training or not torch.is_grad_enabled() or not isinstance(output, Tensor):
        return
    hooked = saving_is_hooked()
    if hooked and is_inside_backward():  # a checkpoint computes anew what was noted already
        return
    node = own_node(layer, output.grad_fn)
    saved = None if hooked or node is None else saved_statistics(node)
    affine = (widened(layer.weight), widened(layer.bias)) if divided else None
    place = sum(not one.closed for one in passes)
    one = ForwardPass(output.numel() // output.shape[1], place, saved, affine)
    passes.append(one)
    if node is not None:
        node.register_hook(partial(_note_gradient, one))


@skipped_on_error
def _note_gradient(one: ForwardPass, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
    """Add ∂L/∂γ; a hook of the layer's autograd node."""
    gradient = inputs[1]
    if gradient is not None:
        one.gradient = widened(gradient) if one.gradient is None else one.gradient + gradient


def widened(tensor: Tensor) -> Tensor:
    """Return a copy in wide precision."""
    return tensor.detach().to(wide_dtype(tensor.device), copy=True)
