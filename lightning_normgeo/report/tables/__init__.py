"""Tables of a report; each number in them is from a record, or counted from per-sample results."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.tables.channel_tables import channel_tables
from lightning_normgeo.report.tables.evaluations import evaluations_of
from lightning_normgeo.report.tables.geometry_table import geometry_table
from lightning_normgeo.report.tables.norm_control import control_table
from lightning_normgeo.report.tables.not_evaluated import not_evaluated_table
from lightning_normgeo.report.tables.paired_tests import paired_tables
from lightning_normgeo.report.tables.robustness_tables import robustness_tables
from lightning_normgeo.report.tables.settings_tables import environment_table, settings_table
from lightning_normgeo.report.tables.table import Table


def all_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the tables for which there is data, in the order of the report.

    Their anchors are ``robustness…`` for accuracies and drops on each data set and for attacks that were not evaluated,
    ``paired-…`` for paired differences by each setting in which runs differ, ``channels`` and ``channel-pairs`` for
    removed and similar channels, ``control`` for the control with rescaled weights, ``geometry``, ``settings`` and
    ``environment``.

    Args:
        runs: Runs of the report.
    """
    evaluations = evaluations_of(runs)
    background = [control_table(evaluations), geometry_table(runs), settings_table(runs), environment_table(runs)]
    left_out = not_evaluated_table(runs)
    return [
        *robustness_tables(evaluations, runs),
        *([] if left_out is None else [left_out]),
        *paired_tables(evaluations),
        *channel_tables(runs),
        *(table for table in background if table is not None),
    ]
