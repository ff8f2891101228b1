"""Tracker of the scale-invariant units of all weights, found anew from the autograd graphs of every measured step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_normgeo.errors import warn_once
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.autograd.zero_constants import ZeroConstants
from lightning_normgeo.normalization.names import by_clean_name, has_rows
from lightning_normgeo.probes.sharded.unsharded import UnshardedParameters
from lightning_normgeo.probes.weight_step import Observed
from lightning_normgeo.symmetries import Symmetries
from lightning_normgeo.symmetries.units.discovery import REENTRANT, search
from lightning_normgeo.symmetries.units.weight_units import WeightUnits

_GRAPHS = 16
"""Number of graphs to remember, those seen last: recognizing one takes a tenth of the time of reading a new one."""
_DIFFERENT = "the graphs of one step have different units for it"
_THAWED = "its bias has a gradient from graphs that it was frozen in"
REFUTED = "refuted by the numbers"


@dataclass(frozen=True)
class _Searched:
    """Results of the search in one graph.

    Attributes:
        observed: the weights by name.
        symmetries: the symmetries; None if the graph is opaque.
        leaves: the parameters, which are kept alive: signatures contain their ids, which Python could otherwise reuse.
    """

    observed: dict[str, Observed]
    symmetries: Symmetries | None
    leaves: list[Tensor]


class UnitTracker:
    """The units of the weights behind the losses of one optimizer step.

    A weight is invariant only if it is invariant in every graph that contributed to its gradient: those of all backward
    passes, losses and micro-batches since the gradient was last None.

    Args:
        parameters: the parameters of a model sharded by fully_shard, by name. Default: None, not sharded.
        unsharded: tracker of the unsharded parameters of such a model. Default: None, not sharded.

    Attributes:
        scales: the γ of the batch normalizations that follow weights, by name.
        guessed: whether the units are guessed from the order of layers, as under ``torch.compile``.
        searched: the number of graphs that were not recognized and had to be read.
        symmetries: the scale symmetries of the last graph; None if it is opaque or was not searched.
        asks_for_constants: whether units depend on constants whose values graphs do not contain;
            :meth:`watch_constants` records them.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter] | None = None, unsharded: UnshardedParameters | None = None
    ) -> None:
        self._parameters = parameters
        self._unsharded = unsharded
        self._found: dict[str, Observed] = {}
        self._refuted: set[str] = set()
        self._unseen: set[str] = set()
        self.scales: dict[str, nn.Parameter] = {}
        self.guessed = False
        self.searched = 0
        self.asks_for_constants = False
        self.symmetries: Symmetries | None = None
        self._constants: ZeroConstants | None = None
        self._known: dict[tuple[Any, ...], _Searched] = {}

    @property
    def weights(self) -> list[Observed]:
        """Every weight found since :meth:`forget`, with its units."""
        return list(self._found.values())

    @property
    def in_graphs(self) -> list[Observed]:
        """The same without those that no graph contained, of whose units nothing is known."""
        return [one for name, one in self._found.items() if name not in self._unseen]

    @property
    def sharded(self) -> bool:
        """Whether the model is sharded, so that this process has only a part of each weight."""
        return self._parameters is not None

    def forget(self) -> None:
        """Forget the weights of the last step; layers may since have been frozen, unfrozen or added."""
        self._found, self._unseen = {}, set()
        if self._unsharded is not None:
            self._unsharded.watch()

    def rest(self) -> None:
        """Stop tracking unsharded parameters until :meth:`forget`."""
        if self._unsharded is not None:
            self._unsharded.rest()

    def watch_constants(self, reads: bool) -> None:
        """Record the constants of the next forward passes: an ε, or a graph network's buffer of zeros for messages.

        Args:
            reads: whether to read tensors, which waits for the device; otherwise only numbers are known.
        """
        self.leave_constants()
        self._constants = ZeroConstants(reads)
        self._constants.begin()

    def leave_constants(self) -> None:
        """Stop recording constants."""
        constants, self._constants = self._constants, None
        if constants is not None:
            constants.leave()

    def read(self, module: nn.Module, loss: Tensor) -> None:
        """Add the weights in the graph of ``loss``, before its backward pass; losses of one step are combined."""
        constants = None if self._constants is None else self._constants.records()
        unsharded = None if self._unsharded is None else self._unsharded.names
        graph = Graph(loss, unsharded=unsharded, constants=constants)
        found = self._known.pop(graph.signature, None)
        if found is None:
            found = self._search(module, graph)
        else:
            self._known[graph.signature] = found  # last in order: the graph that was seen longest ago goes first
            self.asks_for_constants = False
        self.symmetries = found.symmetries
        self._add(found.observed, {id(leaf.variable) for leaf in graph.leaves})

    def report_none(self) -> None:
        """Warn once if a step has no invariant weight; not if some were refuted, for which there is another warning."""
        seen = [one.units for one in self.in_graphs]
        settled = not self._refuted and not self.asks_for_constants
        if seen and settled and not any(units.invariant for units in seen):
            listed = "; ".join(sorted({units.reason for units in seen})[:3])
            warn_once(f"None of {len(seen)} weights is scale invariant; all are controls: {listed}.")

    def refute(self, names: Iterable[str]) -> None:
        """Treat weights as controls from now on, whatever later graphs show."""
        self._refuted.update(names)
        self._found = self._all_believed(self._found)
        self._known = {
            key: replace(known, observed=self._all_believed(known.observed)) for key, known in self._known.items()
        }

    def _all_believed(self, found: Mapping[str, Observed]) -> dict[str, Observed]:
        return _by_name([control for one in found.values() for control in self._believed(one)])

    def unseen(self, module: nn.Module, parameters: Sequence[nn.Parameter], reason: str) -> list[Observed]:
        """Return weights that have gradients but are in no graph, as controls with this reason."""
        weights = [parameter for parameter in parameters if has_rows(parameter)]
        if not weights:
            return []
        names = {id(parameter): name for name, parameter in by_clean_name(module.named_parameters()).items()}
        found = []
        for parameter in weights:
            name = names.get(id(parameter))
            if name is not None:
                units = WeightUnits(name=name, kind="none", count=parameter.shape[0], reason=reason)
                found.append(Observed(units, parameter))
        self._found |= _by_name(found)
        self._unseen.update(one.units.name for one in found)
        return found

    def _search(self, module: nn.Module, graph: Graph) -> _Searched:
        """Find the units in a graph that was not recognized, and remember it if it can occur again."""
        self.searched += 1
        symmetries, units = search(module, graph, joint=not self.sharded)
        self.guessed = symmetries is None
        hidden = [one.name for one in units if one.reason == REENTRANT]
        if hidden:
            message = f"{len(hidden)} weights are controls: {REENTRANT} that could not be looked into ({hidden[0]})"
            warn_once(f"{message}. Choose use_reentrant=False to have their units found.", about=REENTRANT)
        parameters = self._parameters or by_clean_name(module.named_parameters())
        observed: dict[str, Observed] = {}
        for one in units:
            bias = None if one.bias is None else parameters[one.bias]
            partners = tuple(parameters[own.name] for own in one.partners)
            observed |= _by_name(self._believed(Observed(one, parameters[one.parameter], bias, partners)))
            if one.scale is not None and self._parameters is None:
                self.scales[one.scale] = parameters[one.scale]
        # a graph with other leaves, such as an attacked image, would be kept in memory but never recognized
        own = {id(parameter) for parameter in parameters.values()} | (graph.unsharded or {}).keys()
        repeats = not self.guessed and all(id(leaf.variable) in own for leaf in graph.leaves)
        found = _Searched(observed, symmetries, [leaf.variable for leaf in graph.leaves])
        asks = bool(graph.constants.asked)
        self.asks_for_constants |= asks  # until a graph is recognized: others may follow that are as new as this one
        if repeats and not asks:
            if len(self._known) == _GRAPHS:
                del self._known[next(iter(self._known))]
            self._known[graph.signature] = found
        return found

    def _believed(self, one: Observed) -> list[Observed]:
        """Return the weight, or controls if measurements have refuted its invariance."""
        if one.units.name not in self._refuted or not one.units.invariant:
            return [one]
        return one.apart(REFUTED)

    def _add(self, found: Mapping[str, Observed], leaves: set[int]) -> None:
        """Combine the units of a graph with those of the step's earlier graphs, for weights that have a gradient."""
        for name, one in self._found.items():
            scale = None if one.units.scale is None else self.scales.get(one.units.scale)
            other = None if name not in found else found[name].units.scale
            if scale is not None and id(scale) in leaves and other != one.units.scale:
                # in this graph γ belongs to another weight, which its gradient then includes
                self._found[name] = replace(one, units=replace(one.units, scale=None))
        found = self._compatible(found, leaves)
        for name, one, before in self._with_those_before(found):
            if one.bias is not None and one.weight.grad is None and one.bias.grad is not None:
                one = one.as_control(_THAWED)
            fresh = before is None or one.weight.grad is None
            scale = None if one.units.scale is None else self.scales.get(one.units.scale)
            if one.weight.grad is None and scale is not None and scale.grad is not None:
                # γ's gradient comes from graphs without this weight
                one = replace(one, units=replace(one.units, scale=None))
            self._found[name] = one if fresh or before is None else _joined(before, one)

    def _compatible(self, found: Mapping[str, Observed], leaves: set[int]) -> Mapping[str, Observed]:
        """Return the weights of a graph without joint units that another graph of the step contradicts.

        A gradient is the sum over all graphs, so that each graph with one of the parameters must have the same units.
        """
        earlier = {name: one for name, one in self._found.items() if one.partners}
        for name, one in earlier.items():
            touched = any(id(parameter) in leaves for parameter in one.parameters)
            if touched and (name not in found or found[name].units != one.units):
                del self._found[name]
                self._found |= _by_name(one.apart(_DIFFERENT))
        before = {id(parameter): one.units for one in self._found.values() for parameter in one.parameters}
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
        before = _parts_of(self._found.values())
        now = _parts_of(found) if before else {}
        apart = {key for key in before.keys() & now.keys() if before[key] != now[key]}
        if not apart:
            return _by_name(found)
        self._found = {name: one for name, one in self._found.items() if id(one.weight) not in apart}
        whole = {id(one.weight): one.whole(_DIFFERENT) for one in found if id(one.weight) in apart}
        return _by_name([*(one for one in found if id(one.weight) not in apart), *whole.values()])

    def _with_those_before(self, found: Mapping[str, Observed]) -> list[tuple[str, Observed, Observed | None]]:
        """Return each weight with its units in earlier graphs of the step, which are matched by parameter, not by name.

        Within a step a weight may be renamed, as by pruning, and another one may get its name.
        """
        known = {(id(one.weight), one.units.part): (name, one) for name, one in self._found.items()}
        pairs: list[tuple[str, Observed, Observed | None]] = []
        for name, one in found.items():
            called, before = known.get((id(one.weight), one.units.part), (name, None))
            if before is not None and called != name:
                self._found.pop(called, None)
                before = replace(before, units=replace(before.units, name=name))
            pairs.append((name, one, before))
        return pairs


def _parts_of(found: Iterable[Observed]) -> dict[int, set[tuple[int, int] | None]]:
    """Return the parts into which each weight is cut, by id."""
    parts: dict[int, set[tuple[int, int] | None]] = {}
    for one in found:
        parts.setdefault(id(one.weight), set()).add(one.units.part)
    return parts


def _by_name(found: Iterable[Observed]) -> dict[str, Observed]:
    return {one.units.name: one for one in found}


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
