"""Safe loading of checkpoints: weights and plain values only, whatever the versions of torch and Lightning.

A checkpoint is a pickle, and a pickle can name any function to be called with any arguments. ``torch.load`` refuses
that with ``weights_only=True``; but Lightning's strategies do not pass it on everywhere (a whole file for FSDP, the
entries of a sharded folder, DeepSpeed, a URL), and ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` takes back what is the default.
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
"""Files of a sharded folder: where each tensor is, which torch reads with a plain ``pickle.load``, and what is not a
tensor of model or optimizer, which Lightning reads."""
_DESCRIPTIONS = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
)
"""Modules whose dataclasses and enumerations an index consists of."""
_VOCABULARY = (*_DESCRIPTIONS, "torch", "torch.serialization", "collections", "pathlib", "pathlib._local")


def check_checkpoint(path: str | os.PathLike[str] | None) -> None:
    """Refuse a checkpoint that holds more than weights and plain values, without running anything of it.

    Cost: a file is mapped into memory, its tensors are not read.

    Args:
        path: of a file, or of the folder that a sharded training saves. Nothing else is looked at: keywords such as
            ``best``, URLs, and what does not exist, are for whoever loads them.

    Raises:
        ConfigurationError: if it does, or cannot be read.
    """
    if path is None or not os.path.exists(path):  # noqa: PTH110 - pathlib's raises for URLs longer than a name may be
        return
    try:
        with _refusals(path), warnings.catch_warnings(action="ignore"):  # torch would warn and refuse
            _read(Path(path))
    except ConfigurationError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigurationError(f"The checkpoint {path} cannot be read ({reason}). Choose another one.") from error


def _read(place: Path) -> None:
    """Read what a file or a sharded folder holds beside tensors."""
    file, index = (place / _REST, place / _INDEX) if place.is_dir() else (place, None)
    if file.is_file():
        zipped = zipfile.is_zipfile(file)
        torch.load(file, map_location="meta" if zipped else "cpu", weights_only=True, mmap=zipped)
    if index is not None and index.is_file():
        with index.open("rb") as opened:
            _IndexUnpickler(opened).load()


def load_weights_only(strategy: Any) -> None:
    """Make a Trainer's strategy load weights only: all that the Trainer loads, it loads through its strategy.

    Args:
        strategy: changed in place.
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
    """Make ``torch.load`` load weights only, whatever it is asked for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _refusals(path: object) -> Iterator[None]:
    """Turn the pages of advice that torch gives, to load all the same, into one line."""
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
    """Reads the index of a sharded folder, which describes tensors and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Give out descriptions of tensors and of places in files only."""
        if (module, name) == ("builtins", "getattr"):  # some releases of Python 3.11 write entries of enumerations so
            return _entry
        if module in _VOCABULARY and "." not in name:
            value = super().find_class(module, name)
            if _describes(value, module):
                return value
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _entry(kind: Any, name: str) -> enum.Enum:
    """Return the entry of an enumeration, and nothing of anything else."""
    if not isinstance(kind, enum.EnumType):
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return kind[name]


def _describes(value: Any, module: str) -> bool:
    """Whether calling a value of a module makes no more than a description of a tensor or of a place."""
    if isinstance(value, type) and module in _DESCRIPTIONS:
        return dataclasses.is_dataclass(value) or issubclass(value, enum.Enum)
    known = value in (torch.Size, torch.serialization._get_layout, OrderedDict)
    return known or isinstance(value, torch.dtype) or (isinstance(value, type) and issubclass(value, PurePath))
