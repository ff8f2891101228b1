"""The record of a run: its curves, settings, results and pictures; needs neither torch nor Lightning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from lightning_normgeo.runs.records.record_lines import ROBUSTNESS as ROBUSTNESS
from lightning_normgeo.utilities.checked_values import UnknownNameError, nearest
from lightning_normgeo.utilities.notebook import NotebookTable, curves_frame, shortened, summary

RECORD_NAME, STUDY_NAME = "record.jsonl", "study.json"
GRADIENTS = "gradients"
"""The key of :class:`NotFinite` for the gradients of measured steps, which are not a logged metric."""
FINISHED_NAME = "run"
"""The name of the results that a run writes last, after its tests."""


class NotFinite(NamedTuple):
    """A quantity whose values are NaN or infinite from some step on.

    Attributes:
        key: Key of the metric, or :data:`GRADIENTS`.
        step: Step of the first value that is not finite.
    """

    key: str
    step: int

    def __str__(self) -> str:
        """Return the finding in words, such as "diverged: train/loss is not finite from step 12 on"."""
        return f"diverged: {self.since}"

    @property
    def since(self) -> str:
        """The finding without its first word, such as "train/loss is not finite from step 12 on"."""
        verb = "are" if self.key == GRADIENTS else "is"
        return f"{self.key} {verb} not finite from step {self.step} on"


def is_loss(key: str) -> bool:
    """Whether a metric is a loss, by the last part of its key."""
    return "loss" in key.rpartition("/")[2].lower()


def evaluation_stem(name: str | None) -> str:
    """Return the common prefix of the results, files and tables of a robustness evaluation.

    Args:
        name: Name of the evaluation; None or empty for one without.

    Returns:
        ``robustness_<name>``, or ``robustness`` without a name.
    """
    return f"{ROBUSTNESS}_{name}" if name else ROBUSTNESS


@dataclass
class Record:
    """The content of a run's record.

    Attributes:
        folder: Folder of the run.
        metrics: (step, value) pairs of each key, in the order they were logged; a sequence, equal to the list of them.
        layers: (step, values by layer) pairs of each quantity, likewise.
        settings: Everything passed to ``log_hyperparams``; later calls override earlier ones.
        environment: Versions and hardware of the last process that wrote the record.
        results: Results by name.
        images: Files and captions that were logged last, by key.
        observations: One dictionary per training: a summary of its measurements (``summary``), the number of skipped
            ones by reason (``left_out``), the ``optimizers``, the ``precision``, and how many γ and β of batch
            normalizations were trained (``trained_affine``).
        lost: Number of lines that could not be written while the disk was full.
        complete: Whether the last line says that the run ended without an error or a signal.
        begun: Time of the first line, in seconds since 1970.
        ended: Time of the last line, in seconds since 1970.
    """

    folder: Path
    metrics: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    layers: Mapping[str, Sequence[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    images: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    observations: list[dict[str, Any]] = field(default_factory=list)
    lost: int = 0
    complete: bool = False
    begun: float = 0.0
    ended: float = 0.0

    def __repr__(self) -> str:
        steps = [points[-1][0] for points in self.metrics.values()] + [points[-1][0] for points in self.layers.values()]
        parts = [shortened(str(self.folder)), f"to step {max(steps)}" if steps else "no steps"]
        parts.append(f"{len(self.metrics)} metrics")
        if self.results:
            parts.append(f"{len(self.results)} results")
        since = self.diverged
        if since is not None:
            parts.append(f"diverged at step {since.step}")
        else:
            parts.append("complete" if self.complete else "not complete")
        return summary("Record", parts)

    def _repr_html_(self) -> str:
        columns = ("metric", "points", "first step", "last step", "last value")
        rows = [(key, len(curve), curve[0][0], *curve[-1]) for key, curve in self.metrics.items()]
        notes = []
        if self.layers:
            example = next(iter(self.layers))
            notes.append(f"values by layer, as to_frame({example!r}): {', '.join(self.layers)}")
        if self.results:
            notes.append(f"results: {', '.join(self.results)}")
        return NotebookTable(repr(self), columns, rows, notes).to_html()

    def to_frame(self, quantity: str | None = None) -> Any:
        """Return curves as a data frame of pandas: a row for each step, NaN where nothing was logged at that step.

        Args:
            quantity: A quantity with values by layer, such as ``norm_growth/weight_norm``, gives a column for each
                layer; a metric, or a glob such as ``robustness/*/accuracy``, a column for each metric that matches.
                Default: all metrics, including those that have values by layer.

        Raises:
            UnknownNameError: For a quantity that was not recorded; it is a KeyError and a ConfigurationError.
            ConfigurationError: If pandas is not installed.

        Example:
            >>> read_record("runs/mine").to_frame("norm_growth/weight_norm").plot(logy=True)
        """
        if isinstance(quantity, str) and quantity in self.layers:
            return curves_frame(_by_layer(self.layers[quantity]), "layer")
        pattern = "*" if quantity is None else str(quantity)
        found = {key: curve for key, curve in self.metrics.items() if fnmatchcase(key, pattern)}
        if quantity is not None and not found:
            known = nearest(quantity, [*self.layers, *(key for key in self.metrics if key not in self.layers)])
            raise UnknownNameError(f"{quantity!r} was not recorded in {self.folder}; {known}.")
        return curves_frame(found, "metric")

    @property
    def observed(self) -> dict[str, Any]:
        """The observation of the last training; empty without one."""
        return self.observations[-1] if self.observations else {}

    def points(self, key: str) -> list[tuple[int, float]]:
        """Return the finite (step, value) pairs of a metric; a run that diverged has none from that step on."""
        return finite_points(self.metrics.get(key, []))

    @property
    def diverged(self) -> NotFinite | None:
        """The first step from which the losses stay NaN or infinite until the end of the run; None if they do not.

        Losses are all metrics with ``loss`` in the last part of their key; the gradients of measured steps are treated
        like one. A loss that is finite at a later step refutes what came before: training in half precision skips
        single steps, and a batch without a label has no finite loss.
        """
        losses = {key: points for key, points in self.metrics.items() if is_loss(key)}
        finite = [step for points in losses.values() for step, value in points if math.isfinite(value)]
        found = [NotFinite(key, since) for key, points in losses.items() if (since := _since(points)) is not None]
        step = self.observed.get("not_finite_since")
        if isinstance(step, int):
            found.append(NotFinite(GRADIENTS, step))
        found = [one for one in found if one.step >= max(finite, default=one.step)]
        return min(found, key=lambda one: one.step, default=None)

    def is_at_wandb(self, key: str) -> bool:
        """Whether a metric was also sent to W&B, which gets only part of the measured ones; True if unknown."""
        sent = [found for one in self.observations if isinstance(found := one.get("wandb_keys"), list)]
        groups = {str(name).partition("/")[0] for found in sent for name in found}
        return key.partition("/")[0] not in groups or any(key in found for found in sent)

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The robustness evaluations by name; the key of one without a name is empty."""
        return {
            name.removeprefix(ROBUSTNESS).removeprefix("_"): found
            for name, found in self.results.items()
            if name.partition("_")[0] == ROBUSTNESS
        }

    @property
    def examples(self) -> list[tuple[str, str]]:
        """The files and captions of the example images of all evaluations."""
        return [
            picture
            for key, pictures in self.images.items()
            if key.partition("/")[0].partition("_")[0] == ROBUSTNESS
            for picture in pictures
        ]


def _by_layer(points: Sequence[tuple[int, dict[str, float]]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, values in points:
        for layer, value in values.items():
            curves.setdefault(layer, []).append((step, value))
    return curves


def finite_points(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of a curve whose value is finite, in their order."""
    return [point for point in points if math.isfinite(point[1])]


def _since(points: Sequence[tuple[int, float]]) -> int | None:
    """Return the step from which no value of a curve is finite; None if the last one is finite."""
    found = None
    for step, value in points:
        if math.isfinite(value):
            found = None
        elif found is None:
            found = step
    return found
