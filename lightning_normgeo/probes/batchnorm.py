"""Batch statistics of batch normalizations, read off what the forward pass has computed anyway.

In eager mode the autograd node of a batch normalization keeps the mean and the inverse standard deviation; reading
them costs nothing. Under ``torch.compile`` (and for SyncBatchNorm) the change of the running statistics gives the same
numbers to about 1e-6. Nothing is recomputed and no statistic is ever taken twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.normalization.names import clean_name

_NODES = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"}
_SYNC_NODE = "SyncBatchNormBackward"


@dataclass(frozen=True)
class BatchStatistics:
    """One batch normalization during one forward pass; wide tensors of shape ``(channels,)``.

    Attributes:
        scale: γ as the forward pass used it.
        shift: β.
        mean: μ of the pre-activation over this device's batch (over all devices for SyncBatchNorm).
        variance: σ², biased.
        eps: the layer's ε.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor
    eps: float


@dataclass(frozen=True)
class _Pass:
    """One forward pass of a layer: how many values each channel had, the autograd node's (mean, 1/std), and (γ, β)."""

    samples: int
    saved: tuple[Tensor, Tensor] | None
    affine: tuple[Tensor, Tensor] | None = None


def affine_batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch normalizations of ``module`` that have γ and β, by module path."""
    return {
        clean_name(name): layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        and not isinstance(layer, nn.modules.instancenorm._InstanceNorm)
        and layer.affine
    }


class _Samples:
    """How many values each channel had when a compiled layer last ran. Written, never read, by compiled code."""

    count = 0


class BatchNormProbe:
    """Reads the statistics of the forward pass between :meth:`arm` and :meth:`collect`.

    In eager mode hooks exist only while armed, so an unmeasured step costs nothing. Compiled modules are traced with
    their hooks once and for all, so there a hook that notes the number of samples stays. A layer that ran more than
    once per backward pass (siamese networks) has no single σ; it is left out and counted in ``skipped``.

    Args:
        layers: batch normalizations with γ and β, by module path.
        compiled: whether they run under ``torch.compile``.
        divided: whether γ and β are whole only during the forward pass (``fully_shard``).
    """

    def __init__(self, layers: dict[str, _BatchNorm], compiled: bool = False, divided: bool = False) -> None:
        self.layers = layers
        self.compiled = compiled
        self.divided = divided
        self.skipped: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []
        self._passes: dict[str, list[_Pass]] = {name: [] for name in layers}
        self._before: dict[str, tuple[Tensor, ...]] = {}
        self._by_difference = set(layers)
        self._samples = {name: _Samples() for name in layers if compiled}
        for name, samples in self._samples.items():
            self._handles.append(layers[name].register_forward_pre_hook(partial(_note_samples, samples)))

    def arm(self) -> None:
        """Watch the next forward pass."""
        self.disarm()
        for name, layer in self.layers.items():
            tracked = layer.training and layer.track_running_stats and layer.running_mean is not None
            if tracked and name in self._by_difference:
                self._before[name] = tuple(_copy(t) for t in _running(layer))
            if layer.training and not self.compiled:
                note = partial(_note_pass, self._passes[name], self.divided)
                self._handles.append(
                    layer.register_forward_hook(note, prepend=True)
                )  # before γ and β are divided again

    def detach(self) -> None:
        """Remove every hook, for good."""
        self.compiled = False
        self.disarm()

    @torch.no_grad()
    def collect(self) -> dict[str, BatchStatistics]:
        """Return the statistics of each layer that ran exactly once since :meth:`arm`, and stop watching.

        Call it after the forward pass and before the optimizer step: γ and β are then the ones it used.
        """
        for name, samples in self._samples.items():
            if samples.count and name in self._before:
                self._passes[name].append(_Pass(samples.count, None))
        several = sum(len(passes) > 1 for passes in self._passes.values())
        if several:
            self.skipped["ran several times in one step"] += several
        once = {name: passes[0] for name, passes in self._passes.items() if len(passes) == 1}
        if self.divided and any(read.affine is None for read in once.values()):
            self.skipped["γ and β are divided over processes, and it runs under torch.compile"] += 1
            once = {name: read for name, read in once.items() if read.affine is not None}
        saved = {name: read.saved for name, read in once.items() if read.saved is not None}
        self._by_difference -= saved.keys()
        found = self._from_nodes(saved, {name: read.affine for name, read in once.items() if read.affine})
        for name, read in once.items():
            layer = self.layers[name]
            if name not in saved and (pair := self._from_difference(name, layer, read)) is not None:
                scale, shift = read.affine or (_copy(layer.weight), _copy(layer.bias))
                found[name] = BatchStatistics(scale, shift, *pair, layer.eps)
        self.disarm()
        return found

    def _from_nodes(
        self, saved: dict[str, tuple[Tensor, Tensor]], affine: dict[str, tuple[Tensor, Tensor]]
    ) -> dict[str, BatchStatistics]:
        """Read all layers in one go: an operation for each would cost more than what it does."""
        if not saved:
            return {}
        layers = [self.layers[name] for name in saved]
        channels = [layer.num_features for layer in layers]
        pairs = [affine.get(name, (layer.weight, layer.bias)) for name, layer in zip(saved, layers, strict=True)]
        parts = (*zip(*pairs, strict=True), *zip(*saved.values(), strict=True))
        scale, shift, mean, inverse_std = (_copy(torch.cat(list(part))) for part in parts)
        eps = torch.cat([mean.new_full((n,), layer.eps) for n, layer in zip(channels, layers, strict=True)])
        variance = (inverse_std.pow(-2) - eps).clamp_min(0)
        columns = (torch.split(column, channels) for column in (scale, shift, mean, variance))
        eps_of = [layer.eps for layer in layers]
        return {name: BatchStatistics(*row) for name, *row in zip(saved, *columns, eps_of, strict=True)}

    def disarm(self) -> None:
        """Forget what was read; in eager mode remove the hooks too."""
        if not self.compiled:
            for handle in self._handles:
                handle.remove()
            self._handles = []
        for passes in self._passes.values():
            passes.clear()
        for samples in self._samples.values():
            samples.count = 0
        self._before = {}

    def _from_difference(self, name: str, layer: _BatchNorm, read: _Pass) -> tuple[Tensor, Tensor] | None:
        """Return (mean, biased variance) of a layer from the change of its running statistics."""
        if name not in self._before:
            self._by_difference.add(name)  # from the next time on
            self.skipped["keeps no running statistics, and its autograd node cannot be read"] += 1
            return None
        mean, variance, count = self._before[name]
        new_mean, new_variance, new_count = (_copy(tensor) for tensor in _running(layer))
        momentum = layer.momentum if layer.momentum is not None else 1 / new_count
        # exactly one update, else the difference means nothing; NaN is dropped on its way to the loggers
        once = torch.where(new_count - count == 1, 1.0, torch.nan)
        unbiased = (new_variance - (1 - momentum) * variance) / momentum
        biased = unbiased * (read.samples - 1) / read.samples
        return once * (new_mean - (1 - momentum) * mean) / momentum, once * biased.clamp_min(0)


def _running(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    assert layer.running_mean is not None  # noqa: S101
    assert layer.running_var is not None  # noqa: S101
    assert layer.num_batches_tracked is not None  # noqa: S101
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(wide_dtype(tensor.device), copy=True)


def _note_samples(samples: _Samples, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Note the number of samples. Dynamo guards on whatever a hook reads, so it reads nothing that changes."""
    samples.count = args[0].numel() // args[0].shape[1]


def _note_pass(passes: list[_Pass], divided: bool, layer: _BatchNorm, args: tuple[Tensor, ...], output: Any) -> None:
    if not layer.training or not torch.is_grad_enabled():
        return
    saved = None if _saving_is_hooked() else _saved_statistics(layer, getattr(output, "grad_fn", None))
    affine = (_copy(layer.weight), _copy(layer.bias)) if divided else None
    passes.append(_Pass(args[0].numel() // args[0].shape[1], saved, affine))


def _saved_statistics(layer: nn.Module, node: Any) -> tuple[Tensor, Tensor] | None:
    """Return (mean, 1/std) from the layer's own node: the output's, or one up to three nodes behind (activations)."""
    for _ in range(4):
        if node is None:
            return None
        if node.name() in _NODES or node.name() == _SYNC_NODE:
            scale = node.next_functions[1][0]
            if scale is None or getattr(scale, "variable", None) is not layer.weight:
                return None  # another layer's: this one does something of its own
            sync = node.name() == _SYNC_NODE
            return node.saved_tensors[2:4] if sync else (node._saved_result1, node._saved_result2)
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return None


def _saving_is_hooked() -> bool:
    """Whether saved tensors go through hooks (activation checkpointing): reading one would recompute the forward."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None
