"""Report and workspace view for W&B, built without a network; they need the extra ``wandb-reports``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.formats.text import markdown_table
from lightning_normgeo.report.setting_roles import is_weight_decay
from lightning_normgeo.report.story import WANDB_ROBUSTNESS, WANDB_SECTIONS, Section
from lightning_normgeo.report.tables.table import Table
from lightning_normgeo.report.wandb.downloaded_records import STEP
from lightning_normgeo.report.wandb.runset import attacks, columns, grouping, ids, runset
from lightning_normgeo.robustness.results.logged_results import EXAMPLES, RESULTS
from lightning_normgeo.runs.findings.run_findings import joint_findings
from lightning_normgeo.runs.quantities import QUANTITIES, Quantity
from lightning_normgeo.runs.record import evaluation_stem

_WIDTH, _HEIGHT, _COLUMNS = 24, 8, 3
"""Width of a grid of panels and height of a panel, in W&B's units, and the number of panels in a row."""
_MOST_RUNS = 100
_TITLE = 128
"""Characters of W&B's longest title."""


def build_report(runs: Sequence[Run], entity: str, project: str, tables: Sequence[Table], title: str) -> Any:
    """Return a report that is not saved yet, a ``wandb_workspaces.reports.v2.Report``.

    Its panels show the data that W&B has of the runs; the tables are copied as text.

    Args:
        runs: Runs of the report. If W&B's id of each is known, its panels show only these runs, otherwise all runs of
            the project.
        entity: Owner of the project.
        project: Project with the runs.
        tables: Tables of the report.
        title: Title of the report; W&B's limit of 128 characters cuts it off.

    Raises:
        ConfigurationError: If wandb-workspaces is missing.
    """
    wr = _module("wandb_workspaces.reports.v2")
    blocks = [wr.P(_introduction(runs)), *_finding_blocks(wr, runs), wr.TableOfContents()]
    for section in WANDB_SECTIONS:
        blocks += _section_blocks(wr, runs, section)
    blocks += _robustness_blocks(wr, runs)
    for table in tables:
        blocks += [wr.H2(table.title), wr.P(table.caption), wr.MarkdownBlock(markdown_table(table))]
    blocks += _settings_blocks(wr, runs)
    return wr.Report(entity=entity, project=project, title=title[:_TITLE], width="fluid", blocks=blocks)


def build_workspace(runs: Sequence[Run], entity: str, project: str, title: str) -> Any:
    """Return a workspace view that is not saved yet, a ``wandb_workspaces.workspaces.Workspace``.

    It has the curves of the report, and shows all runs of the project, also future ones.

    Args:
        runs: Runs whose metrics and settings decide on the panels, groups and columns.
        entity: Owner of the project.
        project: Project with the runs.
        title: Name of the view; W&B's limit of 128 characters cuts it off.

    Raises:
        ConfigurationError: If wandb-workspaces is missing.
    """
    wr, ws = _module("wandb_workspaces.reports.v2"), _module("wandb_workspaces.workspaces")
    sections = [(section.title, _line_plots(wr, runs, section)) for section in WANDB_SECTIONS]
    sections.append(("Robustness", _bar_plots(wr, runs)))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title[:_TITLE],
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections if panels],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=_MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(path) for path in grouping(runs)], pinned_columns=columns(runs)
        ),
    )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"Reports of W&B need {error.name}: pip install 'lightning-normgeo[wandb-reports]'"
        ) from error


