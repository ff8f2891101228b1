"""Conversion of hyperparameters of any type to nested dictionaries, lists, texts and numbers, without loss."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

_DEEPEST = 40
"""Levels of nesting that are converted, in case an object contains itself."""


def as_nested(params: Any) -> dict[str, Any]:
    """Return hyperparameters as a nested dictionary.

    Mappings (``DictConfig`` among them), namespaces, dataclasses and pydantic's models become dictionaries, sequences
    and sets become lists. All other values stay unchanged, except that scalars of numpy and torch become numbers.

    Args:
        params: Hyperparameters as given to ``log_hyperparams``. None: an empty dictionary. A value without named
            fields is put under the key ``hyperparameters``.
    """
    found = {} if params is None else _nested(params, 0)
    return found if isinstance(found, dict) else {"hyperparameters": found}


def _nested(value: Any, depth: int) -> Any:
    if depth > _DEEPEST or isinstance(value, str | bytes | type):
        return value
    fields = _fields(value)
    if fields is not None:
        found: dict[str, Any] = {}
        for key, entry in fields.items():
            found[_key(key, found)] = _nested(entry, depth + 1)
        return found
    if isinstance(value, set | frozenset):  # sorted, because the order of a set differs between processes
        return [_nested(entry, depth + 1) for entry in sorted(value, key=lambda entry: (str(type(entry)), str(entry)))]
    if isinstance(value, Sequence):
        return [_nested(entry, depth + 1) for entry in value]
    return value.item() if _is_scalar(value) else value


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """Return the named fields of a value, or None if it has none."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Namespace | SimpleNamespace):
        return vars(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if hasattr(type(value), "model_fields") and hasattr(value, "model_dump"):  # pydantic
        return {name: getattr(value, name, None) for name in type(value).model_fields}
    return None


def _key(key: Any, taken: Mapping[str, Any]) -> str:
    """Return a key as a text that is not taken: the keys 1 and "1" stay two."""
    text = str(key)
    if text in taken:
        text = f"{text} ({type(key).__name__})"
    number = 2
    while text in taken:
        text = f"{key} ({number})"
        number += 1
    return text


def _is_scalar(value: Any) -> bool:
    """Whether a value is a scalar of numpy or torch that has a value, which tensors on torch's meta device lack."""
    return getattr(value, "shape", None) == () and hasattr(value, "item") and not getattr(value, "is_meta", False)
