"""Whether gradients are as backward passes have left them, told from their version counters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class GradientWatch:
    """Notes which gradients somebody has changed or replaced since their backward pass.

    Every operation in place counts a tensor's version up; nothing is read on the device. A change through ``.data``
    escapes it.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[int, int]] = {}
        self._touched: set[int] = set()

    def forget(self) -> None:
        """Begin with another step."""
        self._left, self._touched = {}, set()

    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember gradients right after a backward pass."""
        self._left = {id(p): (id(p.grad), p.grad._version) for p in parameters if p.grad is not None}

    def look(self, parameters: Iterable[nn.Parameter]) -> None:
        """See what has been changed, before another backward pass or the update."""
        for parameter in parameters:
            gradient, left = parameter.grad, self._left.get(id(parameter))
            if gradient is None:
                self._touched.discard(id(parameter))
            elif left is not None and left != (id(gradient), gradient._version):
                self._touched.add(id(parameter))

    def alike(self, weight: nn.Parameter, scale: nn.Parameter, together: bool) -> bool:
        """Whether W and γ have gradients with a common factor: both untouched, or both changed by one hand.

        Args:
            weight: W.
            scale: γ.
            together: whether one optimizer moves both.
        """
        self.look((weight, scale))
        touched = {id(weight) in self._touched, id(scale) in self._touched}
        return touched == {False} or (touched == {True} and together)
