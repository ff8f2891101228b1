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
_LONG = 64
"""Entries of a collection that are looked at: longer ones are data."""
_LEAVES = (str, bytes, int, float, complex, bool, type(None), Tensor, type, torch.dtype, torch.device)
_WRAPPED = ("dataset", "datasets", "base", "data", "subset", "sampler", "batch_sampler")
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
    for thing in _walk(loader):
        found = _as_normalization(thing)
        if found is not None:
            yield found


def model_normalization(module: nn.Module | None) -> Normalization | None:
    """The normalization of its inputs that a model holds, if there is exactly one.

    Its attribute ``input_normalization`` comes first, then submodules called ``…Normaliz…``, then buffers ``mean`` and
    ``std`` (also ``pixel_mean``, ``image_mean`` and ``input_mean``).
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
        if _is_sequence({**vars(child), **child._buffers, **child._parameters}.get(f"{prefix}mean"))
        and (found := _numbers(child, f"{prefix}mean", f"{prefix}std", "the model")) is not None
    ]
    different = list(dict.fromkeys((found.mean, found.std) for found in inside or held))
    return Normalization(*different[0], "the model") if len(different) == 1 else None


def _is_sequence(value: Any) -> bool:
    """Whether a value is more than a single number, which can be anything, as that of a layer that adds noise."""
    return isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) > 0


def _walk(start: Any) -> Iterator[Any]:
    """Everything that a thing is made of, depth first, each once."""
    seen: dict[int, Any] = {}  # holds what was made for being looked at, so that no id occurs twice
    ahead = [start]
    while ahead and len(seen) <= _MOST:
        thing = ahead.pop()
        if not isinstance(thing, _LEAVES) and id(thing) not in seen:
            seen[id(thing)] = thing
            yield thing
            ahead += _parts(thing)[::-1]


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
        closed = [value for cell in thing.__closure__ or () for value in _content(cell)]
        return [*closed, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    if inspect.isbuiltin(thing) or inspect.ismodule(thing) or inspect.isclass(thing):
        return []
    held = _attributes(thing)
    if isinstance(thing, nn.Module):  # in a row the last one comes first
        held["_modules"] = list(thing._modules.values())
    return [held[name] for name in sorted(held, key=_rank)]


def _content(cell: Any) -> list[Any]:
    """What a closure holds; nothing where that is yet to come."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _attributes(thing: Any) -> dict[str, Any]:
    """What an object holds itself, in slots, and in its classes; nothing is computed for being asked."""
    found: dict[str, Any] = {}
    for kind in reversed(type(thing).__mro__[:-1]):
        for name, value in vars(kind).items():
            if inspect.ismemberdescriptor(value):  # a slot
                found.update(_slot(thing, name))
            elif not (name.startswith("__") or inspect.isclass(value) or hasattr(type(value), "__get__")):
                # neither a method nor a property: shared by all instances
                found[name] = value
    try:
        return {**found, **vars(thing)}
    except Exception:  # whatever somebody's __dict__ is
        return found


def _slot(thing: Any, name: str) -> dict[str, Any]:
    try:
        return {name: getattr(thing, name)}
    except Exception:  # not set
        return {}


def _rank(name: str) -> int:
    """What a wrapper does itself comes before what it wraps, which was applied earlier."""
    return 0 if "transform" in name or name == "collate_fn" else 2 if name in _WRAPPED else 1


def _as_normalization(thing: Any) -> Normalization | None:
    """What an object does to images, where it is a known kind of normalization."""
    name = type(thing).__name__
    if name == "PrefetchLoader":  # timm's: images in 0…255, normalized on the GPU
        found = _numbers(thing, "mean", "std", name)
        if found is None:
            return None
        mean, std = (tuple(value / 255 for value in part) for part in (found.mean, found.std))
        return Normalization(_plain(mean), _plain(std), name)
    if _attributes(thing).get("do_normalize") is True:  # transformers'
        return _numbers(thing, "image_mean", "image_std", name)
    if "ormaliz" not in name:
        return None
    held = _attributes(thing)
    if held.get("normalization", "standard") != "standard":  # albumentations': mean and std have no part in it
        return None
    flags = held.get("flags")  # kornia's augmentations
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
