"""Batch statistics of batch normalizations, read off what each forward pass has computed anyway.

In eager mode the autograd node of a batch normalization keeps the mean and the inverse standard deviation; reading
them costs nothing. Under ``torch.compile`` and activation checkpointing the change of the running statistics gives the
same numbers to about 1e-6. Nothing is recomputed and no statistic is ever taken twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.normalization.names import clean_name
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics, ForwardPass, note_pass, widened


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
    """Reads the statistics of every forward pass between :meth:`arm` and :meth:`collect`.

    In eager mode hooks exist only while armed, so an unmeasured step costs nothing. Compiled modules are traced with
    their hooks once and for all, so there a hook that notes the number of samples stays. Where only running statistics
    can be read, a layer that ran several times since the last backward pass is left out and counted in ``skipped``.

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
        self._passes: dict[str, list[ForwardPass]] = {name: [] for name in layers}
        self._before: dict[str, tuple[Tensor, ...]] = {}
        self._by_difference = set(layers)
        self._samples = {name: _Samples() for name in layers if compiled}
        for name, samples in self._samples.items():
            self._handles.append(layers[name].register_forward_pre_hook(partial(_note_samples, samples)))

    def follow(self, layers: dict[str, _BatchNorm]) -> None:
        """Watch these layers from the next step on, in eager mode: others may have been added, or taken their place."""
        if self.compiled:
            return
        new = {name for name, layer in layers.items() if self.layers.get(name) is not layer}
        if new or layers.keys() != self.layers.keys():
            self.layers = layers
            self._passes = {name: self._passes.get(name, []) for name in layers}
            self._by_difference |= new
            self._by_difference &= layers.keys()

    def arm(self) -> None:
        """Watch the forward passes of another step."""
        self.disarm()
        self._remember()
        self.resume()

    def resume(self) -> None:
        """Go on watching after :meth:`pause`."""
        self.pause()
        for name, layer in self.layers.items():
            if layer.training and not self.compiled:
                note = partial(note_pass, self._passes[name], self.divided)
                self._handles.append(
                    layer.register_forward_hook(note, prepend=True)
                )  # before γ and β are divided again

    def pause(self) -> None:
        """Remove the hooks of eager mode and keep what was read."""
        if not self.compiled:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def detach(self) -> None:
        """Remove every hook, for good."""
        self.compiled = False
        self.disarm()

    @torch.no_grad()
    def close(self) -> None:
        """Read the forward passes since the last call, while γ and β are the ones that they used.

        Call it before each backward pass, which frees what forward passes have saved, and before the optimizer moves γ.
        """
        for name, samples in self._samples.items():
            if samples.count and name in self._before:
                self._passes[name].append(ForwardPass(samples.count))
            samples.count = 0
        fresh = {name: [one for one in passes if not one.closed] for name, passes in self._passes.items()}
        fresh = {name: passes for name, passes in fresh.items() if passes}
        if not fresh:
            return
        if self.divided and any(one.affine is None for passes in fresh.values() for one in passes):
            self.skipped["γ and β are divided over processes, and it runs under torch.compile"] += 1
        self._read_nodes([(name, one) for name, passes in fresh.items() for one in passes if one.saved is not None])
        for name, passes in fresh.items():
            if all(one.saved is None for one in passes):
                self._read_difference(name, passes)
            for one in passes:
                one.closed, one.saved = True, None
        self._remember()

    @torch.no_grad()
    def collect(self) -> dict[str, list[BatchStatistics]]:
        """Return the statistics of every pass that could be read since :meth:`arm`, and stop watching."""
        self.close()
        found = {
            name: [replace(one.statistics, gradient=one.gradient) for one in passes if one.statistics is not None]
            for name, passes in self._passes.items()
        }
        self.disarm()
        return {name: statistics for name, statistics in found.items() if statistics}

    def begin_gradients(self) -> None:
        """Forget ∂L/∂γ of earlier passes where γ has no gradient any more: the coming one does not hold them."""
        for name, passes in self._passes.items():
            if self.layers[name].weight.grad is None:
                for one in passes:
                    one.gradient = None

    def disarm(self) -> None:
        """Forget what was read; in eager mode remove the hooks too."""
        self.pause()
        for name in self._passes:
            self._passes[name] = []
        for samples in self._samples.values():
            samples.count = 0
        self._before = {}

    def _remember(self) -> None:
        """Keep the running statistics of the layers whose autograd nodes cannot be read."""
        self._before = {
            name: tuple(widened(tensor) for tensor in _running(layer))
            for name, layer in self.layers.items()
            if name in self._by_difference and layer.training
            if layer.track_running_stats and layer.running_mean is not None
        }

    def _read_nodes(self, read: list[tuple[str, ForwardPass]]) -> None:
        """Read all passes in one go: an operation for each would cost more than what it does."""
        read = [(name, one) for name, one in read if not (self.divided and one.affine is None)]
        self._by_difference -= {name for name, _ in read}
        if not read:
            return
        layers = [self.layers[name] for name, _ in read]
        channels = [layer.num_features for layer in layers]
        pairs = [one.affine or (layer.weight, layer.bias) for (_, one), layer in zip(read, layers, strict=True)]
        parts = (*zip(*pairs, strict=True), *zip(*(one.saved or () for _, one in read), strict=True))
        scale, shift, mean, inverse_std = (widened(torch.cat(list(part))) for part in parts)
        eps = torch.cat([mean.new_full((n,), layer.eps) for n, layer in zip(channels, layers, strict=True)])
        variance = (inverse_std.pow(-2) - eps).clamp_min(0)
        columns = zip(*(torch.split(column, channels) for column in (scale, shift, mean, variance)), strict=True)
        for (_, one), layer, row in zip(read, layers, columns, strict=True):
            gamma, beta, mu, squared = row
            one.statistics = BatchStatistics(gamma, beta, mu, squared, layer.eps, one.samples, one.place)

    def _read_difference(self, name: str, passes: list[ForwardPass]) -> None:
        """Read a pass off the change of the running statistics, where there was one pass."""
        if len(passes) > 1:
            self.skipped["ran several times in one step"] += 1
            return
        (one,), layer = passes, self.layers[name]
        if self.divided and one.affine is None:
            return
        pair = self._from_difference(name, layer, one)
        if pair is not None:
            scale, shift = one.affine or (widened(layer.weight), widened(layer.bias))
            one.statistics = BatchStatistics(scale, shift, *pair, layer.eps, one.samples, one.place)

    def _from_difference(self, name: str, layer: _BatchNorm, read: ForwardPass) -> tuple[Tensor, Tensor] | None:
        """Return (mean, biased variance) of a layer from the change of its running statistics."""
        self._by_difference.add(name)  # at the latest from the next time on
        if name not in self._before:
            self.skipped["keeps no running statistics, and its autograd node cannot be read"] += 1
            return None
        mean, variance, count = self._before[name]
        new_mean, new_variance, new_count = (widened(tensor) for tensor in _running(layer))
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


def _note_samples(samples: _Samples, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Note the number of samples. Dynamo guards on whatever a hook reads, so it reads nothing that changes."""
    if args:
        samples.count = args[0].numel() // args[0].shape[1]
