"""The identity of samples: by content, whatever order a loader has and however it divides its samples."""

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
"""From a sample to its next copy: an odd number, so that copies of all samples stay apart."""
KEYS = 2**63


def sample_keys(images: Tensor, labels: Tensor, inputs: InputSpace) -> list[int]:
    """A number in [0, 2^63) for each sample, from its image and label alone.

    Of 8-bit images the levels count, so that an image has one key whether a data pipeline normalizes it or not. Of
    others the bits as they are.

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
    """The key of the n-th further sample with the same image and label."""
    return (key + copy * _NEXT) % KEYS


@dataclass(frozen=True)
class SampleOrder:
    """How far a loader's order is known.

    Attributes:
        positions: which sample of the data set each one is that this process sees, in order; None where only the loader
            knows.
        repeats: whether the loader may yield the same sample more than once.
    """

    positions: Sequence[int] | None = None
    repeats: bool = False


def order_of(loader: Any) -> SampleOrder:
    """The order of a loader, as far as it is known without asking its samplers for random numbers."""
    data: Any = getattr(loader, "dataset", None)
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        # each worker may go through the whole stream
        return SampleOrder(repeats=getattr(loader, "num_workers", 0) > 1)
    batches = getattr(loader, "batch_sampler", None)
    if batches is not None and type(batches) is not BatchSampler:
        return SampleOrder(repeats=True)
    # a loader that was given a BatchSampler has a sampler that it does not use
    sampler = getattr(loader, "sampler", None) if batches is None else batches.sampler
    if batches is not None and hasattr(data, "__len__"):
        order: Sequence[int] | None = None
        if type(sampler) is SequentialSampler:
            order = range(len(sampler))
        elif type(sampler) is DistributedSampler:  # draws from a generator of its own, seeded by its epoch
            order = list(sampler)
        if order is not None:
            dropped = len(order) % batches.batch_size if batches.drop_last else 0
            return SampleOrder(order[: len(order) - dropped])
    return SampleOrder(repeats=_may_repeat(sampler))


def _may_repeat(sampler: Any) -> bool:
    if type(sampler) in (SequentialSampler, DistributedSampler):
        return False
    if type(sampler) is RandomSampler:
        return sampler.replacement or sampler.num_samples > len(sampler.data_source)
    if type(sampler) is SubsetRandomSampler:
        return len(set(sampler.indices)) < len(sampler.indices)
    return True


@dataclass
class SeenSamples:
    """The samples that a process has seen, each once.

    Samples with the same image and label have the same result, and are evaluated once; how many there are is counted:
    by their positions in the data set where these are known, by their number where a loader does not repeat itself, and
    else as one.

    Attributes:
        order: of the loader.
        limit: how many samples count.
        places: for each key the positions of its samples, or the numbers of their arrival.
    """

    order: SampleOrder = field(default_factory=SampleOrder)
    limit: int | None = None
    places: dict[int, list[int]] = field(default_factory=dict)
    _seen: int = 0
    _counted: int = 0

    def new(self, keys: Iterable[int]) -> list[bool]:
        """Note the next samples, and return which of them are to be evaluated."""
        return [self._is_new(key) for key in keys]

    @property
    def full(self) -> bool:
        """Whether no further sample can count."""
        if self.limit is None:
            return False
        return self._counted >= self.limit if not self.order.positions else self._seen >= self._last

    @cached_property
    def _last(self) -> int:
        """How many samples come until those within the limit have all been there."""
        within = (k for k, place in enumerate(self.order.positions or ()) if place < (self.limit or 0))
        return max(within, default=-1) + 1

    def _is_new(self, key: int) -> bool:
        arrival, positions = self._seen, self.order.positions
        self._seen += 1
        known = bool(positions)
        place = positions[arrival % len(positions)] if positions else arrival  # a loader may begin again
        places = self.places.get(key, [])
        again = place in places if known else bool(places) and self.order.repeats
        beyond = self.limit is not None and (place if known else self._counted) >= self.limit
        if again or beyond:
            return False
        self._counted += 1
        self.places.setdefault(key, []).append(place)
        return len(self.places[key]) == 1


def merged_places(
    parts: Sequence[Mapping[int, Sequence[int]]], positions_known: bool, limit: int | None = None
) -> dict[int, list[tuple[int, int]]]:
    """The samples of several processes, each once.

    Where all positions are known, samples are told apart by them. Else a key counts as often as in the process that saw
    it most often: processes that all see the whole data set see the same samples.

    Args:
        parts: for each process the places of its keys.
        positions_known: whether these are positions in the data set.
        limit: how many samples count: the first ones.

    Returns:
        For each key the (place, key of the copy) of its samples.
    """
    found: dict[int, list[int]] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        mine = [part[key] for part in parts if key in part]
        longest = sorted(mine, key=lambda places: -len(places))[0]
        found[key] = sorted(set().union(*mine)) if positions_known else list(longest)
    ordered = sorted((place, key) for key, places in found.items() for place in places)[:limit]
    copies: dict[int, list[tuple[int, int]]] = {}
    for number, (place, key) in enumerate(ordered):
        mine_now = copies.setdefault(key, [])
        mine_now.append((place if positions_known else number, copy_key(key, len(mine_now))))
    return copies
