"""Shares of an evaluation by process, and the report made from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_normgeo.robustness.inputs import InputSpace
from lightning_normgeo.robustness.results.attack_results import results_of
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.results.samples.sample_identity import merged_places
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.sanity_checks import sanity_checks
from lightning_normgeo.robustness.results.sanity_warnings import sanity_warnings
from lightning_normgeo.robustness.results.statistics.corruption_summary import corruption_summary
from lightning_normgeo.robustness.results.statistics.smallest_radii import smallest_radii
from lightning_normgeo.robustness.results.statistics.worst_case import worst_cases
from lightning_normgeo.robustness.settings import RobustnessSettings

EVERYTHING = "all attacks"
"""Key in ``not_evaluated`` if nothing is evaluated."""


@dataclass
class ProcessShare:
    """One process's share of an evaluation, in a form that can be sent to other processes.

    Attributes:
        rows: the columns of the per-sample results, by attack.
        places: the places of the samples by key, see :class:`SeenSamples`.
        positions_known: whether these places are positions in the data set.
        settings: the settings that determine the results; empty if this process had no sample.
        inputs: how images relate to pixels; None if this process had no sample.
        failed: the reason for each attack that was not evaluated.
        said: warnings for the user.
        weights: weight norms.
    """

    rows: dict[str, tuple[Tensor, ...]]
    places: dict[int, list[int]]
    positions_known: bool
    settings: dict[str, Any]
    inputs: InputSpace | None
    failed: dict[str, str]
    said: list[str]
    weights: dict[str, Any] = field(default_factory=dict)


def report_of(parts: Sequence[ProcessShare], settings: RobustnessSettings, shown: ExampleImages) -> RobustnessReport:
    """Return the report of an evaluation, made from the shares of all processes.

    Args:
        parts: the share of each process.
        settings: the settings of the evaluation.
        shown: the example images.
    """
    with_samples = [part for part in parts if part.rows]
    failed = {name: reason for part in reversed(parts) for name, reason in part.failed.items()}
    said = list(dict.fromkeys(text for part in parts for text in part.said))
    if EVERYTHING in failed or not with_samples:
        failed = {EVERYTHING: failed.get(EVERYTHING, "the loader has no samples")}
        return RobustnessReport({}, _plain_settings(parts, settings), said, SampleResults([]), not_evaluated=failed)
    if len({part.inputs and part.inputs.normalization for part in with_samples}) > 1:
        said.append("Processes found different normalizations of their images. Declare mean and std.")
    known = all(part.positions_known for part in with_samples)
    places = merged_places([part.places for part in with_samples], known, settings.max_samples)
    decisions = SampleResults.from_parts([part.rows for part in with_samples], places).without(failed)
    failed = {name: reason for name, reason in failed.items() if name in settings.rows}
    attacks = [attack for attack in settings.all_attacks if attack.name in decisions.attacks]
    said += sanity_warnings(decisions, attacks)
    worst = worst_cases(decisions, attacks)
    return RobustnessReport(
        results=results_of(decisions),
        settings=with_samples[0].settings,
        warnings=said,
        decisions=decisions,
        shown=shown,
        weights=with_samples[0].weights,
        not_evaluated=failed,
        parts=settings.parts,
        worst=worst,
        radii=smallest_radii(decisions, attacks),
        corruptions=corruption_summary(decisions, attacks),
        checks=sanity_checks(decisions, attacks),
    )


def _plain_settings(parts: Sequence[ProcessShare], settings: RobustnessSettings) -> dict[str, Any]:
    """Return the settings as plain values, for a report without results."""
    unknown = InputSpace(None, None, normalized_data=False)
    return next((part.settings for part in parts if part.settings), settings.describe(unknown))
