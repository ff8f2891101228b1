"""Tensors in the output of a model, whatever object it returns."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def tensors_in(output: Any) -> list[Tensor]:
    """Return all tensors in the output of a model, in order.

    They are found in containers that torch knows (``torch.utils._pytree``), and in mappings, sequences, dataclasses,
    namespaces and classes of attrs, nested in any way. Of any other object the attributes are read only if it is the
    whole output: inside an output, such an object may be a cache, which is no result.

    Args:
        output: as the model returns it.
    """
    found = list(_tensors(output, {}))
    if not found and not isinstance(output, (nn.Module, type)):
        found = list(_tensors(list(getattr(output, "__dict__", {}).values()), {}))
    return found


def _tensors(value: Any, opened: dict[int, Any]) -> Iterator[Tensor]:
    """Yield the tensors in a value.

    Args:
        value: any object.
        opened: records by id that were opened before, since one may contain itself; new ones are added.
    """
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in opened:
            opened[id(leaf)] = leaf
            yield from _tensors(_entries(leaf), opened)


def _entries(record: Any) -> list[Any]:
    """Return the entries of a record that torch does not open; none for other values."""
    if isinstance(record, Mapping):
        return list(record.values())
    if isinstance(record, (list, tuple)):
        return list(record)
    if isinstance(record, (SimpleNamespace, argparse.Namespace)):
        return list(vars(record).values())
    if isinstance(record, type):
        return []
    fields = dataclasses.fields(record) if dataclasses.is_dataclass(record) else ()
    names = [field.name for field in (*fields, *getattr(record, "__attrs_attrs__", ()))]
    return [getattr(record, name, None) for name in names]
