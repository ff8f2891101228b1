"""Report as one self-contained HTML page."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_normgeo._version import __version__
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.figures.curves import ALL, Curves
from lightning_normgeo.report.figures.figure import VEGA_LITE, Figure
from lightning_normgeo.report.figures.geometry_figures import all_figures
from lightning_normgeo.report.figures.pictures import pictures_of
from lightning_normgeo.report.run_settings import flat
from lightning_normgeo.report.sources import AbsentRun
from lightning_normgeo.report.story import GLOSSARY
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.verdicts.study_verdicts import verdicts_of
from lightning_normgeo.runs.verdicts.claims.claims import CLAIMS
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import NOT_TESTED, WORDS, Verdict
from lightning_normgeo.utilities.plain_text import plain_line

_DIFFERS = "differs between the runs"
_ICONS = dict(zip(WORDS, "✓✗?–∅", strict=True))
_FIRST = "robustness"
"""Prefix of the anchors of tables that come before the figures."""
_BEHIND = ("test/", "robustness/", "effective/", "channels/", "epoch")
"""Beginnings of the keys of metrics that are logged after training, under the number of its steps."""


def render(
    runs: Sequence[Run],
    title: str,
    layers: Sequence[str] = (),
    thresholds: Thresholds | None = None,
    absent: Sequence[AbsentRun] = (),
) -> str:
    """Return the HTML page of some runs, with its scripts, data and pictures, so that it needs no network.

    Args:
        runs: Runs to compare; one is enough.
        title: Title of the page.
        layers: Globs of the layers that the reader can choose; see :class:`Curves`.
        thresholds: Limits by which verdicts are given. Default: those that the documentation gives.
        absent: Runs of the same studies that have no record.
    """
    environment = Environment(
        loader=PackageLoader("lightning_normgeo.report.formats", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    curves = Curves(runs, layers)
    verdicts = verdicts_of(runs, thresholds)
    figures, (judged, *tables) = all_figures(curves), all_tables(list(runs), verdicts, absent)
    first = [table for table in tables if table.anchor.startswith(_FIRST)]
    rest = [table for table in tables if not table.anchor.startswith(_FIRST)]
    places = _places([figure.anchor for figure in figures], [table.anchor for table in tables])
    return environment.get_template("page.html.j2").render(
        title=title,
        runs=len(runs),
        summary=_summary(runs),
        folder=plain_line(runs[0].record.folder.name) if len(runs) == 1 else "",
        unfinished=[run.name for run in runs if not run.record.complete],
        absent=_count(absent, len(runs)),
        diverged=[f"{run.name} ({found.since})" for run in runs if (found := run.record.diverged)],
        figures=figures,
        specs=_inline_json(json.dumps(_packed(figures), separators=(",", ":"))),
        library=_library(),
        cards=list(_cards(verdicts, places)),
        tally=_tally(verdicts),
        verdicts=judged,
        contents=[*first, *figures, *rest] if len(runs) > 1 else [*figures, *first, *rest],
        glossary=GLOSSARY,
        first=first,
        tables=rest,
        layers=[ALL, *curves.titles.values()],
        warnings=[(run.name, warning) for run, found in _evaluations(runs) for warning in found.get("warnings", [])],
        threat=_common([flat(found.get("settings", {})) for _, found in _evaluations(runs)]),
        images=pictures_of(runs),
        settings=_common([run.settings for run in runs]),
        version=__version__,
    )


def _cards(verdicts: Mapping[str, Verdict], places: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the content of a card for each claim that the runs test, or that has a number."""
    for key, one in verdicts.items():
        if one.word != NOT_TESTED or one.number:
            claim = CLAIMS[key]
            words = {"sort": one.word.replace(" ", "-"), "icon": _ICONS[one.word], "place": places.get(claim.section)}
            yield {"claim": claim, "verdict": one, **words}


def _tally(verdicts: Mapping[str, Verdict]) -> str:
    """Return the number of claims with each word, such as "5 supported, 1 refuted, 2 undecided, 7 not tested"."""
    words = Counter(one.word for one in verdicts.values())
    return ", ".join(f"{words[word]} {word}" for word in WORDS if words[word])


def _places(figures: Sequence[str], tables: Sequence[str]) -> dict[str, str]:
    """Return the anchor of each section of claims: that of its figure or table, or the first that begins so."""
    anchors = [*figures, *tables]
    sections = dict.fromkeys(claim.section for claim in CLAIMS.values() if claim.section)
    found = {name: [anchor for anchor in anchors if anchor.startswith(name)] for name in sections}
    return {name: some[0] for name, some in found.items() if some}


def _count(absent: Sequence[AbsentRun], present: int) -> str:
    """Return the number of runs without a record and of all, such as "2 of 8 runs"; empty if all have one."""
    return f"{len(absent)} of {present + len(absent)} runs" if absent else ""


def _summary(runs: Sequence[Run]) -> str:
    """Return the number of runs and of their training steps, in words."""
    steps = [_last_step(run) + 1 for run in runs]
    span = f"{min(steps)} to {max(steps)}" if min(steps) != max(steps) else f"{steps[0]}"
    count = f"{len(runs)} runs of " if len(runs) > 1 else ""
    return f"{count}{span} training steps"


def _last_step(run: Run) -> int:
    """Return the last training step, without the metrics that are logged behind it."""
    metrics = run.record.metrics
    return max((points[-1][0] for key, points in metrics.items() if points and not key.startswith(_BEHIND)), default=-1)


def _evaluations(runs: Sequence[Run]) -> list[tuple[Run, Mapping[str, Any]]]:
    return [(run, evaluation) for run in runs for evaluation in run.record.evaluations.values()]


def _common(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the common value of each setting, or a note if it differs between the runs."""
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: {one.get(name) for one in settings} for name in names}
    return {name: str(settings[0].get(name)) if len(values[name]) == 1 else _DIFFERS for name in names}


@functools.cache
def _library() -> str:
    """Return the JavaScript of Vega-Lite, safe inside a script element."""
    bundle: str = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]
    # only the end of a script has to be hidden: "</" alone also occurs in regular expressions
    return bundle.replace("</script", "<\\/script")


def _packed(figures: Sequence[Figure]) -> dict[str, Any]:
    """Return the specifications of figures with their rows as columns, and each text and list of steps only once.

    A page of hundreds of runs repeats the same names and steps in tens of thousands of rows. figures.js unpacks them.
    """
    texts: dict[str, int] = {}
    steps: dict[tuple[int, ...], int] = {}
    specs = {figure.anchor: figure.spec for figure in figures}
    for spec in specs.values():
        rows, columns = spec["data"]["values"], dict[str, dict[str, Any]](texts={}, steps={}, values={})
        for field in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(field) for row in rows]
            if all(isinstance(value, str) for value in values):
                columns["texts"][field] = [texts.setdefault(value, len(texts)) for value in values]
            elif all(isinstance(value, list) for value in values) and field == "step":
                columns["steps"][field] = [steps.setdefault(tuple(value), len(steps)) for value in values]
            else:
                columns["values"][field] = values
        spec["data"] = {"rows": len(rows), **columns}
    return {"texts": list(texts), "steps": list(steps), "figures": specs}


def _inline_json(text: str) -> str:
    """Return JSON that is safe in a script element, which "</script" would end and "<!--<script" would keep open."""
    return text.replace("<", "\\u003c")
