"""Hyperparameters of runs: nested as they were logged, and flat for comparing and showing them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_normgeo.utilities.plain_text import plain

MISSING = "–"
"""The text of a setting that a run does not have."""
_CONFIG = "config"
"""The hyperparameter with the command line's whole configuration; users may have one of the same name."""
_OWN = ("trainer", "test_after_fit")
"""Keys by which a configuration of this command line is recognized."""
_NOT_COMPARED = ("run", "ckpt_path", "config", "wandb", "trainer.logger", "trainer.default_root_dir", "model.optimizer")
"""Settings of the command line that only say where a run is written, or that occur a second time elsewhere."""
_LOGGED_AGAIN = ("", "model.", "data.init_args.")
"""Prefixes of the settings in a configuration that models and data modules log a second time as hyperparameters."""
_NAME_OF_RUN = "wandb.id"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")
"""The address in the text of a function or an object, which differs between processes."""
_DEEPEST = 40
"""Levels of nesting that become dotted names; deeper values are texts."""
_LARGEST_WHOLE = 2**53
"""Floating-point numbers from here on are written as such, 1e+30, not with digits that they do not have."""
_EMPTY = "{}"
"""The text of an empty group of settings."""


def settings_of(logged: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return all settings of a run by dotted name, and those of them by which runs are compared.

    The configuration of the command line gets no prefix. What its model and data log a second time is left out unless
    the values differ. All other hyperparameters count in full, also a user's own called ``config``.

    Args:
        logged: Everything passed to ``log_hyperparams``.
    """
    if not has_own_config(logged):
        found = _without_name(flat(logged))
        return found, found
    own = flat(logged[_CONFIG])
    more = _without_name(flat({name: value for name, value in logged.items() if name != _CONFIG}))
    added = {
        name if name not in own else f"{name} (logged)": value
        for name, value in more.items()
        if all(own.get(f"{place}{name}") != value for place in _LOGGED_AGAIN)
    }
    compared = {name: value for name, value in own.items() if not _left_out(name)}
    return {**own, **added}, {**compared, **added}


def has_own_config(logged: Mapping[str, Any]) -> bool:
    """Whether the hyperparameter ``config`` is the configuration of this package's command line."""
    config = logged.get(_CONFIG)
    return isinstance(config, Mapping) and all(name in config for name in _OWN)


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Return nested settings as short texts by dotted name, without those that are None.

    Different settings get different names: ``{"a.b": 1, "a": {"b": 2}}`` becomes ``a.b`` and ``a.b (2)``. Equal values
    get equal texts: numbers whether they were written as 1 or 1.0, and functions wherever they are in memory.

    Args:
        values: Nested settings.
        prefix: Dotted name of the settings themselves.
    """
    leaves: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for path, text in _leaves(values, (prefix,) if prefix else ()):
        leaves.setdefault(plain(".".join(path)), []).append((path, text))
    found: dict[str, str] = {}
    for name, same in leaves.items():
        for k, (_, text) in enumerate(sorted(same)):
            found[_free(name, k, {*found, *leaves} if k else found)] = text
    return found


def without_empty(values: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of settings without redundant empty groups.

    A setting that is an empty group in some runs, and a group of settings in the others, is redundant if the settings
    within the group already tell all runs apart that it does.

    Args:
        values: For each setting its values in all runs.
    """
    names = list(values)
    for name in values:
        others = [other for other in names if other != name]
        is_group = any(other.startswith(f"{name}.") for other in others)
        is_empty = set(values[name]) <= {_EMPTY, MISSING}
        if is_group and is_empty and _distinct_runs(values, others) == _distinct_runs(values, names):
            names = others
    return names


def number_of(value: str) -> float | None:
    """Return the number that the text of a setting stands for, or None if it is not a number."""
    try:
        return float(value)
    except ValueError:
        return None


def _distinct_runs(values: Mapping[str, Sequence[str]], names: Sequence[str]) -> int:
    """Return the number of different runs, as told by some of their settings."""
    return len(set(zip(*(values[name] for name in names), strict=True)))


def _leaves(values: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path and text of each innermost value of nested settings, without None."""
    inside: Mapping[Any, Any] = {}
    if len(path) < _DEEPEST:
        if isinstance(values, Mapping):
            inside = values
        elif _is_sequence(values) and any(isinstance(value, Mapping) for value in values):
            inside = dict(enumerate(values))
    for key, value in inside.items():
        yield from _leaves(value, (*path, str(key)))
    if not inside and values is not None and path:
        yield path, _text(values)


def _text(value: Any) -> str:
    """Return the text of a value; strings that cannot be shown safely or look like a missing value are quoted."""
    value = _settled(value)
    if not isinstance(value, str):
        return json.dumps(value, default=str, ensure_ascii=False)
    return value if plain(value) == value and value != MISSING else json.dumps(value)


def _settled(value: Any, depth: int = 0) -> Any:
    """Return a value without irrelevant differences: the notation of numbers, and the addresses of objects."""
    if isinstance(value, Mapping) and depth < _DEEPEST:
        return {str(key): _settled(entry, depth + 1) for key, entry in value.items()}
    if _is_sequence(value) and depth < _DEEPEST:
        return [_settled(entry, depth + 1) for entry in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_WHOLE:
        return int(value)  # W&B returns whole numbers as int
    if value is None or isinstance(value, int | float):
        return value
    return _ADDRESS.sub("", str(value))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _free(name: str, taken: int, names: Any) -> str:
    """Return a name, or the first one with a number after it, from ``taken + 1`` on, that is not among ``names``."""
    number = taken + 1
    while name in names:
        name = f"{name.removesuffix(f' ({number - 1})')} ({number})"
        number += 1
    return name


def _without_name(found: dict[str, str]) -> dict[str, str]:
    """Return settings without W&B's id of the run."""
    return {name: value for name, value in found.items() if name != _NAME_OF_RUN}


def _left_out(setting: str) -> bool:
    return any(setting == name or setting.startswith(f"{name}.") for name in _NOT_COMPARED)
