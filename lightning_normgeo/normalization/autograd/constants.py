"""Constants of a forward pass, as far as they are known: an autograd graph does not contain their values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Constants:
    """Records of the constants of a forward pass, and the questions about constants that nobody has recorded.

    ``zeros.scatter_add(0, index, y)`` and ``x.scatter_add(0, index, y)`` with constants ``zeros`` and x have the same
    graph. The first is homogeneous in y, the second a residual sum.

    Attributes:
        recorded: whether everything is known: the forward pass ran under :class:`.ZeroConstants`.
        zeros: nodes of operations whose constants are all zero.
        shifting: nodes of products with a number, and of masks that fill in −∞ or nearly so, as in front of a softmax.
            If a constant is added to their input, the result is shifted by a constant as well.
        added: nodes of sums with a constant, and the shape of the constant.
        epsilons: nodes of sums with a tiny constant.
        inspected: nodes of which everything is known, although not all constants were read.
        asked: nodes about which something was asked that is not known.
    """

    recorded: bool = False
    zeros: Collection[Any] = frozenset()
    shifting: Collection[Any] = frozenset()
    added: Mapping[Any, tuple[int, ...]] = field(default_factory=dict)
    epsilons: Collection[Any] = frozenset()
    inspected: Collection[Any] = frozenset()
    asked: set[Any] = field(default_factory=set)

    def are_zero(self, node: Any) -> bool:
        """Whether the constants of an operation are known to be zero."""
        return self._known(node) and node in self.zeros

    def let_shifts_through(self, node: Any) -> bool:
        """Whether the result of an operation is known to be shifted by a constant if its input is."""
        return self._known(node) and node in self.shifting

    def shape_of_addend(self, node: Any) -> tuple[int, ...] | None:
        """Return the shape of the constant that is added; None if it is not known."""
        return self.added.get(node) if self._known(node) else None

    def are_tiny(self, node: Any) -> bool:
        """Whether the constant that is added is known to be as small as an ε."""
        return self._known(node) and node in self.epsilons

    def _known(self, node: Any) -> bool:
        known = self.recorded or node in self.inspected
        if not known and any(source is None for source, _ in node.next_functions):
            self.asked.add(node)
        return known
