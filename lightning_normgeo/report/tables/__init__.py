"""Tables of a report; each number in them is from a record, or counted from per-sample results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.sources import AbsentRun
from lightning_normgeo.report.tables.accuracies.attack_details import detail_tables
from lightning_normgeo.report.tables.accuracies.evaluations import evaluations_of
from lightning_normgeo.report.tables.accuracies.norm_control import control_table
from lightning_normgeo.report.tables.accuracies.not_evaluated import not_evaluated_table
from lightning_normgeo.report.tables.accuracies.paired_tests import paired_tables
from lightning_normgeo.report.tables.accuracies.robustness_tables import robustness_tables
from lightning_normgeo.report.tables.channel_tables import channel_tables
from lightning_normgeo.report.tables.correlations import correlation_tables
from lightning_normgeo.report.tables.geometry_table import geometry_table
from lightning_normgeo.report.tables.left_out import absent_table, not_measured_table
from lightning_normgeo.report.tables.settings_tables import environment_table, settings_table
from lightning_normgeo.report.tables.table import Table
from lightning_normgeo.report.tables.verdicts_table import verdicts_table
from lightning_normgeo.runs.verdicts.verdict import Verdict


def all_tables(
    runs: Sequence[Run], verdicts: Mapping[str, Verdict] | None = None, absent: Sequence[AbsentRun] = ()
) -> list[Table]:
    """Return the tables for which there is data, in the order of the report.

    Their anchors are ``verdicts``, ``robustness…`` for accuracies and drops on each data set and for attacks that were
    not evaluated, ``worst-case``, ``agreement``, ``smallest-radii``, ``corruptions``, ``by-class`` and ``sanity`` for
    details of evaluations, ``paired-…`` for paired differences by each setting in which runs differ, ``channels`` and
    ``channel-pairs`` for removed and similar channels, ``correlations…`` for rank correlations of norms with
    accuracies, ``control`` for the control with rescaled weights, ``geometry``, ``not-measured`` for steps without a
    measurement, ``absent`` for runs without a record, ``settings`` and ``environment``.

    Args:
        runs: Runs of the report.
        verdicts: Verdicts of the runs by claim. Default: no table of verdicts.
        absent: Runs of the same studies that have no record.
    """
    evaluations = evaluations_of(runs)
    background = [
        control_table(evaluations),
        geometry_table(runs),
        not_measured_table(runs),
        absent_table(absent),
        settings_table(runs),
        environment_table(runs),
    ]
    judged, left_out = verdicts_table(verdicts or {}), not_evaluated_table(runs)
    return [
        *([] if judged is None else [judged]),
        *robustness_tables(evaluations, runs),
        *detail_tables(runs, evaluations),
        *([] if left_out is None else [left_out]),
        *paired_tables(evaluations),
        *channel_tables(runs),
        *correlation_tables(evaluations),
        *(table for table in background if table is not None),
    ]
