"""Labels of runs: short names that tell them apart, made from the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_normgeo.report.run_settings import MISSING, number_of
from lightning_normgeo.report.setting_roles import (
    are_seeds,
    elided,
    is_norm,
    is_seed,
    is_weight_decay,
    label,
    short,
    titles,
)
from lightning_normgeo.utilities.plain_text import plain

LONGEST = 48
"""Characters of the longest label of a kind of runs, for which legends of figures have room."""
_LONGEST_FOLDER = 40
_MOST_SETTINGS = 3
"""Settings that a label can name; runs that only more of them tell apart are named by their folders."""

Differing = Mapping[str, str]
"""Values of the settings that are not the same in all runs, by dotted name."""


class Labels:
    """Labels of several runs. Two runs are of the same kind if all their settings except seeds are equal.

    If all differing settings would make a label too long, labels name only those needed to tell the kinds apart; the
    table of settings has all of them. Runs that differ in many settings at once are named by their folders.

    Args:
        runs: The differing settings of each run, in the same order of settings.
        folders: Folders of the runs.

    Attributes:
        seeds: Names of the settings that are seeds.
        named: Names of the settings that the labels in ``series`` name.
        panels: For each run the label of its normalization.
        series: For each run the label of its other settings without seeds, different for different kinds of a panel.
        repeats: For each run the label of its seeds.
    """

    def __init__(self, runs: Sequence[Differing], folders: Sequence[Path]) -> None:
        names = list(runs[0]) if runs else []
        values = {name: [run[name] for run in runs] for name in names}
        self.seeds = [name for name in names if is_seed(name) and are_seeds(values[name])]
        self._norms = [n for n in names if is_norm(n) and n not in self.seeds and not any(map(_is_plain, values[n]))]
        others = [name for name in names if name not in self.seeds and name not in self._norms]
        self._titles = titles(names)
        self.named = others
        if any(len(self._series(run)) > LONGEST for run in runs):
            self.named = _telling(runs, self._norms, others)
        kinds = [tuple(run[name] for name in names if name not in self.seeds) for run in runs]
        panels = [tuple(run[name] for name in self._norms) for run in runs]
        self.panels = _unique([self._panel(run) for run in runs], panels)
        if len(self.named) > _MOST_SETTINGS and len(set(kinds)) == len(runs):
            self.named = []
            series = told_apart([""] * len(runs), [""] * len(runs), folders)
        else:
            series = [elided(self._series(run), LONGEST) for run in runs]
        self.series = _told_by(self.panels, series, kinds)
        self.repeats = [", ".join(self._seed(name, run[name]) for name in self.seeds) for run in runs]

    def _panel(self, run: Differing) -> str:
        known = [short(run[name]) for name in self._norms if run[name] != MISSING]
        return elided(" / ".join(known) or (MISSING if self._norms else ""), LONGEST)

    def _series(self, run: Differing) -> str:
        """Return the label of the other settings; a weight decay that a run lacks is omitted if it has another one."""
        decays = any(is_weight_decay(name) and run[name] != MISSING for name in self.named)
        shown = [n for n in self.named if not (decays and is_weight_decay(n) and run[n] == MISSING)]
        return ", ".join(label(name, run[name], self._titles[name]) for name in shown)

    def _seed(self, name: str, value: str) -> str:
        return f"seed {value}" if len(self.seeds) == 1 else f"{self._titles[name]} {value}"


def told_apart(names: Sequence[str], repeats: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the labels of repetitions, with the end of the folder's path added where runs have the same name.

    Args:
        names: Names of the runs, which end in ``repeats``.
        repeats: Labels that tell each run from the others of its kind.
        folders: Folders of the runs.
    """
    alike: dict[str, list[str]] = {}
    places = [folder.resolve().as_posix() for folder in folders]
    for name, place in zip(names, places, strict=True):
        alike.setdefault(name, []).append(place)
    return [
        repeat if len(alike[name]) == 1 else ", ".join(filter(None, (repeat, _end(place, alike[name]))))
        for name, repeat, place in zip(names, repeats, places, strict=True)
    ]


def numbered(labels: Sequence[str]) -> list[str]:
    """Return labels with a number after each that is not the first of its text."""
    return _unique(labels, list(range(len(labels))))


def _is_plain(value: str) -> bool:
    """Whether a value is a number or a truth value, which means nothing without the name of its setting."""
    return number_of(value) is not None or value in ("true", "false")


def _telling(runs: Sequence[Differing], norms: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return a few settings that, together with the normalization, tell apart all kinds of runs; chosen greedily."""
    order = sorted(others, key=lambda name: (not is_weight_decay(name), max(len(run[name]) for run in runs) > 24))

    def kinds(names: Sequence[str]) -> int:
        """Return the number of different runs, as told by the normalization and some settings."""
        return len({tuple(run[name] for name in (*norms, *names)) for run in runs})

    chosen: list[str] = []
    wanted = kinds(others)
    while kinds(chosen) < wanted:
        chosen.append(max((name for name in order if name not in chosen), key=lambda name: kinds([*chosen, name])))
    return [name for name in others if name in chosen]


def _told_by(panels: Sequence[str], series: Sequence[str], kinds: Sequence[object]) -> list[str]:
    """Return the labels of series, with a number where the same panel and series belong to different kinds."""
    groups = _unique([f"{panel}\n{one}" for panel, one in zip(panels, series, strict=True)], kinds)
    return [group.partition("\n")[2].strip() for group in groups]


def _unique(labels: Sequence[str], keys: Sequence[object]) -> list[str]:
    """Return labels with numbers added so that they are equal only where the keys are."""
    known: dict[object, str] = {}
    taken: dict[str, int] = {}
    for text, key in zip(labels, keys, strict=True):
        if key in known:
            continue
        free = text
        while free in taken:
            taken[text] += 1
            free = f"{text} ({taken[text]})"
        known[key] = free
        taken[free] = 1
    return [known[key] for key in keys]


def _end(place: str, places: Sequence[str]) -> str:
    """Return the shortest end of a path that no other path has."""
    others, parts = set(places), place.split("/")
    ends = ("/".join(parts[-depth:]) for depth in range(1, len(parts) + 1))
    found = next((end for end in ends if sum(f"/{other}".endswith(f"/{end}") for other in others) == 1), place)
    return elided(plain(found), _LONGEST_FOLDER)
