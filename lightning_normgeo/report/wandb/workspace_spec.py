"""The view of a W&B project, built without a network: sections in the order of the story, what matters first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.story import (
    AT_A_GLANCE,
    WANDB_KEYS,
    WANDB_ROBUSTNESS,
    WANDB_SECTIONS,
    WANDB_TRAINING,
)
from lightning_normgeo.report.wandb.downloaded_records import STEP
from lightning_normgeo.report.wandb.panels import (
    COLUMNS,
    MOST_RUNS,
    headline_panels,
    logged,
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
from lightning_normgeo.report.wandb.runset import columns, evaluations, grouping
from lightning_normgeo.runs.quantities.table import QUANTITIES
from lightning_normgeo.runs.verdicts.logged_verdicts import ABOUT, KEYS, TRAINING

TITLE = 128
"""Characters of W&B's longest title."""


def build_workspace(runs: Sequence[Run], entity: str, project: str, title: str) -> Any:
    """Return a workspace view that is not saved yet, a ``wandb_workspaces.workspaces.Workspace``.

    It has the curves of the report, with a text in each section on how to read it, and shows all runs of the project,
    also future ones. Its first section stays on top.

    Args:
        runs: Runs whose metrics and settings decide on the panels, groups and columns.
        entity: Owner of the project.
        project: Project with the runs.
        title: Name of the view; W&B's limit of 128 characters cuts it off.

    Raises:
        ConfigurationError: If wandb-workspaces is missing.
    """
    wr, ws = module("wandb_workspaces.reports.v2"), module("wandb_workspaces.workspaces")
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title[:TITLE],
        sections=[_section(wr, ws, name, text, panels) for name, text, panels in _contents(wr, runs) if panels],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(path) for path in grouping(runs)], pinned_columns=columns(runs)
        ),
    )


def _section(wr: Any, ws: Any, name: str, text: str, panels: Sequence[Any]) -> Any:
    """Return a section that shows all its panels on one page, after the text on how to read them."""
    shown = [wr.MarkdownPanel(markdown=text), *panels]
    layout = ws.SectionLayoutSettings(columns=COLUMNS, rows=math.ceil(len(shown) / COLUMNS))
    return ws.Section(name=name, panels=shown, is_open=True, pinned=name == AT_A_GLANCE.title, layout_settings=layout)


def _contents(wr: Any, runs: Sequence[Run]) -> list[tuple[str, str, list[Any]]]:
    """Return the title, the text and the panels of each section; sections without panels are left out later."""
    stems = evaluations(runs)
    measured = not QUANTITIES.keys().isdisjoint(logged(runs))
    verdicts = [*([TRAINING] if measured else []), *(f"{ABOUT}/{stem}" for stem in stems)]
    of_evaluations = [*_tables(wr, result_tables(runs, stems)), *_images(wr, runs, stems)]
    return [
        (AT_A_GLANCE.title, AT_A_GLANCE.caption, [*headline_panels(wr, runs), *_tables(wr, verdicts)]),
        (WANDB_TRAINING.title, WANDB_TRAINING.caption, training_panels(wr, runs)),
        *((one.title, one.wandb_text or one.caption, section_panels(wr, runs, one)) for one in WANDB_SECTIONS),
        *((one.title, one.caption, [*panels, *_tables(wr, keys)]) for one, panels, keys in weight_results(wr, runs)),
        ("Robustness", WANDB_ROBUSTNESS, [*attack_panels(wr, runs), *of_evaluations]),
        (WANDB_KEYS.title, WANDB_KEYS.caption, _tables(wr, [KEYS] if measured else [])),
    ]


def _tables(wr: Any, keys: Sequence[str]) -> list[Any]:
    return [wr.WeavePanelSummaryTable(table_name=key) for key in keys]


def _images(wr: Any, runs: Sequence[Run], stems: Sequence[str]) -> list[Any]:
    shown = example_keys(runs, stems)
    return [wr.MediaBrowser(title="attacked images", media_keys=shown)] if shown else []
