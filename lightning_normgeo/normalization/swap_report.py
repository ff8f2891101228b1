"""What swap_norm did, as a value that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Change:
    """One replaced normalization layer.

    Attributes:
        name: module path of the layer.
        before: the layer that was there.
        after: what is there now.
        weights: module paths of the layers whose weights were parametrized for it.
        note: what was folded, lost or left to do.
    """

    name: str
    before: str
    after: str
    weights: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class LeftAlone:
    """One normalization layer that is as it was, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap_norm` changed.

    Attributes:
        to: the normalization asked for.
        changes: the layers that were replaced, a shared one under each of its names.
        left: the layers that were left alone.
        parameters_before: number of parameter values of the model before.
        parameters_after: and after.
        traced: whether what feeds each layer was seen in a forward pass, or else guessed from the order of
            registration; None where weights have no part in the swap.
    """

    to: str
    changes: tuple[Change, ...]
    left: tuple[LeftAlone, ...]
    parameters_before: int
    parameters_after: int
    traced: bool | None = None

    def __str__(self) -> str:
        """Return the report as text, one line per layer."""
        names = [change.name for change in self.changes] + [entry.name for entry in self.left]
        width = max(map(len, names), default=0)
        lines = [
            f"to {self.to}: {len(self.changes)} {'layer' if len(self.changes) == 1 else 'layers'} changed, "
            f"{len(self.left)} left alone, {self.parameters_before:,} -> {self.parameters_after:,} parameters"
        ]
        if self.traced is not None:
            guess = "the order of registration, a guess; with example_batch the model is traced"
            lines.append(f"  weights in front found by {'a forward pass' if self.traced else guess}")
        for change in self.changes:
            weights = f", weights of {', '.join(change.weights)}" if change.weights else ""
            note = f" ({change.note})" if change.note else ""
            lines.append(f"  {change.name:{width}}  {change.before} -> {change.after}{weights}{note}")
        lines += [f"  {entry.name:{width}}  left alone: {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def describe(layer: nn.Module) -> str:
    """Return what a layer is, in short."""
    if type(layer) is nn.Sequential:
        return " + ".join(describe(child) for child in layer)
    return type(layer).__name__ + (f"({layer.num_groups} groups)" if isinstance(layer, nn.GroupNorm) else "")
