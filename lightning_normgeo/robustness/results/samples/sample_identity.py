"""Identity of samples by content, independent of a loader's order and of how samples are split over processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_normgeo.robustness.inputs.input_space import InputSpace
from lightning_normgeo.robustness.inputs.pixel_lattice import LEVELS, on_lattice

_NEXT = 0x9E3779B97F4A7C15
"""Difference of the keys of a sample and its next copy; odd, so that no two copies of a sample have the same key."""
KEYS = 2**63
"""Number of possible keys."""


def sample_keys(images: Tensor, labels: Tensor, inputs: InputSpace) -> list[int]:
    """Return a key in [0, 2^63) for each sample, a hash of its image and label only.

    For 8-bit images the levels are hashed, so that an image has the same key whether a data pipeline normalizes it or
    not. For other images the exact bits are hashed.

    Args:
        images: ``(batch, channels, …)``, as a loader yields them.
        labels: ``(batch,)`` class indices.
        inputs: how images relate to pixels.

    Cost: one transfer of the images to the host, and a hash of each (about 1 GB/s).
    """
    known = inputs.mean is not None or not inputs.normalized_data
    pixels = inputs.to_space(images.float(), "pixel") if known else images.float()
    lattice = on_lattice(pixels).tolist()
    levels = (pixels * LEVELS).round().clamp(0, LEVELS).to(torch.uint8).cpu().contiguous()
    exact = None if all(lattice) else images.detach().cpu().contiguous().view(torch.uint8)
    keys = []
    for k, (is_level, label) in enumerate(zip(lattice, labels.tolist(), strict=True)):
        content = levels[k] if is_level or exact is None else exact[k]
        digest = hashlib.blake2b(content.numpy().data, digest_size=8, salt=b"level" if is_level else b"exact")
        digest.update(f"{tuple(images.shape[1:])}{label}".encode())
        keys.append(int.from_bytes(digest.digest(), "big") % KEYS)
    return keys


def copy_key(key: int, copy: int) -> int:
    """Return the key of the ``copy``-th further sample with the same image and label."""
    return (key + copy * _NEXT) % KEYS


@dataclass(frozen=True)
class SampleOrder:
    """The order in which a loader yields samples, as far as it is known.

    Attributes:
        positions: positions in the data set of the samples that this process gets, in their order; None if they are
            not known.
        repeats: whether the loader may yield the same sample more than once.
    """

    positions: Sequence[int] | None = None
    repeats: bool = False


def order_of(loader: Any) -> SampleOrder:
    """Return the order of a loader, as far as it is known without drawing random numbers from its samplers."""
    data: Any = getattr(loader, "dataset", None)
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        # each worker may iterate over the whole stream
        return SampleOrder(repeats=getattr(loader, "num_workers", 0) > 1)
    batches = getattr(loader, "batch_sampler", None)
    if batches is not None and type(batches) is not BatchSampler:
        return SampleOrder(repeats=True)
    # a loader that was given a batch_sampler also has a sampler, which it does not use
    sampler = getattr(loader, "sampler", None) if batches is None else batches.sampler
    if batches is not None and hasattr(data, "__len__"):
        order: Sequence[int] | None = None
        if type(sampler) is SequentialSampler:
            order = range(len(sampler))
        elif type(sampler) is DistributedSampler:  # has its own generator, so that iterating it changes no random state
            order = list(sampler)
        if order is not None:
            dropped = len(order) % batches.batch_size if batches.drop_last else 0
            return SampleOrder(order[: len(order) - dropped])
    return SampleOrder(repeats=_may_repeat(sampler))


def _may_repeat(sampler: Any) -> bool:
    """Whether a sampler may yield the same position more than once."""
    if type(sampler) in (SequentialSampler, DistributedSampler):
        return False
    if type(sampler) is RandomSampler:
        return sampler.replacement or sampler.num_samples > len(sampler.data_source)
    if type(sampler) is SubsetRandomSampler:
        return len(set(sampler.indices)) < len(sampler.indices)
    return True


@dataclass
class SeenSamples:
    """The samples that a process has seen, each evaluated only once.

    Samples with the same image and label have the same result, so only the first is evaluated, but all of them count.
    Their number is that of their positions in the data set, if these are known; else that of their occurrences, if the
    loader does not repeat samples; else one.

    Attributes:
        order: the order of the loader.
        limit: largest number of samples that count; None for no limit.
        places: the places of the samples with a key: positions in the data set, or else numbers of arrival from 0.
        share: rank of this process and number of processes, if all of them get the same samples: each evaluates those
            whose key is its rank modulo that number. None to evaluate all.
        left: keys of the samples that were left to other processes.
    """

    order: SampleOrder = field(default_factory=SampleOrder)
    limit: int | None = None
    places: dict[int, list[int]] = field(default_factory=dict)
    share: tuple[int, int] | None = None
    left: set[int] = field(default_factory=set)
    _seen: int = 0
    _counted: int = 0

    def new(self, keys: Iterable[int]) -> list[bool]:
        """Register the next samples by their keys, and return for each of them whether it has to be evaluated."""
        return [self._is_new(key) for key in keys]

    def own(self, keys: Sequence[int], counted: list[bool]) -> list[bool]:
        """Return for each sample whether it has to be evaluated by this process, and note those left to others.

        Args:
            keys: keys of samples.
            counted: for each of them whether it has to be evaluated, see :meth:`new`.
        """
        if self.share is None:
            return counted
        rank, processes = self.share
        self.left.update(key for key, counts in zip(keys, counted, strict=True) if counts and key % processes != rank)
        return [counts and key % processes == rank for key, counts in zip(keys, counted, strict=True)]

    @property
    def full(self) -> bool:
        """Whether no further sample can count."""
        if self.limit is None:
            return False
        if self.order.positions:
            return self._seen >= self._last
        return self._counted >= self.limit

    @cached_property
    def _last(self) -> int:
        """The number of samples after which all those within the limit have come."""
        within = (k for k, place in enumerate(self.order.positions or ()) if place < (self.limit or 0))
        return max(within, default=-1) + 1

    def _is_new(self, key: int) -> bool:
        arrival, positions = self._seen, self.order.positions
        self._seen += 1
        places = self.places.get(key, [])
        if positions:
            # a loader that is iterated again, as the shorter one of several, starts over with its first position
            place = positions[arrival % len(positions)]
            is_repeated = place in places
            is_beyond_limit = self.limit is not None and place >= self.limit
        else:
            place = arrival
            is_repeated = bool(places) and self.order.repeats
            is_beyond_limit = self.limit is not None and self._counted >= self.limit
        if is_repeated or is_beyond_limit:
            return False
        self._counted += 1
        self.places.setdefault(key, []).append(place)
        return len(self.places[key]) == 1


def merged_places(
    parts: Sequence[Mapping[int, Sequence[int]]], positions_known: bool, limit: int | None = None
) -> dict[int, list[tuple[int, int]]]:
    """Return the samples of several processes, each once.

    If all positions in the data set are known, they tell samples apart. Else a key counts as often as in the process
    that saw it most often, since processes may all get the whole data set.

    Args:
        parts: for each process the places of its keys, see :class:`SeenSamples`.
        positions_known: whether these are positions in the data set.
        limit: largest number of samples that count, from the first. Default: all.

    Returns:
        For each key the (place, key of the copy) of its samples.
    """
    found: dict[int, list[int]] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        mine = [part[key] for part in parts if key in part]
        longest = max(mine, key=len)
        found[key] = sorted(set().union(*mine)) if positions_known else list(longest)
    ordered = sorted((place, key) for key, places in found.items() for place in places)[:limit]
    copies: dict[int, list[tuple[int, int]]] = {}
    for number, (place, key) in enumerate(ordered):
        mine_now = copies.setdefault(key, [])
        mine_now.append((place if positions_known else number, copy_key(key, len(mine_now))))
    return copies