def _finding_blocks(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return the findings of the runs as a list, as the page shows them as cards."""
    findings = joint_findings([run.record for run in runs])
    lines = [f"{one.topic}: {one.number}, {one.quantity}. {one.detail}".strip() for one in findings]
    return [wr.H2("Findings"), wr.UnorderedList(items=lines)] if lines else []


def _introduction(runs: Sequence[Run]) -> str:
    """Return the first paragraph of the report."""
    differing = list(runs[0].kind)
    count = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    groups = ""
    if differing:
        groups = f" in {len({run.group for run in runs})} groups, which differ in {', '.join(differing)}"
    other = "" if ids(runs) else " W&B's name of some is not known, so panels show all runs of the project."
    return (
        f"{count}{groups}. A curve is the mean over the runs of a group, and its area reaches from the smallest to the "
        f"largest; the axis is the training step.{other}"
    )


def _section_blocks(wr: Any, runs: Sequence[Run], section: Section) -> list[Any]:
    """Return the blocks of a section; empty if no run has one of its curves."""
    panels = _line_plots(wr, runs, section)
    if not panels:
        return []
    parts = _by_weight_decay(runs) if section.by_weight_decay else {"": runs}
    blocks = [wr.H2(section.title), wr.P(section.wandb_text or section.caption)]
    for name, part in parts.items():
        if name:
            blocks.append(wr.H3(name))
        # new panels for each grid: a panel in two grids would have the same id twice
        blocks.append(wr.PanelGrid(runsets=[runset(wr, part, runs)], panels=_line_plots(wr, part, section)))
    return blocks


def _line_plots(wr: Any, runs: Sequence[Run], section: Section) -> list[Any]:
    """Return a panel for each curve of a section that at least one run has at W&B."""
    keys = dict.fromkeys(key for run in runs for key in run.record.metrics if run.record.is_at_wandb(key))
    wanted = [QUANTITIES[key] for key in section.wandb_keys or section.keys]
    found = [(quantity, key) for quantity in wanted for key in _matching(quantity.key, keys)]
    return [
        wr.LinePlot(
            title=_panel_title(quantity, key),
            x=STEP,
            y=[key],
            log_y=quantity.log_scale or None,
            title_x="training step",
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=_MOST_RUNS,
            smoothing_type="none",
            layout=_place(wr, i),
        )
        for i, (quantity, key) in enumerate(found)
    ]


def _matching(wanted: str, keys: Mapping[str, Any]) -> list[str]:
    """Return the wanted key, or of a key with a layer the first one that some run has; empty if there is none."""
    prefix, of_layers, _ = wanted.partition("{layer}")
    if of_layers:
        return [key for key in keys if key.startswith(prefix)][:1]
    return [wanted] if wanted in keys else []


def _panel_title(quantity: Quantity, key: str) -> str:
    """Return the title of a panel, with the layer if the quantity has a key for each layer."""
    if key == quantity.key:
        return quantity.wandb_title
    layer = key.rpartition("/")[2]
    return f"{quantity.wandb_title} ({layer})"


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
    bars = _bar_plots(wr, runs)
    if not bars:
        return []
    below = math.ceil(len(bars) / _COLUMNS) * _HEIGHT
    panels = list(bars)
    stems = [evaluation_stem(name) for name in dict.fromkeys(name for run in runs for name in run.record.evaluations)]
    for stem in stems:
        place = wr.Layout(x=0, y=below, w=_WIDTH, h=_HEIGHT + 2)
        panels.append(wr.WeavePanelSummaryTable(table_name=f"{stem}/{RESULTS}", layout=place))
        below += _HEIGHT + 2
    shown = [f"{stem}/{EXAMPLES}" for stem in stems if any(f"{stem}/{EXAMPLES}" in run.record.images for run in runs)]
    if shown:
        place = wr.Layout(x=0, y=below, w=_WIDTH, h=_HEIGHT + 4)
        panels.append(wr.MediaBrowser(title="attacked images", media_keys=shown, layout=place))
    return [
        wr.H2("Accuracy under attack"),
        wr.P(WANDB_ROBUSTNESS),
        wr.PanelGrid(runsets=[runset(wr, runs, runs, table=True)], panels=panels),
    ]


def _bar_plots(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return panels with the accuracy and the drop under each attack."""
    quantities = (("accuracy", (0.0, 1.0)), ("accuracy_drop", (None, None)))
    bars = [
        (f"{attack}: {quantity.replace('_', ' ')}", f"robustness/{attack}/{quantity}", span)
        for attack in attacks(runs)
        for quantity, span in quantities
        # no panel of the drop at each radius of an attack, and none of the drop of clean images
        if quantity == "accuracy" or not (attack == "clean" or "_eps" in attack)
    ]
    return [
        wr.BarPlot(
            title=title,
            metrics=[key],
            orientation="h",
            range_x=span,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=_MOST_RUNS,
            max_bars_to_show=_MOST_RUNS,
            layout=_place(wr, i),
        )
        for i, (title, key, span) in enumerate(bars)
    ]


def _settings_blocks(wr: Any, runs: Sequence[Run]) -> list[Any]:
    """Return the blocks that compare the settings of several runs."""
    if len(runs) == 1:
        return []
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=_WIDTH, h=_HEIGHT + 4))
    return [
        wr.H2("Settings"),
        wr.P("What differs between the runs is shown first."),
        wr.PanelGrid(runsets=[runset(wr, runs, [], table=True)], panels=[comparer]),
    ]


def _place(wr: Any, index: int) -> Any:
    """Return the layout of the panel with a given index, in rows from left to right."""
    width = _WIDTH // _COLUMNS
    return wr.Layout(x=index % _COLUMNS * width, y=index // _COLUMNS * _HEIGHT, w=width, h=_HEIGHT)
