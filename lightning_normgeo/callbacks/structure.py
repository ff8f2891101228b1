"""Which weights are measured as what: read from the graph of every measured step, so that it is always up to date."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_normgeo.callbacks.readings import Reading, Row
from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.orthogonality import cosine
from lightning_normgeo.normalization.units import WeightUnits, clean_name, find_units
from lightning_normgeo.probes.step import WeightStep

_CONFIRMATION = "structure/rms_cos"
_REFUTED_ABOVE = 1e-2
"""Root mean square cosine of a layer above which a guessed invariance is given up: broken ones have 0.02 and more,
true ones at most a few 1e-3, under bf16 autocast."""


class Structure:
    """The units of the weights behind the losses of one optimizer step."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[WeightUnits, nn.Parameter]] = {}
        self.scales: dict[str, nn.Parameter] = {}
        self._guessed = False
        self._refuted: set[str] = set()

    @property
    def weights(self) -> list[tuple[WeightUnits, nn.Parameter]]:
        """The units and the parameter of every weight seen since :meth:`forget`."""
        return list(self._found.values())

    def forget(self) -> None:
        """Begin another step; layers may have been frozen, thawed or added."""
        self._found = {}

    def read(self, module: nn.Module, loss: Tensor) -> None:
        """Add the weights behind ``loss``; several backward passes of a step add up."""
        found, self._guessed = find_units(module, loss)
        parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
        for units in found:
            kept = units.without_invariance("refuted by the numbers") if units.name in self._refuted else units
            self._found[units.name] = (kept, parameters[units.name])
            if kept.scale is not None:
                self.scales[kept.scale] = parameters[kept.scale]
        if found and not any(units.invariant for units, _ in self._found.values()):
            reasons = sorted({units.reason for units, _ in self._found.values()})[:3]
            warn_once(f"None of {len(found)} weights is scale invariant; all are controls: {'; '.join(reasons)}.")

    def confirmation(self, steps: Sequence[WeightStep]) -> list[Reading]:
        """Return what has to be looked at before a guess is believed; nothing where structure was read."""
        claimed = [step for step in steps if step.units.invariant] if self._guessed else []
        if not claimed:
            return []
        squares = [cosine(step.inner, step.weight_sq, step.gradient_sq).square().mean() for step in claimed]
        return [Reading(_CONFIRMATION, None, torch.stack(squares).sqrt(), [step.units.name for step in claimed])]

    def confirmed(self, row: Row) -> bool:
        """Return whether the numbers agree with the guess; what they refute is a control from now on."""
        refuted = {name for name, rms in row.layers.pop(_CONFIRMATION, {}).items() if rms > _REFUTED_ABOVE}
        if refuted:
            self._refuted |= refuted
            warn_once(
                f"Under torch.compile, scale invariance is guessed from the order of layers. The numbers refute it for "
                f"{', '.join(sorted(refuted))}: a control from here on."
            )
        return not refuted


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module, to a submodule, or to the LightningModule itself."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or type(child).__name__ == "OptimizedModule"
        for child in module.modules()
    )
