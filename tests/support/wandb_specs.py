"""Specifications that W&B is sent for reports and views, with their random names replaced by numbers."""

from __future__ import annotations

import json
from typing import Any


def spec_of(view: Any) -> dict[str, Any]:
    """Return the specification sent by saving a report or a workspace, :func:`numbered`."""
    return numbered(json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)))


def numbered(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a specification whose random names are replaced by numbers, in order."""
    found: dict[str, Any] = _renamed(spec, {})
    return found


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(entry, names) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: names.setdefault(entry, f"id{len(names)}") if key in ("id", "__id__") and entry else _renamed(entry, names)
        for key, entry in value.items()
    }
