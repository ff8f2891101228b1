"""Safe loading of checkpoints: weights and plain values only, with every version of torch and Lightning.

A checkpoint is a pickle, and a pickle can call any function with any arguments. ``torch.load`` refuses that with
``weights_only=True``; but Lightning's strategies do not pass this argument on everywhere (a single file for FSDP, the
entries of a sharded folder, DeepSpeed, a URL), and ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` overrides it where it is the
default.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch

from lightning_normgeo.errors import ConfigurationError

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_INDEX, _REST = ".metadata", "meta.pt"
"""Files of a sharded folder: the index with the place of each tensor, which torch reads with a plain ``pickle.load``,
and everything that is not a tensor of model or optimizer, which Lightning reads."""
_DESCRIPTIONS = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
)
"""Modules that define the dataclasses and enumerations of an index."""
_VOCABULARY = (*_DESCRIPTIONS, "torch", "torch.serialization", "collections", "pathlib", "pathlib._local")


def check_checkpoint(path: str | os.PathLike[str] | None) -> None:
    """Refuse a checkpoint that holds more than weights and plain values, without running any of its code.

    Cost: the file is mapped into memory; its tensors are not read.

    Args:
        path: path of a file, or of the folder that a sharded training saves. Keywords such as ``best``, URLs and paths
            that do not exist are not checked here but left to the code that loads them.

    Raises:
        ConfigurationError: if the checkpoint holds anything else, or cannot be read.
    """
    if path is None or not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for URLs that are too long for a file name
        return
    try:
        with _refusals(path), warnings.catch_warnings(action="ignore"):  # torch warns before it refuses
            _read(Path(path))
    except ConfigurationError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigurationError(f"The checkpoint {path} cannot be read ({reason}). Choose another one.") from error


def _read(place: Path) -> None:
    """Unpickle a checkpoint safely without its tensors, to find out whether it is refused."""
    file, index = (place / _REST, place / _INDEX) if place.is_dir() else (place, None)
    if file.is_file():
        zipped = zipfile.is_zipfile(file)
        torch.load(file, map_location="meta" if zipped else "cpu", weights_only=True, mmap=zipped)
    if index is not None and index.is_file():
        with index.open("rb") as opened:
            _IndexUnpickler(opened).load()


def load_weights_only(strategy: Any) -> None:
    """Make a Trainer's strategy load weights and plain values only.

    The Trainer loads every checkpoint through its strategy.

    Args:
        strategy: strategy of the Trainer, changed in place.
    """
    load = strategy.load_checkpoint

    @functools.wraps(load)
    def load_checked(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        check_checkpoint(checkpoint_path)
        with _forced(), _refusals(checkpoint_path):
            return load(checkpoint_path, *args, **kwargs)

    strategy.load_checkpoint = load_checked


@contextmanager
def _forced() -> Iterator[None]:
    """Context in which ``torch.load`` loads weights only, whatever its arguments say."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _refusals(path: object) -> Iterator[None]:
    """Context that turns torch's long refusal, which advises to load the file anyway, into a ConfigurationError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"names {found[1]}" if found else "is no plain checkpoint"
        raise ConfigurationError(
            f"The checkpoint {path} {what} and is not loaded: it could run any code. Only weights and plain values are "
            "loaded, whatever --weights_only says. If you trust its author, read it in Python with "
            "torch.load(…, weights_only=False) and save its weights anew."
        ) from error


class _IndexUnpickler(pickle.Unpickler):
    """Reader of the index of a sharded folder that allows nothing but descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function by name if it only describes tensors and places in files; refuse all others."""
        if (module, name) == ("builtins", "getattr"):  # in some releases of Python 3.11 for members of enumerations
            return _entry
        if module in _VOCABULARY and "." not in name:
            value = super().find_class(module, name)
            if _describes(value, module):
                return value
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _entry(kind: Any, name: str) -> enum.Enum:
    """Return the member of an enumeration by name: a ``getattr`` that works for enumerations only."""
    if not isinstance(kind, enum.EnumType):
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return kind[name]


def _describes(value: Any, module: str) -> bool:
    """Whether calling a value only creates a description of a tensor or of a place in a file."""
    if isinstance(value, type) and module in _DESCRIPTIONS:
        return dataclasses.is_dataclass(value) or issubclass(value, enum.Enum)
    known = value in (torch.Size, torch.serialization._get_layout, OrderedDict)
    return known or isinstance(value, torch.dtype) or (isinstance(value, type) and issubclass(value, PurePath))
