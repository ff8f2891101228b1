"""Title of a run: its network, normalization, data and optimizer, from the settings that its record holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.utilities.plain_text import plain_line

_LONGEST = 100
_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
_OPTIMIZER = {"lr": "lr", "momentum": "momentum", "weight_decay": "wd"}
"""Settings of an optimizer that a title names, with their names there."""


def run_title(record: Record) -> str:
    """Return a title such as "ResNet-101 · bn · CIFAR-10 · SGD lr 0.05, wd 0.0005"; empty if nothing is known."""
    parts = (_network(record), _norm(record), _data(record), _optimizer(record))
    title = plain_line(" · ".join(part for part in parts if part))
    return title if len(title) <= _LONGEST else f"{title[: _LONGEST - 1]}…"


def data_title(name: str, class_path: str) -> str:
    """Return the title of data: that of its name, or else the class of its data module; empty without either."""
    return _DATA.get(name, name) or class_path.rpartition(".")[2].removesuffix("DataModule")


def _network(record: Record) -> str:
    arch = _text(record.settings.get("arch"))
    return re.sub(r"^resnet(\d+)$", r"ResNet-\1", arch) or _text(record.observed.get("network"))


def _norm(record: Record) -> str:
    return _text(record.settings.get("norm"))


def _data(record: Record) -> str:
    configured = _mapping(_mapping(record.settings.get("config")).get("data"))
    given = {**configured, **_mapping(configured.get("init_args"))}
    return data_title(_text(given.get("name")), _text(given.get("class_path"))) or _text(record.observed.get("data"))


def _optimizer(record: Record) -> str:
    """Return the optimizer with the settings that it began with: a schedule changes the last learning rate."""
    configured = record.settings.get("optimizer")
    if isinstance(configured, Mapping):
        name, settings = _text(configured.get("class_path")), _mapping(configured.get("init_args"))
    else:
        seen = record.observed.get("optimizers")
        first = _mapping(seen[0]) if isinstance(seen, list) and seen else {}
        name, settings = _text(first.get("class")), _mapping(first.get("settings"))
    return " ".join(filter(None, (name.rpartition(".")[2], ", ".join(_settings(settings)))))


def _settings(settings: Mapping[str, Any]) -> Iterator[str]:
    known = {**settings, "lr": settings.get("initial_lr", settings.get("lr"))}
    for key, name in _OPTIMIZER.items():
        value = known.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            yield f"{name} {value:g}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
