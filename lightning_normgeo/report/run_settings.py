"""Hyperparameters of runs: nested as they were logged, and flat as they are compared and shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_normgeo.utilities.plain_text import plain

MISSING = "–"
_CONFIG = "config"
"""The hyperparameter that the command line logs its whole configuration as. Users have hyperparameters of that name."""
_OWN = ("trainer", "test_after_fit")
"""Keys that a configuration of the command line has and no other."""
_NOT_COMPARED = ("run", "ckpt_path", "config", "wandb", "trainer.logger", "trainer.default_root_dir", "model.optimizer")
"""Settings of the command line that are the place of a run, or said elsewhere."""
_LOGGED_AGAIN = ("", "model.", "data.init_args.")
"""Where a configuration has what models and data log of themselves."""
_NAME_OF_RUN = "wandb.id"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")
"""The part of a function's or object's text that differs from process to process."""
_DEEPEST = 40
_EMPTY = "{}"


def settings_of(logged: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return all settings of a run by dotted name, and those of them that runs are compared by.

    The configuration of the command line has no prefix, and what its model and data log beside it, unless it differs,
    is not repeated. Whatever else was logged, also a hyperparameter of one's own called ``config``, counts in full.

    Args:
        logged: everything passed to ``log_hyperparams``.
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
    """Return nested settings as dotted names and short texts, without those that are None.

    Different settings have different names, also ``{"a.b": 1, "a": {"b": 2}}``, which get ``a.b`` and ``a.b (2)``.
    Numbers are the same whether they were written as 1 or 1.0, and functions wherever they were in memory.
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
    """Return the names of settings without groups that some runs leave empty, where what others have in them says it.

    Args:
        values: of each setting in all runs.
    """
    names = list(values)
    for name in values:
        others = [other for other in names if other != name]
        if set(values[name]) <= {_EMPTY, MISSING} and any(other.startswith(f"{name}.") for other in others):
            same = [len(set(zip(*(values[other] for other in chosen), strict=True))) for chosen in (names, others)]
            names = others if same[0] == same[1] else names
    return names


def number_of(value: str) -> float | None:
    """Return the number that a setting's text is, or None."""
    try:
        return float(value)
    except ValueError:
        return None


def _leaves(values: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path and text of everything within nested settings that holds nothing more."""
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
    """Return a value as it is shown. Texts that cannot be shown as they are, or would look like none, are quoted."""
    value = _settled(value)
    if not isinstance(value, str):
        return json.dumps(value, default=str, ensure_ascii=False)
    return value if plain(value) == value and value != MISSING else json.dumps(value)


def _settled(value: Any, depth: int = 0) -> Any:
    """Return a value without what says nothing of it: how a number is written, and where in memory an object is."""
    if isinstance(value, Mapping) and depth < _DEEPEST:
        return {str(key): _settled(entry, depth + 1) for key, entry in value.items()}
    if _is_sequence(value) and depth < _DEEPEST:
        return [_settled(entry, depth + 1) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # as W&B gives it back
    if value is None or isinstance(value, int | float):
        return value
    return _ADDRESS.sub("", str(value))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _free(name: str, taken: int, names: Any) -> str:
    """Return the name, or the next with a number that nothing else has."""
    number = taken + 1
    while name in names:
        name, number = f"{name.removesuffix(f' ({number - 1})')} ({number})", number + 1
    return name


def _without_name(found: dict[str, str]) -> dict[str, str]:
    """Leave out what W&B calls the run."""
    return {name: value for name, value in found.items() if name != _NAME_OF_RUN}


def _left_out(setting: str) -> bool:
    return any(setting == name or setting.startswith(f"{name}.") for name in _NOT_COMPARED)
