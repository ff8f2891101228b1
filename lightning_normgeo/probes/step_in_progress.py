"""An optimizer step under way, and the reasons for which parts of it are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_normgeo.errors import warn_once
from lightning_normgeo.probes.gradient_points import Changes
from lightning_normgeo.probes.weight_step import Observed, WeightStep

SEVERAL = "the optimizer evaluates its closure several times"
MOVED = "the optimizer moves the weights before the gradient is final"
ELSEWHERE = "weights were changed between the backward pass and the optimizer's step"
CAPTURED = "it was captured in a CUDA graph"
RAISED = "an exception ended the optimizer's step"
_LEFT = {
    SEVERAL: "predicted and cosines are those of the first gradient, that at W",
    MOVED: "predicted and cosines are left out too, since no gradient is at W",
}
"""What becomes of the quantities that need a gradient but no formula, by reason."""


@dataclass
class StepInProgress:
    """An optimizer step under way.

    Attributes:
        optimizer: takes the step.
        versions: the version of each parameter when the step began, by id.
        measured: whether the step is measured.
        depth: the number of steps of the same optimizer inside this one.
        closure_calls: how often the closure was evaluated.
        follows: whether cumulative sums are open for the step.
        counted: whether the step was added to them.
        moved: whether the optimizer has moved weights before the gradient was final.
        changes: what was changed of the weights after the backward pass.
        outer: the step of another optimizer that this one is inside of.
        observed: the weights that are measured.
        steps: what was read of them.
        valid: the conditions under which the step is valid, on the device.
    """

    optimizer: Optimizer
    versions: dict[int, int]
    measured: bool
    depth: int = 0
    closure_calls: int = 0
    follows: bool = False
    counted: bool = False
    moved: bool = False
    changes: Changes = field(default_factory=Changes)
    outer: StepInProgress | None = None
    observed: list[Observed] = field(default_factory=list)
    steps: list[WeightStep] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)

    def watched(
        self, closure: Callable[[], Any], final: Callable[[], None], raised: Callable[[StepInProgress], None]
    ) -> Callable[[], Any]:
        """Return the closure, with calls after its first end and before its exceptions go on.

        Args:
            closure: of the optimizer's step.
            final: called when the first gradient is final.
            raised: called with the step if the closure raises an exception.
        """

        def measured() -> Any:
            try:
                loss = closure()
            except BaseException:
                raised(self)
                raise
            self.closure_calls += 1
            if self.closure_calls == 1:
                final()
            return loss

        return measured


def warn_of(reason: str, with_symmetries: bool) -> None:
    """Warn once that something of a step is left out.

    Args:
        reason: ``SEVERAL``, ``MOVED`` or ``ELSEWHERE``.
        with_symmetries: whether symmetries are measured, and left out too.
    """
    also = ", and symmetry/*" if with_symmetries else ""
    if reason == ELSEWHERE:
        warn_once(
            f"Cosines, predicted…{also} are left out because {reason}, as in SAM written by hand: the gradient is not "
            "that of the weights which the optimizer moves. Increments and their terms are those of the step.",
            about=reason,
        )
        return
    warn_once(
        f"What one gradient explains is left out because {reason}: no formula for one update describes it. This is "
        f"explained, term_… and residual{also}; {_LEFT[reason]}.",
        about=reason,
    )
