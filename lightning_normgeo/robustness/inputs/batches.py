"""Images and labels found in batches: pairs, dictionaries, named tuples, dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.normalization.user_inputs import as_tensor
from lightning_normgeo.robustness.inputs.advice import callback_name, override

IMAGE_NAMES = (
    "image", "images", "img", "imgs", "pixel_values", "x", "input", "inputs", "data", "pixels", "features",
    "signal", "audio", "waveform", "volume",
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "y", "target", "targets", "class", "classes", "class_id", "class_idx", "category")


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and labels found in a batch, unchanged except that numpy arrays become tensors.

    In a tuple or list the first images and the entry after them are taken; further entries are ignored. In a mapping,
    named tuple or dataclass they are found by their names (:data:`IMAGE_NAMES`, :data:`LABEL_NAMES`), or as the only
    entry of a fitting shape. Images are tensors with at least two dimensions, of floating point or unsigned bytes.

    Args:
        batch: as a loader yields it.

    Returns:
        Images ``(batch, …)`` and labels ``(batch,)`` or ``(batch, classes)``.

    Raises:
        UnsuitableError: if there are none, or several that could be meant.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 1:  # some pipelines yield a list with one dictionary
        return images_and_labels(batch[0])
    named = _named(batch)
    found = None
    if named is not None:
        found = _by_name(named)
    elif isinstance(batch, (tuple, list)):
        found = _by_place(batch)
    if found is None:
        advice = _advice(batch) or f"{override('unpack')} to return both."
        raise UnsuitableError(f"{callback_name()} expects batches (images, labels), got {described(batch)}. {advice}")
    return found


def _advice(batch: Any) -> str:
    """Return advice on common batches that hold no tensors of images and labels; empty for others."""
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(entry, (tuple, list)) for entry in batch):
        return _advice(batch[0])
    parts = list((_named(batch) or {}).values()) or (list(batch) if isinstance(batch, (tuple, list)) else [batch])
    if any(type(part).__module__.partition(".")[0] == "PIL" for part in parts):
        return "Turn pictures into tensors in the data set (torchvision.transforms.ToTensor), and batch it."
    is_sample = len(parts) > 1 and isinstance(parts[0], Tensor) and parts[0].ndim == 3 and _is_number(parts[1])
    if is_sample:
        return "It is a single sample: give DataLoader(dataset, batch_size=64) in place of the data set."
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, Tensor) and value.ndim == 0)


def unpacked(unpack: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and labels that a user's ``unpack`` finds in a batch, as plain tensors.

    Args:
        unpack: maps a batch to (images, labels), as tensors, arrays or, for labels, a list of numbers.
        batch: as a loader yields it.

    Raises:
        UnsuitableError: if it returns anything but two tensors.
    """
    found = unpack(batch)
    pair = [as_tensor(part) for part in found] if isinstance(found, (tuple, list)) else []
    if len(pair) == 2 and isinstance(pair[1], (list, tuple)):
        pair[1] = _as_labels(pair[1], len(pair[1]))
    if len(pair) != 2 or not all(isinstance(part, Tensor) and not part.is_meta for part in pair):
        raise UnsuitableError(f"unpack(batch) returned {described(found)}. Return two tensors: images, labels.")
    # subclasses of Tensor would carry their own behavior into every operation of an attack
    return pair[0].as_subclass(Tensor), pair[1].as_subclass(Tensor)


def described(value: Any, depth: int = 3) -> str:
    """Return the structure of a batch as a short text, as ``tuple(float32 (8, 3, 32, 32), int64 (8,))``."""
    value = as_tensor(value)
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    named = _named(value)
    if named is not None:
        parts = [f"{key}: {described(entry, depth - 1)}" for key, entry in islice(named.items(), 6)]
    elif isinstance(value, (tuple, list)) and depth:
        parts = [described(entry, depth - 1) for entry in value[:4]]
    else:
        return type(value).__name__
    if len(value if named is None else named) > len(parts):
        parts.append("…")
    return f"{type(value).__name__}({', '.join(parts)})"


def _named(batch: Any) -> Mapping[str, Any] | None:
    """Return the entries of a batch by name, or None if they have no names."""
    if isinstance(batch, Mapping):
        return {str(key): as_tensor(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, map(as_tensor, batch), strict=True))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: as_tensor(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    return None


def _by_name(entries: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the images and labels among named entries, or None unless there is one choice."""
    images = _only({key: value for key, value in entries.items() if _are_images(value)}, IMAGE_NAMES)
    if images is None:
        return None
    others = {key: value for key, value in entries.items() if value is not images}
    labels = {key: found for key, value in others.items() if (found := _as_labels(value, len(images))) is not None}
    chosen = _only(labels, LABEL_NAMES)
    return None if chosen is None else (images, chosen)


def _only(entries: Mapping[str, Tensor], names: Sequence[str]) -> Tensor | None:
    """Return the only entry with a known name, else the only entry, else None."""
    known = {key: value for key, value in entries.items() if key.lower() in names}
    chosen = list((known or entries).values())
    return chosen[0] if len(chosen) == 1 else None


def _by_place(batch: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Return the first images in a sequence and the labels directly after them, or None without these."""
    batch = [as_tensor(entry) for entry in batch]
    place = next((k for k, entry in enumerate(batch) if _are_images(entry)), None)
    if place is None or place + 1 == len(batch):
        return None
    images, behind = batch[place], batch[place + 1]
    if isinstance(behind, Mapping):
        found = {key: label for key, value in behind.items() if (label := _as_labels(value, len(images))) is not None}
        behind = _only(found, LABEL_NAMES)
    labels = _as_labels(behind, len(images))
    if labels is None:
        return None
    others = [_as_labels(entry, len(images)) for entry in batch[place + 2 :]]
    # a batch (images, sample numbers, labels): sample numbers are all different, and an entry after them is not
    if _differ(labels) and any(found is not None and found.ndim == 1 and not _differ(found) for found in others):
        return None
    return images, labels


def _differ(labels: Tensor) -> bool:
    """Whether there are more than three integers and no two of them are equal."""
    whole = labels.ndim == 1 and not labels.is_floating_point()
    return whole and len(labels) > 3 and len(set(labels.tolist())) == len(labels)


def _are_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and (value.is_floating_point() or value.dtype == torch.uint8)


def _as_labels(value: Any, count: int) -> Tensor | None:
    """Return one label (or one row of labels) for each image as a tensor; None for anything else."""
    value = as_tensor(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, (int, float)) for entry in value):
        value = torch.tensor(value)
    fits = isinstance(value, Tensor) and value.ndim in (1, 2) and len(value) == count and not value.is_complex()
    return value if fits else None
