"""The weights that gradients belong to: the state of each parameter when a backward pass last added to its gradient.

Code that perturbs weights and restores them before the optimizer's step, as sharpness-aware minimization written by
hand, has the optimizer apply a gradient of other weights than those that it moves. Such a gradient is not orthogonal to
the weights of the step, whatever their scale invariance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.errors import skipped_on_error
from lightning_normgeo.geometry.columns import run_maxima
from lightning_normgeo.geometry.rows import (
    as_real,
    in_memory_order,
    is_sharded,
    local_part,
    main_device,
    observing_device,
    on_observing_device,
)
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.explain import parameters_of

_SAMPLES = 64
"""Elements of a parameter that are compared where code may have edited it through ``.data``."""
_SAMPLED = 16
"""Number of parameters with such samples, spread over all: code that perturbs weights perturbs those of all layers."""

State = tuple[int, int]


class _Point(NamedTuple):
    """A parameter when a backward pass added to its gradient."""

    state: State
    """Its version, which operations in place change, and its address, which ``parameter.data = …`` changes."""
    sample: Tensor | None = None
    """Some of its elements, which edits of ``parameter.data`` in place change; None if not taken."""
    mixed: bool = False
    """Whether the gradient also has a part of another state."""


@dataclass(frozen=True)
class Changes:
    """Changes of parameters between the backward pass that has left their gradients and the step that applies them.

    Attributes:
        left: the parameters that have another state, by id.
        edited: for each parameter, by id, whether samples of it have other values, as 0 or 1 on the device; empty where
            they were not compared.
        any_edited: the largest of these, if there are any.
    """

    left: frozenset[int] = frozenset()
    edited: Mapping[int, Tensor] = field(default_factory=dict)
    any_edited: Sequence[Tensor] = ()

    def have_left(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether any of these parameters has another state."""
        return not self.left.isdisjoint(map(id, parameters))

    def edited_of(self, parameters: Iterable[nn.Parameter]) -> Tensor | None:
        """Whether samples of any of these parameters have other values, as 0 or 1; None if they were not compared."""
        flags = [self.edited[id(parameter)] for parameter in parameters if id(parameter) in self.edited]
        if len(flags) > 1:
            return torch.stack(flags).amax()
        return flags[0] if flags else None


class GradientPoints:
    """Notes of the states of parameters when their gradients were accumulated, in measured steps.

    A hook on each parameter makes them, so that backward passes are seen that Lightning is not told of. Parameters that
    get no hook are noted before the backward passes of Lightning's. Without a note a gradient is taken to be that of W.

    Cost: about 8 µs for each parameter in a measured step; with samples three kernels for each of 16 parameters.
    """

    def __init__(self) -> None:
        self._points: dict[int, _Point] = {}
        self._gradients: dict[int, State] = {}
        self._handles: list[RemovableHandle] = []
        self._without_hook: list[nn.Parameter] = []
        self._sampled: set[int] = set()

    def forget(self) -> None:
        """Discard all notes, at the beginning of a step."""
        self._points = {}

    def watch(self, parameters: Iterable[nn.Parameter], hooks: bool, sampled: bool) -> None:
        """Start to make notes, until :meth:`rest`.

        Args:
            parameters: those that optimizers move.
            hooks: whether parameters may have hooks; not in compiled code, which would be compiled again, nor in
                sharded models, where gradients are not accumulated in the parameters.
            sampled: whether code may edit parameters in ways that change no version.
        """
        self.rest()
        parameters = list(parameters)
        moving = [parameter for parameter in parameters if parameter.requires_grad] if sampled else []
        self._sampled = set(map(id, moving[:: max(len(moving) // _SAMPLED, 1)]))
        for parameter in parameters:
            if hooks and not is_lazy(parameter) and parameter.requires_grad and parameter.is_leaf:
                add: Any = parameter.register_post_accumulate_grad_hook
                self._handles.append(add(self.note_gradient))
            else:
                self._without_hook.append(parameter)

    def rest(self) -> None:
        """Remove the hooks, between two batches and after the step; notes stay."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._without_hook = [], []
        # what happens between batches, as weights that are exchanged for their average and restored, mixes nothing
        self._gradients = {}

    @skipped_on_error
    def note_gradient(self, parameter: Tensor) -> None:
        """Note the state of a parameter right after its gradient was accumulated."""
        gradient, key = parameter.grad, id(parameter)
        if gradient is None:
            return
        state, accumulated, before = _state(parameter), (id(gradient), gradient._version), self._points.get(key)
        # where this backward pass has added to a gradient, and not begun a new one
        added = before is not None and self._gradients.get(key) == (accumulated[0], accumulated[1] - 1)
        mixed = before is not None and added and (before.mixed or before.state != state)
        self._gradients[key] = accumulated
        self._points[key] = _Point(state, self._sample(parameter), mixed)

    @skipped_on_error
    def note_others(self) -> None:
        """Note the states of the parameters without hooks, before a backward pass."""
        for parameter in self._without_hook:
            self._points[id(parameter)] = _Point(_state(parameter), self._sample(parameter))

    def _sample(self, parameter: Tensor) -> Tensor | None:
        return _sample(parameter) if id(parameter) in self._sampled else None

    @skipped_on_error
    @torch.no_grad()
    def changes(self, optimizer: Optimizer) -> Changes:
        """Return the changes of the parameters of an optimizer since their gradients were computed."""
        moving = [parameter for parameter in parameters_of(optimizer) if parameter.grad is not None]
        known = [(p, self._points[id(p)]) for p in moving if id(p) in self._points]
        left = frozenset(id(p) for p, point in known if point.mixed or point.state != _state(p))
        device = observing_device(main_device(moving))  # weights on others are not measured
        samples = [(p, point.sample) for p, point in known if point.sample is not None]
        pairs = [(p, sample) for p, sample in samples if sample.numel() and sample.device == device]
        if left or not pairs:
            return Changes(left)
        before, now = torch.cat([sample for _, sample in pairs]), torch.cat([_sample(p) for p, _ in pairs])
        flags = run_maxima((before != now).to(torch.float64), [sample.numel() for _, sample in pairs])
        return Changes(left, dict(zip([id(p) for p, _ in pairs], flags.unbind(), strict=True)), [flags.amax()])


def leave_unpredicted(sums: CumulativeIncrements, names: Iterable[str]) -> None:
    """Leave out of sums from now on what follows from ⟨W, g⟩ = 0, for weights with a gradient of another state."""
    found = set(names)
    sums.unpredicted |= found
    sums.without_momentum_form |= found


def _state(parameter: Tensor) -> State:
    part = local_part(parameter) if is_sharded(parameter) else parameter
    return parameter._version, part.data_ptr()


@torch.no_grad()
def _sample(parameter: Tensor) -> Tensor:
    part = local_part(parameter)
    flat = in_memory_order(on_observing_device(part), part).reshape(-1)
    return as_real(flat[:: max(flat.numel() // _SAMPLES, 1)]).reshape(-1).to(torch.float64, copy=True)
