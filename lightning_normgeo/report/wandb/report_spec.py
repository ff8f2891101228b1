"""Report for W&B, built without a network; it needs the extra ``wandb-reports``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.formats.text import markdown_table
from lightning_normgeo.report.setting_roles import is_weight_decay
from lightning_normgeo.report.story import (
    WANDB_ROBUSTNESS,
    WANDB_SECTIONS,
    WANDB_TRAINING,
    Section,
)
from lightning_normgeo.report.tables.table import Table
from lightning_normgeo.report.tables.verdicts_table import ANCHOR
from lightning_normgeo.report.wandb.panels import (
    COLUMNS,
    HEIGHT,
    WIDTH,
    module,
    section_panels,
    training_panels,
)
from lightning_normgeo.report.wandb.result_panels import (
    attack_panels,
    example_keys,
    result_tables,
    weight_results,
)
from lightning_normgeo.report.wandb.runset import evaluations, ids, runset
from lightning_normgeo.report.wandb.workspace_spec import TITLE


def build_report(runs: Sequence[Run], entity: str, project: str, tables: Sequence[Table], title: str) -> Any:
    """Return a report that is not saved yet, a ``wandb_workspaces.reports.v2.Report``.

    Its panels show the data that W&B has of the runs; the tables are copied as text.

    Args:
        runs: Runs of the report. If W&B's id of each is known, its panels show only these runs, otherwise all runs of
            the project.
        entity: Owner of the project.
        project: Project with the runs.
        tables: Tables of the report; that of verdicts comes first.
        title: Title of the report; W&B's limit of 128 characters cuts it off.

    Raises:
        ConfigurationError: If wandb-workspaces is missing.
    """
    wr = module("wandb_workspaces.reports.v2")
    first = [table for table in tables if table.anchor == ANCHOR]
    blocks = [wr.P(_introduction(runs)), *_table_blocks(wr, first), wr.TableOfContents()]
    blocks += _training_blocks(wr, runs)
    for section in WANDB_SECTIONS:
        blocks += _section_blocks(wr, runs, section)
    for section, panels, keys in weight_results(wr, runs):
        blocks += _result_blocks(wr, runs, section, panels, keys)
    blocks += _robustness_blocks(wr, runs)
    blocks += _table_blocks(wr, [table for table in tables if table.anchor != ANCHOR])
    blocks += _settings_blocks(wr, runs)
    return wr.Report(entity=entity, project=project, title=title[:TITLE], width="fluid", blocks=blocks)


def _table_blocks(wr: Any, tables: Sequence[Table]) -> list[Any]:
    """Return the blocks of tables: a heading, how to read it, and the table as text."""
    parts = ((wr.H2(table.title), wr.P(table.caption), wr.MarkdownBlock(markdown_table(table))) for table in tables)
    return [block for part in parts for block in part]


def _introduction(runs: Sequence[Run]) -> str:
    """Return the first paragraph of the report."""
    differing = list(runs[0].kind)
    groups = ""
    if differing:
        groups = f" in {len({run.group for run in runs})} groups, which differ in {', '.join(differing)}"
    other = "" if ids(runs) else " W&B's name of some is not known, so panels show all runs of the project."
    if len(runs) == 1:
        return f"One run; the axis of curves is the training step.{other}"
    return (
        f"{len(runs)} runs{groups}. A curve is the mean over the runs of a group, and its area reaches from the "
        f"smallest to the largest; the axis is the training step.{other}"
    )


def _training_blocks(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return the blocks with losses and accuracies; empty if the project logged none."""
    panels = training_panels(wr, runs)
    if not panels:
        return []
    grid = wr.PanelGrid(runsets=[runset(wr, runs, runs)], panels=panels)
    return [wr.H2(WANDB_TRAINING.title), wr.P(WANDB_TRAINING.caption), grid]


def _section_blocks(wr: Any, runs: Sequence[Run], section: Section) -> list[Any]:
    """Return the blocks of a section; empty if no run has one of its curves."""
    panels = section_panels(wr, runs, section)
    if not panels:
        return []
    parts = _by_weight_decay(runs) if section.by_weight_decay else {"": runs}
    blocks = [wr.H2(section.title), wr.P(section.wandb_text or section.caption)]
    for name, part in parts.items():
        if name:
            blocks.append(wr.H3(name))
        # new panels for each grid: a panel in two grids would have the same id twice
        blocks.append(wr.PanelGrid(runsets=[runset(wr, part, runs)], panels=section_panels(wr, part, section)))
    return blocks


def _by_weight_decay(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs without and with weight decay by title, if there are both and W&B's ids can select them."""
    names = [name for name in runs[0].differing if is_weight_decay(name)]
    parts: dict[str, list[Run]] = {}
    for run in runs:
        decays = any(not _is_zero(run.differing[name]) for name in names)
        parts.setdefault("With weight decay" if decays else "Without weight decay", []).append(run)
    return dict(sorted(parts.items(), reverse=True)) if len(parts) > 1 and ids(runs) else {"": list(runs)}


def _is_zero(value: str) -> bool:
    try:
        return float(value) == 0
    except ValueError:  # a run that lacks the setting
        return True


def _robustness_blocks(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return the blocks with accuracies, tables and example images; empty if no run was evaluated."""
    section = Section("Accuracy under attack", WANDB_ROBUSTNESS, ())
    stems = evaluations(runs)
    tables = result_tables(runs, stems)
    return _result_blocks(wr, runs, section, attack_panels(wr, runs), tables, example_keys(runs, stems))


def _result_blocks(
    wr: Any,
    runs: Sequence[Run],
    section: Section,
    bars: Sequence[Any],
    tables: Sequence[str],
    images: Sequence[str] = (),
) -> list[Any]:
    """Return the blocks of a section with results: bars, below them tables, and images; empty without bars."""
    if not bars:
        return []
    below = math.ceil(len(bars) / COLUMNS) * HEIGHT
    panels = list(bars)
    for name in tables:
        place = wr.Layout(x=0, y=below, w=WIDTH, h=HEIGHT + 2)
        panels.append(wr.WeavePanelSummaryTable(table_name=name, layout=place))
        below += HEIGHT + 2
    if images:
        place = wr.Layout(x=0, y=below, w=WIDTH, h=HEIGHT + 4)
        panels.append(wr.MediaBrowser(title="attacked images", media_keys=list(images), layout=place))
    return [
        wr.H2(section.title),
        wr.P(section.wandb_text or section.caption),
        wr.PanelGrid(runsets=[runset(wr, runs, runs, table=True)], panels=panels),
    ]


def _settings_blocks(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return the blocks that compare the settings of several runs."""
    if len(runs) == 1:
        return []
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=WIDTH, h=HEIGHT + 4))
    return [
        wr.H2("Settings"),
        wr.P("What differs between the runs is shown first."),
        wr.PanelGrid(runsets=[runset(wr, runs, [], table=True)], panels=[comparer]),
    ]
