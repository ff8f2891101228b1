"""Tracker of the scale-invariant units of all weights, found anew from the autograd graphs of every measured step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_normgeo.callbacks._monitors.units.combined_units import CombinedUnits, by_name
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
        self._refuted: set[str] = set()
        self._unseen: set[str] = set()
        self.scales: dict[str, nn.Parameter] = {}
        self._step = CombinedUnits(self.scales)
        self.guessed = False
        self.searched = 0
        self.asks_for_constants = False
        self.symmetries: Symmetries | None = None
        self._constants: ZeroConstants | None = None
        self._known: dict[tuple[Any, ...], _Searched] = {}

    @property
    def weights(self) -> list[Observed]:
        """Every weight found since :meth:`forget`, with its units."""
        return list(self._step.weights.values())

    @property
    def in_graphs(self) -> list[Observed]:
        """The same without those that no graph contained, of whose units nothing is known."""
        return [one for name, one in self._step.weights.items() if name not in self._unseen]

    @property
    def sharded(self) -> bool:
        """Whether the model is sharded, so that this process has only a part of each weight."""
        return self._parameters is not None

    def forget(self) -> None:
        """Forget the weights of the last step; layers may since have been frozen, unfrozen or added."""
        self._step, self._unseen = CombinedUnits(self.scales), set()
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
        self._step.add(found.observed, {id(leaf.variable) for leaf in graph.leaves})

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
        self._step.weights = self._all_believed(self._step.weights)
        self._known = {
            key: replace(known, observed=self._all_believed(known.observed)) for key, known in self._known.items()
        }

    def _all_believed(self, found: Mapping[str, Observed]) -> dict[str, Observed]:
        return by_name([control for one in found.values() for control in self._believed(one)])

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
        self._step.weights |= by_name(found)
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
            observed |= by_name(self._believed(Observed(one, parameters[one.parameter], bias, partners)))
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
