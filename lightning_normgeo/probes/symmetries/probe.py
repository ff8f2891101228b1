"""Probe of scale symmetries, which reads all parameters before and after an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import warn_once
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.probes.symmetries.parameters import ParametersBefore, SliceStep
from lightning_normgeo.probes.symmetries.step import Generators, SymmetryStep, by_generator, joined
from lightning_normgeo.symmetries.symmetries import Symmetries

_REFUTED_ABOVE = 1e-2
"""Root mean square charge of a family above which it can be refuted: rounding leaves 1e-6 in float32, and up to 1e-2
under bf16 autocast."""
_REFUTED_SHARE = 0.1
"""Share of the terms that has to remain for a family to be refuted."""


class _Found(NamedTuple):
    """The symmetries of one graph, with the parameters of the model by name."""

    symmetries: Symmetries
    parameters: dict[str, nn.Parameter]

    def gradients(self) -> Iterator[Tensor | None]:
        """Yield the gradients of the parameters in the graph."""
        return (self.parameters[name].grad for name in self.symmetries.parameters)


class SymmetryProbe:
    """Reads the parameters that the symmetries of a measured step scale, before and after the step.

    Attributes:
        refuted: texts of families that measurements have refuted.
    """

    def __init__(self) -> None:
        self.refuted: set[str] = set()
        self._graphs: list[_Found] = []
        self._before: list[ParametersBefore] = []
        self._steps: list[SliceStep] = []
        self._buffers: dict[int, Tensor] = {}
        self._generators: dict[tuple[Any, ...], Generators] = {}

    @property
    def has_symmetries(self) -> bool:
        """Whether the graphs of the step have scale symmetries, measured or not."""
        return any(len(one.symmetries) for one in self._graphs)

    def forget(self) -> None:
        """Forget the graphs of the last step."""
        self._graphs, self._before, self._steps = [], [], []

    def read(self, module: nn.Module, symmetries: Symmetries) -> None:
        """Add the symmetries of a graph, before its backward pass."""
        found = _Found(symmetries, by_clean_name(module.named_parameters()))
        # graphs whose gradients have been set to None since then do not contribute to the next step
        self._graphs = [one for one in self._graphs if any(g is not None for g in one.gradients())]
        if not any(one.symmetries is found.symmetries for one in self._graphs):
            self._graphs.append(found)

    def refute(self, charges: Mapping[str, float], uncanceled: Mapping[str, float]) -> set[str]:
        """Return the families that their charges refute, with one warning; they are left out from now on.

        Families on single layers are left to the check of units, which knows the ε of batch normalizations.

        Args:
            charges: root mean square charge of each family.
            uncanceled: the same of charges whose terms do not cancel.
        """
        families = {str(family): family for one in self._graphs for family in one.symmetries.families}
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
        self._before = []

    def before(self, optimizer: Optimizer) -> None:
        """Read weights and gradients before an optimizer's step.

        The gradient of a parameter is the sum over all graphs that it is in. A symmetry counts only if no graph with
        other symmetries has one of its parameters.
        """
        for one in self._graphs:
            others = {name for other in self._graphs if other is not one for name in other.symmetries.parameters}
            if len(one.symmetries):
                self._before.append(ParametersBefore(one.symmetries, one.parameters, optimizer, others, self._buffers))

    def after(self) -> None:
        """Read the weights after the step."""
        before, self._before = self._before, []
        self._steps += [one.finished() for one in before]
        # an accelerator's allocator has the memory at hand for the next time, and training needs it in between
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if buffer.is_cpu}

    def collect(self) -> SymmetryStep | None:
        """Return the steps of all optimizers since :meth:`forget` as one; None if nothing was read."""
        steps, self._steps = self._steps, []
        by_graph: dict[int, SliceStep] = {}
        for step in steps:
            key = id(step.symmetries)
            by_graph[key] = by_graph[key].with_another(step) if key in by_graph else step
        found = [by_generator(step, self.refuted, self._generators) for step in by_graph.values()]
        measured = [step for step in found if step is not None]
        return joined(measured) if measured else None
