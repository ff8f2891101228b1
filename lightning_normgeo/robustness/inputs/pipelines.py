"""Normalizations in data pipelines and in models, however deep they are nested."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_MOST = 5000
"""Objects that are looked at: a pipeline has dozens."""
_DEEP = 12
_LONG = 64
"""Entries of a collection that are looked at: longer ones are data."""
_LEAVES = (str, bytes, int, float, complex, bool, type(None), Tensor, type, torch.dtype, torch.device)
_WRAPPED = ("dataset", "datasets", "base", "data", "subset")
"""Attributes that hold what another object is made from."""


class Normalization(NamedTuple):
    """(x - mean) / std per channel, and where it was found."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def pipeline_normalizations(loader: Any) -> Iterator[Normalization]:
    """Normalizations of a data loader, or of a collection of them; of each sequence the last comes first.

    Looked for in data sets, transforms and collate functions, through attributes, sequences, mappings, modules,
    ``functools.partial``, closures and bound methods. Known are the classes called ``…Normalize…`` with ``mean`` and
    ``std`` (torchvision, albumentations, kornia), MONAI's, image processors of transformers, and timm's loaders.
    Nothing of the project is called.
    """
    seen: set[int] = set()
    for thing in _walk(loader, seen, 0):
        found = _as_normalization(thing)
        if found is not None:
            yield found


def model_normalization(module: nn.Module | None) -> Normalization | None:
    """The normalization of its inputs that a model holds, if there is exactly one.

    Its attribute ``input_normalization`` comes first, then submodules called ``…Normaliz…``, then its own buffers or
    attributes ``mean`` and ``std`` (also ``pixel_mean`` and ``image_mean``).
    """
    if module is None:
        return None
    own = _numbers(getattr(module, "input_normalization", None), "mean", "std", "the model's input_normalization")
    if own is not None:
        return own
    inside = [found for child in module.modules() if (found := _as_normalization(child)) is not None]
    held = [
        found
        for child in module.modules()
        for prefix in ("", "pixel_", "image_", "input_")
        if not isinstance(child, nn.modules.batchnorm._NormBase)
        and (found := _numbers(child, f"{prefix}mean", f"{prefix}std", "the model")) is not None
    ]
    different = list(dict.fromkeys((found.mean, found.std) for found in inside or held))
    return Normalization(*different[0], "the model") if len(different) == 1 else None


def _walk(thing: Any, seen: set[int], depth: int) -> Iterator[Any]:
    if isinstance(thing, _LEAVES) or id(thing) in seen or depth > _DEEP or len(seen) > _MOST:
        return
    seen.add(id(thing))
    yield thing
    for part in _parts(thing):
        yield from _walk(part, seen, depth + 1)


def _parts(thing: Any) -> list[Any]:
    """The things that a thing is made of, the last first where they are in order."""
    if isinstance(thing, dict):  # no other mapping: some are data on a disk
        return list(islice(thing.values(), _LONG))
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(islice(thing, _LONG))[::-1]
    if isinstance(thing, functools.partial):
        return [*thing.args, *thing.keywords.values(), thing.func]
    if inspect.ismethod(thing):
        return [thing.__self__, thing.__func__]
    if inspect.isfunction(thing):
        closed = inspect.getclosurevars(thing).nonlocals if thing.__closure__ else {}
        return [*closed.values(), *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    if inspect.isbuiltin(thing) or inspect.ismodule(thing) or inspect.isclass(thing):
        return []
    held = vars(thing) if hasattr(thing, "__dict__") else {}
    held = {**{name: getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ()) or ()}, **held}
    return [held[name] for name in sorted(held, key=_rank)]


def _rank(name: str) -> int:
    """What a wrapper does itself comes before what it wraps, which was applied earlier."""
    return 0 if "transform" in name else 2 if name in _WRAPPED else 1


def _as_normalization(thing: Any) -> Normalization | None:
    """What an object does to images, where it is a known kind of normalization."""
    name = type(thing).__name__
    if name == "PrefetchLoader":  # timm's: images in 0…255, normalized on the GPU
        found = _numbers(thing, "mean", "std", name)
        if found is None:
            return None
        mean, std = (tuple(value / 255 for value in part) for part in (found.mean, found.std))
        return Normalization(_plain(mean), _plain(std), name)
    if getattr(thing, "do_normalize", False) is True:  # transformers'
        return _numbers(thing, "image_mean", "image_std", name)
    if "ormaliz" not in name:
        return None
    if getattr(thing, "normalization", "standard") != "standard":  # albumentations': mean and std have no part in it
        return None
    flags = getattr(thing, "flags", None)  # kornia's augmentations
    if isinstance(flags, Mapping) and "mean" in flags:
        return _numbers(_Flags(flags), "mean", "std", name)
    return _numbers(thing, "mean", "std", name) or _numbers(thing, "subtrahend", "divisor", name)


class _Flags:
    def __init__(self, flags: Mapping[str, Any]) -> None:
        self.mean, self.std = flags.get("mean"), flags.get("std")


def _numbers(thing: Any, mean: str, std: str, source: str) -> Normalization | None:
    """Two attributes as a normalization, where they are numbers that can be one."""
    if thing is None or isinstance(thing, nn.modules.batchnorm._NormBase):
        return None
    try:
        pair = [torch.as_tensor(getattr(thing, name)).detach().cpu().double().flatten() for name in (mean, std)]
    except Exception:  # whatever somebody's attributes are
        return None
    means, stds = (tuple(values.tolist()) for values in pair)
    if not means or not stds:
        return None
    if len(means) != len(stds):  # torchvision broadcasts one value
        means, stds = (one * (max(len(means), len(stds)) // len(one)) for one in (means, stds))
    usable = 0 < len(means) == len(stds) <= 4096 and all(map(math.isfinite, means)) and min(stds) > 0
    return Normalization(_plain(means), _plain(stds), source) if usable and max(stds) < math.inf else None


def _plain(values: tuple[float, ...]) -> tuple[float, ...]:
    """Float32 constants as they were written."""
    return tuple(float(f"{value:.7g}") for value in values)
