"""Probe of scale symmetries, which reads all parameters before and after an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_normgeo.errors import warn_once
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.probes.symmetries.parameters import ParametersBefore
from lightning_normgeo.probes.symmetries.step import SymmetryStep, joined
from lightning_normgeo.symmetries.search import symmetries_in
from lightning_normgeo.symmetries.symmetries import Symmetries

_GRAPHS = 16
_REFUTED_ABOVE = 1e-2
"""Root mean square charge of a family above which it can be refuted: rounding leaves 1e-6 in float32, and up to 1e-2
under bf16 autocast."""
_REFUTED_SHARE = 0.1
"""Share of the terms that has to remain for a family to be refuted."""


class SymmetryProbe:
    """Finds the symmetries in the graphs of measured steps, and reads the parameters before and after each step.

    Attributes:
        symmetries: those of the graphs since :meth:`forget`; None without any, or if graphs differ.
        differ: whether graphs of one step have different symmetries.
        refuted: texts of families that measurements have refuted.
    """

    def __init__(self) -> None:
        self.symmetries: Symmetries | None = None
        self.differ = False
        self.refuted: set[str] = set()
        self._known: dict[tuple[Any, ...], tuple[Symmetries, dict[str, nn.Parameter]]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._before: ParametersBefore | None = None
        self._steps: list[SymmetryStep] = []

    @property
    def knows_graphs(self) -> bool:
        """Whether some graph has been searched, with what is known about its constants."""
        return bool(self._known)

    def forget(self) -> None:
        """Forget the graphs of the last step."""
        self.symmetries, self.differ = None, False
        self._before, self._steps = None, []

    def read(self, module: nn.Module, graph: Graph) -> None:
        """Add the symmetries of a graph, before its backward pass."""
        if graph.signature not in self._known:
            parameters = by_clean_name(module.named_parameters())
            found = symmetries_in(graph, module), parameters
            if len(self._known) < _GRAPHS:
                self._known[graph.signature] = found
        else:
            found = self._known[graph.signature]
        if self.symmetries is not None and self.symmetries is not found[0]:
            self.differ = True
        self.symmetries, self._parameters = found

    def refute(self, charges: Mapping[str, float], uncanceled: Mapping[str, float]) -> set[str]:
        """Return the families that their charges refute, with one warning; they are left out from now on.

        Families on single layers are left to the check of units, which knows the ε of batch normalizations.

        Args:
            charges: root mean square charge of each family.
            uncanceled: the same of charges whose terms do not cancel.
        """
        families = {} if self.symmetries is None else {str(f): f for f in self.symmetries.families}
        found = {
            name
            for name, charge in charges.items()
            if charge > max(_REFUTED_ABOVE, _REFUTED_SHARE * uncanceled.get(name, 1.0))
            and name in families
            and families[name].role != "invariant alone"
        }
        if found:
            self.refuted |= found
            largest = max(charges[name] for name in found)
            warn_once(
                f"{len(found)} families of scale symmetries are left out from here on: the graph shows them, and the "
                f"numbers refute them, with charges up to {largest:.2g}: {min(found)}. Likely reasons: something that "
                "changes gradients (a hook, clipping by value), or the ε of a normalization."
            )
        return found

    def drop(self) -> None:
        """Forget a step that no single gradient describes."""
        self._before = None

    def before(self, optimizer: Optimizer) -> None:
        """Read weights and gradients: gradients are final, the update has not begun."""
        if self.symmetries is not None and not self.differ and len(self.symmetries):
            self._before = ParametersBefore.read(self.symmetries, self._parameters, optimizer)

    def after(self) -> None:
        """Read the weights after the update."""
        if self._before is not None and self.symmetries is not None:
            step = self._before.compared(self.symmetries, self._parameters, self.refuted)
            self._steps += [] if step is None else [step]
        self._before = None

    def collect(self) -> SymmetryStep | None:
        """Return the steps of all optimizers since :meth:`forget` as one; None if nothing was read."""
        steps, self._steps = self._steps, []
        return joined(steps) if steps else None
