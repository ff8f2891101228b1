"""Batch statistics of batch normalizations, taken from the values that each forward pass has computed anyway.

In eager mode the mean and the inverse standard deviation are read from the autograd node of the layer, which keeps them
for the backward pass. Under ``torch.compile`` and activation checkpointing they are derived from the change of the
running statistics: to about 1e-6 with a momentum of 0.1, and NaN where these are too coarse for 1e-3. No activation is
read and no statistic is computed again.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.columns import repeated
from lightning_normgeo.probes.batch_norm.autograd_node import held
from lightning_normgeo.probes.batch_norm.forward_pass import (
    BatchStatistics,
    ForwardPass,
    held_pair,
    note_pass,
    summed_gradients,
    widened,
)
from lightning_normgeo.probes.batch_norm.running_statistics import (
    Running,
    copied_running,
    keeps_running,
    statistics_of_change,
)

_PARAMETRIZED = "γ or β is computed by a parametrization, which can change with each access"
_NOTHING_TO_READ = "keeps no running statistics, and its autograd node cannot be read"
_NOT_COPIED = "its autograd node could no longer be read, and its running statistics were not copied before"
"""In one step only: from then on they are."""
_MIXED = "a pass without a graph was followed by others before a backward pass"
"""Each of them changes the running statistics, and only those with a graph have a node."""


class _Samples:
    """Number of values per channel in the last run of a compiled layer; compiled code only writes it."""

    count = 0


class BatchNormProbe:
    """Reads the statistics of every forward pass between :meth:`arm` and :meth:`collect`.

    In eager mode the hooks exist only while the probe is armed, so that other steps cost nothing. A compiled module is
    traced together with its hooks, and a change of hooks would compile it again. There one hook per layer, which
    records the number of samples, stays for the whole training.

    If only running statistics can be read, their change must come from a single forward pass. A layer that ran several
    times since the last backward pass is then left out and counted in ``skipped``.

    Args:
        layers: batch normalizations with γ and β, by module path.
        compiled: whether they run under ``torch.compile``.
        sharded: whether the model is sharded (``fully_shard``), so that γ and β are complete only during the forward
            pass.

    Attributes:
        skipped: number of measurements that were left out, by reason.
    """

    def __init__(self, layers: dict[str, _BatchNorm], compiled: bool = False, sharded: bool = False) -> None:
        self.layers = layers
        self.compiled = compiled
        self.sharded = sharded
        self.skipped: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []
        self._passes: dict[str, list[ForwardPass]] = {name: [] for name in layers}
        self._before: dict[str, Running] = {}
        self._by_difference = set(layers)
        self._without_node: set[str] = set()
        self._skipped_before: Counter[str] = Counter()
        self._gradients = True
        self._samples = {name: _Samples() for name in layers if compiled}
        for name, samples in self._samples.items():
            self._handles.append(layers[name].register_forward_pre_hook(partial(_note_samples, samples)))

    def follow(self, layers: dict[str, _BatchNorm]) -> None:
        """Observe these layers from the next step on, since the model may have new ones; in eager mode only."""
        if self.compiled:
            return
        new = {name for name, layer in layers.items() if self.layers.get(name) is not layer}
        if new or layers.keys() != self.layers.keys():
            self.layers = layers
            self._passes = {name: self._passes.get(name, []) for name in layers}
            self._by_difference |= new
            self._by_difference &= layers.keys()
            self._without_node &= layers.keys()

    def arm(self, gradients: bool = True) -> None:
        """Begin to observe the forward passes of a step; ``gradients`` tells whether to record ∂L/∂γ as well."""
        self.disarm()
        self._skipped_before = Counter(self.skipped)
        self._gradients = gradients
        self._remember()
        self.resume()

    def left_out(self) -> Counter[str]:
        """Return the number of measurements that were left out since :meth:`arm`, by reason."""
        return self.skipped - self._skipped_before

    def resume(self) -> None:
        """Observe forward passes again after :meth:`pause`."""
        self.pause()
        for name, layer in self.layers.items():
            if layer.training and not self.compiled:
                note = partial(note_pass, self._passes[name], self.sharded, self._gradients)
                # prepended, so that it runs before the hook of fully_shard that shards γ and β again
                self._handles.append(layer.register_forward_hook(note, prepend=True))

    def pause(self) -> None:
        """Remove the hooks of eager mode and keep the recorded passes."""
        if not self.compiled:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def trained(self) -> dict[str, int]:
        """Return the numbers of layers whose γ (``gamma``) and whose β (``beta``) are not frozen now."""
        found = {"gamma": 0, "beta": 0}
        for layer in self.layers.values():
            for name, attribute in (("gamma", "weight"), ("beta", "bias")):
                value = held(layer, attribute)
                found[name] += value is None or value.requires_grad  # computed ones have parameters of their own
        return found

    def detach(self) -> None:
        """Remove every hook permanently."""
        self.compiled = False
        self.disarm()

    @torch.no_grad()
    def close(self) -> None:
        """Read the forward passes since the last call.

        It has to be called before each backward pass, which frees the saved statistics, and before the optimizer
        changes γ and β.
        """
        for name, samples in self._samples.items():
            if samples.count and name in self._before:
                self._passes[name].append(ForwardPass(samples.count))
            samples.count = 0
        fresh = {name: [one for one in passes if not one.closed] for name, passes in self._passes.items()}
        fresh = {name: passes for name, passes in fresh.items() if passes}
        if not fresh:
            return
        known = self._held(fresh)
        self._read_nodes([(name, one) for name in known for one in fresh[name] if one.saved is not None], known)
        for name, affine in known.items():
            without_node = [one for one in fresh[name] if one.saved is None]
            if without_node and len(without_node) == len(fresh[name]):
                self._read_difference(name, fresh[name], affine)
            elif without_node:
                self.skipped[_MIXED] += 1
        for one in itertools.chain.from_iterable(fresh.values()):
            one.closed, one.saved = True, None
        self._remember()

    @torch.no_grad()
    def collect(self) -> dict[str, list[BatchStatistics]]:
        """Return the statistics of all passes that could be read since :meth:`arm`, by module path, and disarm.

        Layers without any are left out.
        """
        self.close()
        read = [
            (name, one, one.statistics)
            for name, passes in self._passes.items()
            for one in passes
            if one.statistics is not None
        ]
        gradients = summed_gradients([one for _, one, _ in read])
        # the others may have passes without a graph, as of frozen layers, also after those with one
        self._by_difference -= {name for name, passes in self._passes.items() if passes} - self._without_node
        self.disarm()
        found: dict[str, list[BatchStatistics]] = defaultdict(list)
        for (name, _, statistics), gradient in zip(read, gradients, strict=True):
            found[name].append(statistics._replace(gradient=gradient))
        return dict(found)

    def begin_gradients(self) -> None:
        """Discard ∂L/∂γ of earlier passes where γ.grad was reset, since the next gradient does not include them.

        A γ that is computed from a parameter, as by pruning, has none.
        """
        for name, passes in self._passes.items():
            gamma = held(self.layers[name], "weight")
            if gamma is None or not gamma.is_leaf or gamma.grad is None:
                for one in passes:
                    one.gradients = []

    def disarm(self) -> None:
        """Discard all recorded passes, and remove the hooks of eager mode."""
        self.pause()
        for name, passes in self._passes.items():
            for one in passes:  # hooks keep the passes as long as graphs live
                one.gradients = []
            self._passes[name] = []
        for samples in self._samples.values():
            samples.count = 0
        self._before = {}

    def _held(self, fresh: Mapping[str, list[ForwardPass]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return γ and β of the layers that can be read, by module path; the others are counted as left out."""
        pairs = {name: held_pair(self.layers[name]) for name in fresh}
        known = {name: pair for name, pair in pairs.items() if pair is not None}
        if len(known) < len(pairs):
            self.skipped[_PARAMETRIZED] += 1
            one = next(name for name in pairs if name not in known)
            warn_once(f"Batch statistics of {len(pairs) - len(known)} layers are left out: {_PARAMETRIZED} ({one}).")
        if self.sharded and any(one.affine is None for name in known for one in fresh[name]):
            self.skipped["γ and β are sharded over processes, and it runs under torch.compile"] += 1
        return known

    def _remember(self) -> None:
        """Copy the running statistics of the layers whose autograd nodes cannot be read."""
        self._before = {
            name: copied_running(layer)
            for name, layer in self.layers.items()
            if name in self._by_difference and layer.training and keeps_running(layer)
        }

    def _read_nodes(self, read: list[tuple[str, ForwardPass]], affine: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Read the saved statistics of all passes, concatenated: one operation for each would cost more to launch."""
        read = [(name, one) for name, one in read if not (self.sharded and one.affine is None)]
        if not read:
            return
        layers = [self.layers[name] for name, _ in read]
        channels = [layer.num_features for layer in layers]
        pairs = [one.affine or affine[name] for name, one in read]
        parts = (*zip(*pairs, strict=True), *zip(*(one.saved or () for _, one in read), strict=True))
        scale, shift, mean, inverse_std = (widened(torch.cat(list(part))) for part in parts)
        eps = repeated([layer.eps for layer in layers], channels, mean.device)
        variance = (inverse_std.pow(-2) - eps).clamp_min(0)
        columns = zip(*(torch.split(column, channels) for column in (scale, shift, mean, variance)), strict=True)
        for (_, one), layer, row in zip(read, layers, columns, strict=True):
            gamma, beta, mu, squared = row
            one.statistics = BatchStatistics(gamma, beta, mu, squared, layer.eps, one.samples, one.place)

    def _read_difference(self, name: str, passes: list[ForwardPass], affine: tuple[Tensor, Tensor]) -> None:
        """Derive the statistics of a pass from the change of the running statistics, if there was a single pass."""
        if len(passes) > 1:
            self.skipped["ran several times in one step"] += 1
            return
        (one,), layer = passes, self.layers[name]
        if self.sharded and one.affine is None:
            return
        self._without_node.add(name)
        self._by_difference.add(name)  # so that its running statistics are copied before the next pass
        if name not in self._before:
            self.skipped[_NOT_COPIED if keeps_running(layer) else _NOTHING_TO_READ] += 1
            return
        scale, shift = one.affine or map(widened, affine)
        mean, variance = statistics_of_change(layer, self._before[name], one.samples)
        one.statistics = BatchStatistics(scale, shift, mean, variance, layer.eps, one.samples, one.place)


def _note_samples(samples: _Samples, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Record the number of samples without reading anything that changes, for which Dynamo would recompile."""
    if args:
        samples.count = args[0].numel() // args[0].shape[1]
