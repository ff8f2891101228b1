"""Roles of settings, recognized by their names in any project: seeds, normalizations, weight decay."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lightning_normgeo.report.run_settings import MISSING, number_of

_SEEDS = {
    "seed",
    "seed_everything",
    "random_state",
    "rng",
    *(f"{what}_seed" for what in ("base", "cuda", "data", "experiment", "global", "init", "initial", "main", "manual")),
    *(f"{what}_seed" for what in ("master", "model", "np", "numpy", "pl", "python", "random", "rng", "run", "shuffle")),
    *(f"{what}_seed" for what in ("split", "torch", "train", "training", "worker")),
}
"""Names of settings that seed random numbers. Others, such as ``seed_length``, are ordinary settings: runs that differ
in them are not repetitions of each other."""
_NORMS = {
    "norm",
    *(f"norm_{what}" for what in ("fn", "kind", "layer", "layers", "module", "name", "type")),
    "normalization",
    "normalization_layer",
    "normalization_type",
    "normalisation",
    "normalisation_layer",
    "normalisation_type",
}
_DECAYS = {"weight_decay", "weightdecay", "wd"}
_OF_A_CLASS = ("_target_", "class_path", "init_args", "kind", "name", "type")
"""Last parts of dotted names that are less informative than the part before them."""
_LONGEST_VALUE = 24
_CLASS = re.compile(r"<(?:class|function|built-in function) '?([\w.<>]+?)'?>|((?:[A-Za-z_]\w*\.)+[A-Z]\w*)")
"""A class or function as Python prints it, or the dotted path of a class."""


def is_seed(setting: str) -> bool:
    """Whether the name of a setting is that of a seed; its values have to be checked with :func:`are_seeds`."""
    parts = [_snake(part) for part in setting.split(".")]
    return _role(setting) in _SEEDS or any(part in ("seed", "seeds") for part in parts[-2:-1])


def are_seeds(values: Iterable[str]) -> bool:
    """Whether all values of a setting are whole numbers, as seeds are, or missing."""
    return all(value == MISSING or re.fullmatch(r"-?\d+", value) for value in values)


def is_norm(setting: str) -> bool:
    """Whether a setting is the choice of a normalization."""
    return _role(setting) in _NORMS


def is_weight_decay(setting: str) -> bool:
    """Whether a setting is the strength of weight decay."""
    return _role(setting) in _DECAYS


def label(setting: str, value: str, title: str | None = None) -> str:
    """Return the label of a setting with its value.

    Args:
        setting: Dotted name of the setting.
        value: Text of its value.
        title: Name of the setting in the label. Default: the last informative part of its dotted name.
    """
    if is_weight_decay(setting) and number_of(value) is not None:
        return f"weight decay {value}" if number_of(value) else "no weight decay"
    parts = setting.split(".")
    return f"{title or parts[_last(parts)]} {short(value)}"


def choice(setting: str, value: str) -> str:
    """Return the label of a setting with its value; of a normalization the value alone, which explains itself."""
    named = is_norm(setting) and number_of(value) is None and value not in ("true", "false")
    return short(value) if named else label(setting, value)


def choices(setting: str, values: Sequence[str]) -> dict[str, str]:
    """Return the label of each value of a setting; different values get different labels."""
    found = {value: choice(setting, value) for value in values}
    return found if len(set(found.values())) == len(found) else {value: f"{setting} {value}" for value in values}


def short(value: str) -> str:
    """Return a value as part of a label, at most 24 characters long; of classes and functions only the name."""
    match = _CLASS.fullmatch(value)
    return elided((match[1] or match[2]).rpartition(".")[2] if match else value, _LONGEST_VALUE)


def elided(text: str, most: int) -> str:
    """Return a text in one line of at most ``most`` characters; the middle is left out, as the ends say most."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    end = (most - 1) // 2
    return f"{line[: most - 1 - end].rstrip()}…{line[-end:].lstrip()}"


def titles(settings: Sequence[str]) -> dict[str, str]:
    """Return for each setting the shortest end of its dotted name that no other setting has."""
    occurrences = Counter(part for setting in settings for part in set(_stretches(setting.split("."))))
    found = {}
    for setting in settings:
        parts = setting.split(".")
        last = _last(parts)
        ends = [parts[last], *(".".join(parts[at:]) for at in range(last, -1, -1))]
        found[setting] = next((end for end in ends if occurrences[end] == 1), setting)
    return found


def _stretches(parts: Sequence[str]) -> Iterator[str]:
    """Yield all sequences of successive parts of a dotted name."""
    for first in range(len(parts)):
        for end in range(first + 1, len(parts) + 1):
            yield ".".join(parts[first:end])


def _role(setting: str) -> str:
    """Return the last informative part of a dotted name in snake case."""
    parts = setting.split(".")
    return _snake(parts[_last(parts)])


def _last(parts: Sequence[str]) -> int:
    """Return the index of the last informative part of a name."""
    places = [place for place, part in enumerate(parts) if part not in _OF_A_CLASS and not part.isdigit()]
    return places[-1] if places else len(parts) - 1


def _snake(name: str) -> str:
    return re.sub(r"[\s-]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).lower()
