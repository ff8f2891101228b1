"""Report of a normalization swap, which prints as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_normgeo.normalization.registry import NORMS
from lightning_normgeo.normalization.surgery.function_change import LAYER_KEPT, MODEL_KEPT
from lightning_normgeo.utilities.notebook import NotebookTable, summary


@dataclass(frozen=True)
class Change:
    """One replaced normalization layer.

    Attributes:
        name: module path of the layer.
        before: description of the old layer.
        after: description of the new layer.
        weights: module paths of the layers whose weights were parametrized for it.
        note: parameters and statistics that were folded, dropped or added, and steps left to the user, in words.
        change: relative change ‖y' - y‖ / ‖y‖ of the layer's outputs in evaluation mode, for the inputs that it had
            before the swap; None where it could not be measured. See
            :mod:`~lightning_normgeo.normalization.surgery.function_change`.
    """

    name: str
    before: str
    after: str
    weights: tuple[str, ...]
    note: str
    change: float | None = None

    def __repr__(self) -> str:
        changed = [] if self.change is None else [f"changed by {self.change:.2g}"]
        return summary("Change", [repr(self.name), f"{self.before} -> {self.after}", *changed])


@dataclass(frozen=True)
class LeftAlone:
    """One normalization layer that was not replaced.

    Attributes:
        name: module path of the layer.
        reason: why it was not replaced, in words.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """Report of the changes that :func:`swap_norm` made to a model.

    Attributes:
        to: name of the new normalization.
        changes: the layers that were replaced, a shared one under each of its names.
        left: the layers that were not replaced.
        parameters_before: number of parameter values of the model before the swap.
        parameters_after: number of parameter values after the swap.
        traced: True if the layers that feed each normalization were found by a forward pass, False if by the order in
            Sequentials; None if the swap does not involve weights.
        change: relative change ‖y' - y‖ / ‖y‖ of the model's outputs in evaluation mode, the largest among its outputs;
            None where it could not be measured.
        unmeasured: why it could not be measured, in words; None otherwise.
        example: shapes of the example that was generated for the measurement; None if the user gave one, or if no
            generated example was accepted.
        keeps: whether every replaced layer was expected to compute the same function as before in evaluation mode.
    """

    to: str
    changes: tuple[Change, ...]
    left: tuple[LeftAlone, ...]
    parameters_before: int
    parameters_after: int
    traced: bool | None = None
    change: float | None = None
    unmeasured: str | None = None
    example: str | None = None
    keeps: bool = False

    def __repr__(self) -> str:
        if self.change is None:
            function = "not measured"
        elif self.kept:
            function = "kept"
        else:
            function = f"changed by {self.change:.2g}"
        counts = [f"to {self.to}: {len(self.changes)} changed", f"{len(self.left)} left alone"]
        return summary("SwapReport", [*counts, f"function {function}"])

    def _table(self) -> NotebookTable:
        columns = ("layer", "before", "after", "weights", "note", "change")
        rows: list[tuple[object, ...]] = [
            (c.name, c.before, c.after, ", ".join(c.weights), c.note, c.change) for c in self.changes
        ]
        rows += [(entry.name, "", "left alone", "", entry.reason, None) for entry in self.left]
        parameters = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return NotebookTable(
            f"To {self.to}, {parameters}", columns, rows, [f"function in evaluation mode: {self._verdict}"]
        )

    def _repr_html_(self) -> str:
        return self._table().to_html()

    def to_frame(self) -> Any:
        """Return a pandas data frame indexed by layer: before, after, weights, note, and the change of its outputs.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        return self._table().to_frame("layer")

    def __str__(self) -> str:
        """Return the report as text, one line per layer."""
        names = [change.name for change in self.changes] + [entry.name for entry in self.left]
        width = max(map(len, names), default=0)
        lines = [
            f"to {self.to}: {len(self.changes)} {'layer' if len(self.changes) == 1 else 'layers'} changed, "
            f"{len(self.left)} left alone, {self.parameters_before:,} -> {self.parameters_after:,} parameters"
        ]
        lines.append(f"  function in evaluation mode: {self._verdict}")
        if self.traced is not None:
            seen = "a forward pass" if self.traced else "the order in Sequentials alone, since the model was not run"
            lines.append(f"  weights in front found by {seen}")
        for change in self.changes:
            weights = f", weights of {', '.join(change.weights)}" if change.weights else ""
            notes = [change.note] if change.note else []
            if change.change is not None and change.change > LAYER_KEPT:
                notes.append(f"changed by {change.change:.2g} of its size")
            note = f" ({', '.join(notes)})" if notes else ""
            lines.append(f"  {change.name:{width}}  {change.before} -> {change.after}{weights}{note}")
        lines += [f"  {entry.name:{width}}  left alone: {entry.reason}" for entry in self.left]
        return "\n".join(lines)

    @property
    def kept(self) -> bool | None:
        """Whether all relative changes in evaluation mode are at most 1e-3; None if they were not measured."""
        return None if self.change is None else max(self.change, self._largest) <= MODEL_KEPT

    @property
    def _largest(self) -> float:
        return max((change.change for change in self.changes if change.change is not None), default=0.0)

    @property
    def _verdict(self) -> str:
        if self.change is None:
            return f"not measured: {self.unmeasured}"
        where = "" if self.example is None else f", on noise made up here, {self.example}"
        if self.kept:
            return f"kept (relative change {self.change:.1g}{where})"
        # a change inside may not reach the outputs for this example, as behind an activation that saturates
        inside = f", its layers by up to {self._largest:.2g}" if self.change <= MODEL_KEPT else ""
        scope = "keeps that of batch normalizations alone" if NORMS[self.to].folds else "does not keep it"
        meant = "" if self.keeps else f", {self.to} {scope}"
        changed = [change.name for change in self.changes if (change.change or 0.0) > LAYER_KEPT]
        names = f" by {', '.join(changed)}" if len(changed) in (1, 2, 3) and len(changed) < len(self.changes) else ""
        return f"changed by {self.change:.2g} of its size{names}{inside}{meant}{where}"


def describe(layer: nn.Module) -> str:
    """Return a short description of a layer."""
    if type(layer) is nn.Sequential:
        return " + ".join(describe(child) for child in layer)
    return type(layer).__name__ + (f"({layer.num_groups} groups)" if isinstance(layer, nn.GroupNorm) else "")
