"""Hyperparameters of any kind as nested dictionaries, lists, texts and numbers, nothing in them lost."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

_DEEPEST = 40


def as_nested(params: Any) -> dict[str, Any]:
    """Return hyperparameters by name, and whatever they hold as far as it has names or an order.

    Mappings (``DictConfig`` among them), namespaces, dataclasses and pydantic's models become dictionaries, sequences
    and sets lists. What holds nothing more stays as it is.

    Args:
        params: as given to ``log_hyperparams``; None are no hyperparameters.
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
    if isinstance(value, set | frozenset):  # whose order is another one in each process
        return [_nested(entry, depth + 1) for entry in sorted(value, key=lambda entry: (str(type(entry)), str(entry)))]
    if isinstance(value, Sequence):
        return [_nested(entry, depth + 1) for entry in value]
    return value.item() if _is_scalar(value) else value


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """Return what has names within a value, or None."""
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
    """Return a key as text, another one than those before it: 1 and "1" are two."""
    text, number = str(key), 2
    if text in taken:
        text = f"{text} ({type(key).__name__})"
    while text in taken:
        text, number = f"{key} ({number})", number + 1
    return text


def _is_scalar(value: Any) -> bool:
    """Whether it is a single number of numpy or torch."""
    return getattr(value, "shape", None) == () and hasattr(value, "item") and not getattr(value, "is_meta", False)
