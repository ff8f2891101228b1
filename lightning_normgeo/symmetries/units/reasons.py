"""Reasons why a weight has no units of its own."""

from __future__ import annotations

from lightning_normgeo.normalization.autograd.graph import Edge, Graph
from lightning_normgeo.normalization.autograd.nodes import name_of
from lightning_normgeo.normalization.names import layer_name
from lightning_normgeo.symmetries.degrees.nodes import COPIES, POOLINGS, VIEWS
from lightning_normgeo.symmetries.families import Family
from lightning_normgeo.symmetries.solution import Solution

_LISTED = 2
_REACHES = "it reaches the loss"
_EXCHANGED = "its scale is exchanged with that of"
_OWN_SLICES = "other slices of its own"
EXCHANGED_WITHIN = f"{_EXCHANGED} {_OWN_SLICES}"
_KEEPS_A_FACTOR = (
    COPIES
    | VIEWS
    | POOLINGS
    | {
        *("T", "Transpose", "Permute", "Expand", "Relu", "LeakyRelu", "Abs", "Neg", "NativeDropout"),
        *("Mm", "Bmm", "Convolution", "Sum", "Mean"),
    }
)
"""Operations that pass on a common factor of any of their inputs; a convolution with a bias does not add it to it."""


class Reasons:
    """Reasons why weights have no units of their own, from the families that they are in.

    Args:
        found: all generators of the graph.
    """

    def __init__(self, found: Solution) -> None:
        self._reasons = found.reasons
        reached = _with_a_factor_that_remains(found.graph)
        self._reaching = {name for node, name in found.names.items() if (node, 0) in reached}
        self._families: dict[str, list[Family]] = {}
        for family in found.families:
            for name in {member.slices.parameter for member in family.members}:
                self._families.setdefault(name, []).append(family)

    def forbidden(self, name: str) -> bool:
        """Whether it is known without a search that a weight has no units of its own.

        It is in no symmetry of the graph, or a common factor of all its elements reaches a result.
        """
        return name not in self._families or name in self._reaching

    def of(self, name: str) -> str:
        """Return the reason in words."""
        families = self._families.get(name, [])
        jointly = [family for family in families if family.role == "invariant jointly"]
        rescaled = [family for family in families if family.role == "rescaling"]
        if jointly:
            return f"invariant only together with {_others(jointly[0], name)}"
        if name in self._reaching and not jointly and not rescaled:
            return _REACHES
        if any(family.role == "invariant alone" for family in families):
            return "only some of its slices are invariant alone"
        if rescaled:
            return f"{_EXCHANGED} {_others(rescaled[0], name)}"
        if families:
            return "it has no effect on the loss"
        reason = self._reasons.get(name, _REACHES)
        return reason if reason == _REACHES else f"{reason} is in its way"


def _with_a_factor_that_remains(graph: Graph) -> set[Edge]:
    """Return tensors of which a common factor certainly reaches a result of the graph."""
    found = set(graph.results)
    for node in sorted(graph.outputs, key=graph.order.__getitem__, reverse=True):
        for edge in ((node, output) for output in graph.outputs[node]):
            readers = (reader for reader, _ in graph.readers[edge])
            if any((reader, 0) in found and name_of(reader) in _KEEPS_A_FACTOR for reader in readers):
                found.add(edge)
    return found


def _others(family: Family, name: str) -> str:
    others = [layer_name(member.slices.parameter) for member in family.members if member.slices.parameter != name]
    others = list(dict.fromkeys(others)) or [_OWN_SLICES]
    more = len(others) - _LISTED
    return ", ".join(others[:_LISTED]) + (f" and {more} more" if more > 0 else "")
