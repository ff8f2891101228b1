"""Normalizations found in data pipelines and in models, at any depth."""

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
"""Largest number of objects that are searched; a data pipeline has dozens."""
_LONG = 64
"""Largest number of entries of a collection that are searched; longer collections are data."""
_LEAVES = (str, bytes, int, float, complex, bool, type(None), Tensor, type, torch.dtype, torch.device)
_WRAPPED = ("dataset", "datasets", "base", "data", "subset", "sampler", "batch_sampler")
"""Names of attributes that hold a wrapped data set, loader or sampler."""


class PixelNormalization(NamedTuple):
    """The normalization (x - mean) / std, with one value or one per channel, and its origin in words."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def pipeline_normalizations(loader: Any) -> Iterator[PixelNormalization]:
    """Yield the normalizations in a data loader or a collection of loaders, the last one of each sequence first.

    The search goes through data sets, transforms and collate functions: their attributes, sequences, dictionaries,
    modules, ``functools.partial`` objects, closures and bound methods. It recognizes classes called ``…Normalize…``
    with ``mean`` and ``std`` (torchvision, albumentations, kornia), those of MONAI, image processors of transformers,
    and the loaders of timm. None of the project's functions is called.
    """
    for thing in _walk(loader):
        found = _as_normalization(thing)
        if found is not None:
            yield found


def model_normalization(module: nn.Module | None) -> PixelNormalization | None:
    """Return the normalization of its inputs that a model holds, or None if it holds none or several.

    The search takes the attribute ``input_normalization``, else submodules whose class is called ``…Normaliz…``, else
    buffers or attributes ``mean`` and ``std`` (also with the prefixes ``pixel_``, ``image_`` and ``input_``).
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
    return PixelNormalization(*different[0], "the model") if len(different) == 1 else None


def _is_sequence(value: Any) -> bool:
    """Whether a value is a sequence or array: a single number ``mean`` may be something else, as in a noise layer."""
    return isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) > 0


def _walk(start: Any) -> Iterator[Any]:
    """Yield an object and everything that it contains, depth first, each object once."""
    seen: dict[int, Any] = {}  # keeps the objects alive: temporary ones, as bound methods, would share an id
    stack = [start]
    while stack and len(seen) <= _MOST:
        thing = stack.pop()
        if not isinstance(thing, _LEAVES) and id(thing) not in seen:
            seen[id(thing)] = thing
            yield thing
            stack += _parts(thing)[::-1]  # reversed, since the last entry of the stack is taken next


def _parts(thing: Any) -> list[Any]:
    """Return the objects that an object contains, the last one of a sequence first, since it is applied last."""
    if isinstance(thing, dict):  # no other mappings: some read data from a disk
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
    if isinstance(thing, nn.Module):  # as a list, so that the last submodule comes first
        held["_modules"] = list(thing._modules.values())
    return [held[name] for name in sorted(held, key=_rank)]


def _content(cell: Any) -> list[Any]:
    """Return the content of a closure's cell as a list, which is empty for a variable without a value yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _attributes(thing: Any) -> dict[str, Any]:
    """Return the attributes of an object: its own, those in slots, and class attributes; no property is computed."""
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
    except Exception:  # a class may define its own __dict__
        return found


def _slot(thing: Any, name: str) -> dict[str, Any]:
    try:
        return {name: getattr(thing, name)}
    except Exception:  # a slot without a value
        return {}


def _rank(name: str) -> int:
    """Return the place of an attribute in the search: a wrapper's transforms are applied after those it wraps."""
    if "transform" in name or name == "collate_fn":
        return 0
    if name in _WRAPPED:
        return 2
    return 1


def _as_normalization(thing: Any) -> PixelNormalization | None:
    """Return the normalization that an object applies to images, or None for an object of another kind."""
    name = type(thing).__name__
    if name == "PrefetchLoader":  # timm's loader normalizes images in 0…255 on the GPU, with constants for 0…255
        found = _numbers(thing, "mean", "std", name)
        if found is None:
            return None
        mean, std = (tuple(value / 255 for value in part) for part in (found.mean, found.std))
        return PixelNormalization(_plain(mean), _plain(std), name)
    if _attributes(thing).get("do_normalize") is True:  # an image processor of transformers
        return _numbers(thing, "image_mean", "image_std", name)
    if "ormaliz" not in name:
        return None
    held = _attributes(thing)
    if held.get("normalization", "standard") != "standard":  # albumentations: other modes do not use mean and std
        return None
    flags = held.get("flags")  # kornia's augmentations keep their constants there
    if isinstance(flags, Mapping) and "mean" in flags:
        return _numbers(_Flags(flags), "mean", "std", name)
    return _numbers(thing, "mean", "std", name) or _numbers(thing, "subtrahend", "divisor", name)


class _Flags:
    """The constants in the flags of a kornia augmentation, as attributes."""

    def __init__(self, flags: Mapping[str, Any]) -> None:
        self.mean, self.std = flags.get("mean"), flags.get("std")


def _numbers(thing: Any, mean: str, std: str, source: str) -> PixelNormalization | None:
    """Return two attributes as a normalization, or None if their values cannot be a mean and a standard deviation."""
    if thing is None or isinstance(thing, nn.modules.batchnorm._NormBase):
        return None
    try:
        pair = [torch.as_tensor(getattr(thing, name)).detach().cpu().double().flatten() for name in (mean, std)]
    except Exception:  # the attributes may be missing, or be anything
        return None
    means, stds = (tuple(values.tolist()) for values in pair)
    if not means or not stds:
        return None
    if len(means) != len(stds):  # torchvision accepts one value for all channels beside one per channel
        means, stds = (one * (max(len(means), len(stds)) // len(one)) for one in (means, stds))
    usable = 0 < len(means) == len(stds) <= 4096 and all(map(math.isfinite, means)) and min(stds) > 0
    return PixelNormalization(_plain(means), _plain(stds), source) if usable and max(stds) < math.inf else None


def _plain(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return float32 constants with the seven digits with which they were written."""
    return tuple(float(f"{value:.7g}") for value in values)
