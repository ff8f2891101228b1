"""The optimizer step seen exactly: weights, the gradients really applied, optimizer state, and the weights after it.

Lightning runs forward, backward, unscaling and clipping *inside* ``optimizer.step(closure)``. Whatever is read in a
Lightning hook is therefore stale, scaled, unclipped, or belongs to another learning rate. The probe wraps the closure
on its way into the optimizer and reads between its end and the update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.errors import harmless, warn_once
from lightning_normgeo.geometry.angles import equilibrium_angle, joined_products, update_products
from lightning_normgeo.geometry.increments import predicted_increment
from lightning_normgeo.geometry.rows import dot, map_rows, wide_dtype
from lightning_normgeo.normalization.units import WeightUnits
from lightning_normgeo.probes.measurement import Observed, StepMeasurement, WeightStep
from lightning_normgeo.probes.rules import describe_update, scalar


@dataclass
class _Pending:
    """An optimizer step under way."""

    versions: dict[int, int]
    closure_calls: int = 0
    steps: list[tuple[WeightStep, Observed]] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)


class StepProbe:
    """Hooks on the optimizers of a Trainer; costs less than a microsecond per step while not armed.

    One probe serves every monitor of a Trainer. It adds no autograd node, changes no gradient, and draws no random
    numbers. A step that cannot be described exactly is left out and counted in ``skipped`` under its reason.
    """

    def __init__(self) -> None:
        self.weights: list[Observed] = []
        self.scales: dict[str, nn.Parameter] = {}
        self.skipped: Counter[str] = Counter()
        self.gradients_are_fresh: Callable[[], bool] = lambda: True
        self._handles: list[RemovableHandle] = []
        self._optimizers: list[Optimizer] = []
        self._before: dict[int, Tensor] = {}
        self._measurement: StepMeasurement | None = None
        self._updates = False
        self._pending: _Pending | None = None
        self._depth = 0

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Hook into ``optimizers``, dropping earlier hooks; nothing happens if these are the ones hooked already."""
        found = list(optimizers)
        if len(found) == len(self._optimizers) and all(a is b for a, b in zip(found, self._optimizers, strict=True)):
            return
        self.detach()
        self._optimizers = found
        for optimizer in found:
            self._handles.append(optimizer.register_step_pre_hook(self._step_begins))
            self._handles.append(optimizer.register_step_post_hook(self._step_ends))

    def detach(self) -> None:
        """Remove every hook and free the scratch memory."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []
        self._before.clear()
        self._measurement = self._pending = None

    def arm(self, updates: bool) -> None:
        """Measure the steps that follow, until :meth:`collect`.

        Args:
            updates: also measure what the step changes, which takes a copy of the weights.
        """
        self._measurement, self._updates, self._depth = StepMeasurement(), updates, 0

    def collect(self) -> StepMeasurement | None:
        """Return what was measured since :meth:`arm` and disarm; None while no optimizer took a step."""
        if self._measurement is None or not self._measurement.stepped:
            return None
        measurement = self._measurement
        self.disarm()
        return measurement

    def disarm(self) -> None:
        """Measure no further steps."""
        self._measurement = self._pending = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @harmless
    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._measurement is None:
            return None
        self._depth += 1
        if self._depth > 1:  # a subclass that calls super().step()
            return None
        self._measurement.stepped = True
        self._pending = _Pending({id(p): p._version for group in optimizer.param_groups for p in group["params"]})
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._wrap(kwargs["closure"], optimizer, self._pending)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._wrap(args[1], optimizer, self._pending), *args[2:]), kwargs
        self._snapshot(optimizer, self._pending)
        return None

    def _wrap(self, closure: Callable[[], Any], optimizer: Optimizer, pending: _Pending) -> Callable[[], Any]:
        def measured() -> Any:
            loss = closure()
            pending.closure_calls += 1
            if pending.closure_calls == 1:
                self._snapshot(optimizer, pending)
            return loss

        return measured

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @harmless
    def _step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        if self._measurement is None or self._pending is None:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        pending, self._pending = self._pending, None
        if pending.closure_calls > 1:
            self._skip("the optimizer evaluates its closure several times")
            return
        for step, observed in pending.steps:
            if self._updates:
                self._measure_update(step, observed)
            self._measurement.steps[step.units.name] = step
        self._measurement.valid += pending.valid

    @harmless
    @torch.no_grad()
    def _snapshot(self, optimizer: Optimizer, pending: _Pending) -> None:
        """Read W, g and the optimizer's state: gradients are final, the update has not begun."""
        if not self.gradients_are_fresh():
            self.skipped["no backward pass since the last step"] += 1
            return
        if any(p._version != pending.versions.get(id(p), p._version) for o in self.weights for p in o.parameters):
            self._skip("the optimizer moves the weights before the gradient is final")
            return
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        grad_scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale inside their step
        for observed in self.weights:
            if all(id(p) in groups and p.grad is not None and not p.grad.is_sparse for p in observed.parameters):
                step, *bias = (
                    self._measure(observed.units, p, optimizer, groups[id(p)], grad_scale) for p in observed.parameters
                )
                pending.steps.append((step.with_bias(*bias) if bias else step, observed))
        if pending.steps:
            total = torch.stack([step.gradient_sq.sum() for step, _ in pending.steps]).sum()
            pending.valid.append(total.isfinite())
        known = {id(observed.weight) for observed in self.weights}
        matrices = [
            p for group in optimizer.param_groups for p in group["params"] if p.numel() > max(p.shape, default=1)
        ]
        moved = [p for p in matrices if p.grad is not None]
        assert self._measurement is not None  # noqa: S101
        self._measurement.unknown += sum(id(parameter) not in known for parameter in moved)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            pending.valid.append(found_inf.reshape(()) == 0)

    def _measure(
        self, units: WeightUnits, parameter: nn.Parameter, optimizer: Optimizer, group: Any, grad_scale: Tensor | None
    ) -> WeightStep:
        described = describe_update(optimizer, group, optimizer.state.get(parameter, {}), parameter.dtype)
        rule, state = described if described is not None else (None, ())

        def reduce(w: Tensor, g: Tensor, *s: Tensor) -> tuple[Tensor, ...]:
            g = g if grad_scale is None else g / grad_scale
            square = w.square()
            products = () if rule is None else rule.products(w, g, *s)
            return square.sum(1), dot(w, g), dot(g, g), dot(square, square), *products

        assert parameter.grad is not None  # noqa: S101
        weight_sq, inner, gradient_sq, quartic, *products = map_rows(
            reduce, *(units.rows(tensor) for tensor in (parameter, parameter.grad, *state))
        )
        if self._updates:
            self._remember(parameter)
        lr = scalar(group["lr"])
        return WeightStep(
            units=units,
            dtype=parameter.dtype,
            lr=lr,
            predicted=predicted_increment(lr, gradient_sq),
            weight_sq=weight_sq,
            inner=inner,
            gradient_sq=gradient_sq,
            quartic=quartic,
            terms=None if rule is None else rule.terms(weight_sq, inner, gradient_sq, *products),
            equilibrium=None if rule is None else equilibrium_angle(rule),
            scale_gradient=self._scale_gradient(units, grad_scale),
        )

    def _scale_gradient(self, units: WeightUnits, grad_scale: Tensor | None) -> Tensor | None:
        scale = self.scales.get(units.scale) if units.scale is not None else None
        if scale is None or scale.grad is None or scale.numel() != units.count:
            return None
        gradient = scale.grad.detach().to(wide_dtype(scale.device))
        # a copy: a foreach optimizer may write to .grad
        return gradient.clone() if grad_scale is None else gradient / grad_scale

    def _remember(self, parameter: nn.Parameter) -> None:
        """Keep W in memory that is allocated once per fit: fresh pages would cost more than the copy."""
        buffer = self._before.get(id(parameter))
        if buffer is None or buffer.shape != parameter.shape or buffer.device != parameter.device:
            buffer = self._before[id(parameter)] = torch.empty_like(parameter)
        buffer.copy_(parameter)

    @torch.no_grad()
    def _measure_update(self, step: WeightStep, observed: Observed) -> None:
        rows = step.units.rows
        parts = [update_products(rows(self._before[id(p)]), rows(p)) for p in observed.parameters]
        step.update = parts[0] if len(parts) == 1 else joined_products(*parts)

    def _skip(self, reason: str) -> None:
        self.skipped[reason] += 1
        warn_once(f"Steps are left out because {reason}: no formula for one update describes them.")
