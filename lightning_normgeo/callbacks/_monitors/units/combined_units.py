"""Units of the weights behind all losses of one optimizer step, whose gradients add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lightning_normgeo.probes.weight_step import Observed

_DIFFERENT = "the graphs of one step have different units for it"
_THAWED = "its bias has a gradient from graphs that it was frozen in"


class CombinedUnits:
    """The weights in all graphs of one step, each with the units that are invariant in every graph with it.

    Args:
        scales: the γ of batch normalizations that follow weights, by name.

    Attributes:
        weights: the weights by name.
    """

    def __init__(self, scales: Mapping[str, nn.Parameter]) -> None:
        self.weights: dict[str, Observed] = {}
        self._scales = scales

    def add(self, found: Mapping[str, Observed], leaves: set[int]) -> None:
        """Combine the units of a graph with those of earlier graphs, for weights that have a gradient.

        Args:
            found: the weights of the graph, by name.
            leaves: ids of the parameters in it.
        """
        for name, one in self.weights.items():
            scale = None if one.units.scale is None else self._scales.get(one.units.scale)
            other = None if name not in found else found[name].units.scale
            if scale is not None and id(scale) in leaves and other != one.units.scale:
                # in this graph γ belongs to another weight, which its gradient then includes
                self.weights[name] = replace(one, units=replace(one.units, scale=None))
        found = self._compatible(found, leaves)
        for name, one, before in self._with_those_before(found):
            if one.bias is not None and one.weight.grad is None and one.bias.grad is not None:
                one = one.as_control(_THAWED)
            fresh = before is None or one.weight.grad is None
            scale = None if one.units.scale is None else self._scales.get(one.units.scale)
            if one.weight.grad is None and scale is not None and scale.grad is not None:
                # γ's gradient comes from graphs without this weight
                one = replace(one, units=replace(one.units, scale=None))
            self.weights[name] = one if fresh or before is None else _joined(before, one)

    def _compatible(self, found: Mapping[str, Observed], leaves: set[int]) -> Mapping[str, Observed]:
        """Return the weights of a graph without joint units that another graph of the step contradicts.

        A gradient is the sum over all graphs, so that each graph with one of the parameters must have the same units.
        """
        earlier = {name: one for name, one in self.weights.items() if one.partners}
        for name, one in earlier.items():
            touched = any(id(parameter) in leaves for parameter in one.parameters)
            if touched and (name not in found or found[name].units != one.units):
                del self.weights[name]
                self.weights |= by_name(one.apart(_DIFFERENT))
        before = {id(parameter): one.units for one in self.weights.values() for parameter in one.parameters}
        kept: list[Observed] = []
        for one in found.values():
            contradicted = False
            if one.partners:
                other = any(before.get(id(parameter), one.units) != one.units for parameter in one.parameters)
                contradicted = other or len({parameter.grad is None for parameter in one.parameters}) > 1
            kept += one.apart(_DIFFERENT) if contradicted else [one]
        return self._cut_alike(kept)

    def _cut_alike(self, found: Sequence[Observed]) -> dict[str, Observed]:
        """Return the weights of a graph; as whole controls those that another graph of the step cuts differently."""
        before = _parts_of(self.weights.values())
        now = _parts_of(found) if before else {}
        apart = {key for key in before.keys() & now.keys() if before[key] != now[key]}
        if not apart:
            return by_name(found)
        self.weights = {name: one for name, one in self.weights.items() if id(one.weight) not in apart}
        whole = {id(one.weight): one.whole(_DIFFERENT) for one in found if id(one.weight) in apart}
        return by_name([*(one for one in found if id(one.weight) not in apart), *whole.values()])

    def _with_those_before(self, found: Mapping[str, Observed]) -> list[tuple[str, Observed, Observed | None]]:
        """Return each weight with its units in earlier graphs of the step, which are matched by parameter, not by name.

        Within a step a weight may be renamed, as by pruning, and another one may get its name.
        """
        known = {(id(one.weight), one.units.part): (name, one) for name, one in self.weights.items()}
        pairs: list[tuple[str, Observed, Observed | None]] = []
        for name, one in found.items():
            called, before = known.get((id(one.weight), one.units.part), (name, None))
            if before is not None and called != name:
                self.weights.pop(called, None)
                before = replace(before, units=replace(before.units, name=name))
            pairs.append((name, one, before))
        return pairs


def by_name(found: Iterable[Observed]) -> dict[str, Observed]:
    """Return weights by the names of their units."""
    return {one.units.name: one for one in found}


def _parts_of(found: Iterable[Observed]) -> dict[int, set[tuple[int, int] | None]]:
    """Return the parts into which each weight is cut, by id."""
    parts: dict[int, set[tuple[int, int] | None]] = {}
    for one in found:
        parts.setdefault(id(one.weight), set()).add(one.units.part)
    return parts


def _joined(first: Observed, second: Observed) -> Observed:
    """Return the units that are invariant in both graphs, and therefore for the sum of their losses."""
    a, b = first.units, second.units
    if a == b or not a.invariant:
        return first
    if not b.invariant:
        return second
    if (a.dim, a.groups, a.bias) != (b.dim, b.groups, b.bias):
        return first.as_control(_DIFFERENT)
    coarse, fine = (a, b) if a.count <= b.count else (b, a)
    if fine.count % coarse.count:
        return first.as_control(_DIFFERENT)
    return replace(first, units=replace(coarse, scale=a.scale if a.scale == b.scale else None))
