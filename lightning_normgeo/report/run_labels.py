"""What runs are called: short names that tell them apart, from the settings in which they differ."""

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
"""Characters of what tells a kind of runs from the others; legends of figures have about this room."""
_LONGEST_FOLDER = 40

Differing = Mapping[str, str]
"""The values of those settings that are not the same in all runs."""


class Labels:
    """Labels for several runs. Two runs are of one kind if all their settings but seeds are the same.

    Where all differing settings make names that are too long, only those are in them that are needed to tell the kinds
    apart; the table of settings has all.

    Args:
        runs: for each run the settings that differ, in the same order.

    Attributes:
        seeds: the settings that are seeds.
        named: the settings that labels name.
    """

    def __init__(self, runs: Sequence[Differing]) -> None:
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
        series = [elided(self._series(run), LONGEST) for run in runs]
        self.series = _told_by(self.panels, series, kinds)
        self.repeats = [", ".join(self._seed(name, run[name]) for name in self.seeds) for run in runs]

    def _panel(self, run: Differing) -> str:
        known = [short(run[name]) for name in self._norms if run[name] != MISSING]
        return elided(" / ".join(known) or (MISSING if self._norms else ""), LONGEST)

    def _series(self, run: Differing) -> str:
        """Return the other settings; one that a run lacks is left out where it has another of the same meaning."""
        decays = any(is_weight_decay(name) and run[name] != MISSING for name in self.named)
        shown = [n for n in self.named if not (decays and is_weight_decay(n) and run[n] == MISSING)]
        return ", ".join(label(name, run[name], self._titles[name]) for name in shown)

    def _seed(self, name: str, value: str) -> str:
        return f"seed {value}" if len(self.seeds) == 1 else f"{self._titles[name]} {value}"


def told_apart(names: Sequence[str], repeats: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return repeats with the end of the folder's path where runs have everything in common.

    Args:
        names: of the runs, ending in their repeats.
        repeats: what tells each of them from others of its kind.
        folders: of the runs.
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
    """Return labels with a number behind those that are not the first of their kind."""
    return _unique(labels, list(range(len(labels))))


def _is_plain(value: str) -> bool:
    """Whether a value is a number or a truth value, which cannot stand alone."""
    return number_of(value) is not None or value in ("true", "false")


def _telling(runs: Sequence[Differing], norms: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return few settings that together with the normalization tell apart what all of them do."""
    order = sorted(others, key=lambda name: (not is_weight_decay(name), max(len(run[name]) for run in runs) > 24))
    kinds, chosen = len({tuple(run[name] for name in (*norms, *others)) for run in runs}), list[str]()

    def told(names: Sequence[str]) -> int:
        return len({tuple(run[name] for name in (*norms, *names)) for run in runs})

    while told(chosen) < kinds:
        chosen.append(max((name for name in order if name not in chosen), key=lambda name: told([*chosen, name])))
    return [name for name in others if name in chosen]


def _told_by(panels: Sequence[str], series: Sequence[str], kinds: Sequence[object]) -> list[str]:
    """Return series with a number where the same panel and series stand for different kinds."""
    groups = _unique([f"{panel}\n{one}" for panel, one in zip(panels, series, strict=True)], kinds)
    return [group.partition("\n")[2].strip() for group in groups]


def _unique(labels: Sequence[str], keys: Sequence[object]) -> list[str]:
    """Return labels that are the same only where the keys are."""
    known: dict[object, str] = {}
    taken: dict[str, int] = {}
    for text, key in zip(labels, keys, strict=True):
        if key in known:
            continue
        free = text
        while free in taken:
            taken[text] += 1
            free = f"{text} ({taken[text]})"
        known[key], taken[free] = free, 1
    return [known[key] for key in keys]


def _end(place: str, places: Sequence[str]) -> str:
    """Return as much of the end of a path as no other path has."""
    others, parts = set(places), place.split("/")
    ends = ("/".join(parts[-depth:]) for depth in range(1, len(parts) + 1))
    found = next((end for end in ends if sum(f"/{other}".endswith(f"/{end}") for other in others) == 1), place)
    return elided(plain(found), _LONGEST_FOLDER)
