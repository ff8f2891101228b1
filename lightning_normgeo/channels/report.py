"""Accuracies of a network with masked channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.channels.table import ChannelTable, PairCounts
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities.checked_values import short_repr
from lightning_normgeo.utilities.files import finite
from lightning_normgeo.utilities.notebook import NotebookTable, summary

COLUMNS = (
    "criterion",
    "replace",
    "ratio",
    "removed",
    "removed_share",
    "accuracy",
    "ci_low",
    "ci_high",
    "accuracy_drop",
    "correct",
    "n",
    "emptied",
)
"""Columns of the table of results, see :class:`MaskedAccuracy`."""


@dataclass(frozen=True)
class MaskedAccuracy:
    """Accuracy with some channels masked.

    Attributes:
        criterion: criterion by which channels are removed; empty for the whole network.
        replace: what a masked channel's output becomes.
        ratio: share of the candidates that was asked for.
        removed: number of channels removed. It is one more than asked for, and more where scores are equal.
        removed_share: their share in the candidates.
        correct: number of samples classified correctly.
        n: number of samples evaluated.
        accuracy: correct / n, in [0, 1].
        accuracy_drop: accuracy of the whole network minus this one, in [-1, 1].
        ci_low: lower end of the 95 % Wilson interval of the accuracy.
        ci_high: upper end.
        emptied: number of layers without a channel left.
    """

    criterion: str
    replace: str
    ratio: float
    removed: int
    removed_share: float
    correct: int
    n: int
    accuracy: float
    accuracy_drop: float
    ci_low: float
    ci_high: float
    emptied: int = 0


@dataclass(frozen=True)
class MaskingReport:
    """Accuracies of a network with channels removed, without retraining.

    Attributes:
        clean: the accuracy of the whole network; None if nothing was evaluated.
        results: accuracies with masked channels, by criterion, replacement and ratio.
        masks: for each criterion and ratio which channels are kept, by module path.
        settings: the settings that determine the results, as plain values.
        left_out: the reason for each criterion that is not compared.
        table: the channels; None on processes other than the first.
        pairs: numbers of similar pairs of channels; None if nothing was evaluated.
        not_evaluated: the reason if nothing was evaluated, else empty.
    """

    clean: MaskedAccuracy | None
    results: Sequence[MaskedAccuracy]
    masks: Mapping[tuple[str, float], Mapping[str, Tensor]]
    settings: Mapping[str, Any]
    left_out: Mapping[str, str] = field(default_factory=dict)
    table: ChannelTable | None = None
    pairs: PairCounts | None = None
    not_evaluated: str = ""

    def keep(self, criterion: str, ratio: float) -> dict[str, Tensor]:
        """Return the mask of kept channels, ``(channels,)`` of bool, by module path.

        Raises:
            ConfigurationError: for a criterion or ratio that was not evaluated.
        """
        if (criterion, ratio) not in self.masks:
            known = ", ".join(f"{name} {share:g}" for name, share in self.masks) or "none"
            raise ConfigurationError(
                f"There is no mask of criterion={short_repr(criterion)}, ratio={short_repr(ratio)}; known are {known}."
            )
        return dict(self.masks[criterion, ratio])

    def pruning_idxs(self, criterion: str, ratio: float) -> dict[str, list[int]]:
        """Return the channels to prune by module path, as Torch-Pruning takes them.

        Left out are channels of a residual stream, which exist in several layers, so that pruning one prunes all of
        them; and layers of which no channel would be left.

        Raises:
            ConfigurationError: as :meth:`keep`; without a table, as on processes other than the first.

        Example:
            >>> graph = tp.DependencyGraph().build_dependency(model, example_inputs)
            >>> for name, idxs in report.pruning_idxs("share", 0.3).items():
            ...     layer = model.get_submodule(name)
            ...     graph.get_pruning_group(layer, tp.prune_batchnorm_out_channels, idxs=idxs).prune()
        """
        kept = self.keep(criterion, ratio)
        if self.table is None:
            raise ConfigurationError("Only the first process has the table of channels. Call this there.")
        found = {}
        for name, mask in kept.items():
            gone = ~mask & (self.table[name].writers == 1)
            if gone.any() and not gone.all():
                found[name] = torch.nonzero(gone).flatten().tolist()
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each condition, with the keys :data:`COLUMNS`."""
        return [{column: getattr(result, column) for column in COLUMNS} for result in self.results]

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``channels.json``, with None in place of NaN."""
        found: dict[str, Any] = {
            "settings": dict(self.settings),
            "clean": None if self.clean is None else asdict(self.clean),
            "results": self.rows(),
            "left_out": dict(self.left_out),
            "not_evaluated": self.not_evaluated,
        }
        if self.pairs is not None:
            found["pairs"] = asdict(self.pairs)
        if self.table is not None:
            found["layers"] = self.table.layer_summaries()
        plain: dict[str, Any] = finite(found)
        return plain

    def __repr__(self) -> str:
        if self.clean is None:
            return summary("MaskingReport", [f"not evaluated: {self.not_evaluated}"])
        parts = [f"{100 * self.clean.accuracy:.2f} % of {self.clean.n}", f"{len(self.results)} conditions"]
        return summary("MaskingReport", parts)

    def _table(self) -> NotebookTable:
        columns = ("criterion", "replaced by", "removed, %", "accuracy, %", "95 % interval", "drop, points")
        shown = [] if self.clean is None else [self.clean, *self.results]
        rows = [
            (
                one.criterion or "whole network",
                one.replace,
                100 * one.removed_share,
                100 * one.accuracy,
                f"{100 * one.ci_low:.2f} … {100 * one.ci_high:.2f}",
                100 * one.accuracy_drop,
            )
            for one in shown
        ]
        notes = [f"{name} is not compared: {why}" for name, why in self.left_out.items()]
        if self.not_evaluated:
            notes.append(f"not evaluated: {self.not_evaluated}")
        if shown:
            notes.insert(
                0, f"{self.settings['candidates']} of {self.settings['channels']} channels; {shown[0].n} images"
            )
        return NotebookTable("Accuracy without some channels, no retraining", columns, rows, notes)

    def _repr_html_(self) -> str:
        return self._table().to_html()

    def to_frame(self) -> Any:
        """Return the rows as a pandas data frame, indexed by criterion, with :data:`COLUMNS`.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        rows = [[row[name] for name in COLUMNS] for row in self.rows()]
        return NotebookTable("", COLUMNS, rows).to_frame("criterion")

    def __str__(self) -> str:
        """Return the table."""
        table = self._table()
        width = max(len(str(row[0])) for row in (("criterion",), *table.rows))
        lines = [f"{'criterion':{width}}  {'replaced by':11}  removed   accuracy   95 % interval     drop"]
        for criterion, replace, removed, accuracy, interval, drop in table.rows:
            numbers = f"{removed:5.1f} %  {accuracy:6.2f} %   {interval!s:15}  {drop:6.2f}"
            lines.append(f"{criterion!s:{width}}  {replace!s:11}  {numbers}")
        return "\n".join([*(lines if table.rows else []), *table.notes])
