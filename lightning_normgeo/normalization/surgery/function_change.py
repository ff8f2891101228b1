r"""Measurement of how far a modified model computes another function in evaluation mode.

The change of an output from y to y' is relative:

.. math:: \lVert y' - y \rVert_2 / \lVert y \rVert_2

It is computed in float32 at least, since rounding in half precision would hide small changes. Where the result is so
close to the tolerance that rounding may decide, it is computed once more in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lightning_normgeo.errors import said_in_one_line
from lightning_normgeo.normalization.autograd.side_effects import gpus_of, random_states
from lightning_normgeo.normalization.example_inputs import attributes_kept, few, shapes
from lightning_normgeo.normalization.outputs import tensors_in
from lightning_normgeo.normalization.user_inputs import arguments

LAYER_KEPT = 1e-4
"""Relative change up to which a layer counts as unchanged; dropping an ε of 1e-5 beside σ² = 1 causes one of 5e-6."""
MODEL_KEPT = 1e-3
"""Relative change up to which the outputs of a model, which add up the changes of many layers, count as unchanged."""


@dataclass
class Pass:
    """One forward pass in evaluation mode.

    Attributes:
        outputs: floating-point outputs of the model.
        layers: outputs of the observed layers by module path, one for each call.
    """

    outputs: list[Tensor]
    layers: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """The relative changes of a model and its layers.

    Attributes:
        total: largest relative change among the outputs of the model; None where it is unknown.
        layers: relative change of each observed layer for its inputs before the change; None for one that was not run.
        error: why the changed model does not run, in words; None if it runs.
    """

    total: float | None
    layers: dict[str, float | None]
    error: str | None = None


class Yardstick:
    """The outputs of a model before a change, to which its outputs after the change are compared.

    Args:
        module: the model.
        example: a batch, or a tuple or dict of arguments.
        places: module paths of the layers to observe.
        samples: number of samples of the batch to use; all, if the model fails on so few.

    Attributes:
        problem: why nothing can be measured, in words; None if it can.
        dtype: lowest precision that tensors are converted to; None for the precision of the model.
        before: the forward pass before the change.
        widened: whether float64 was tried.

    Cost: one forward pass in evaluation mode.
    """

    def __init__(self, module: nn.Module, example: Any, places: list[str], samples: int = 2) -> None:
        self.module, self.places, self.example = module, places, example
        self.problem: str | None = None
        self.dtype: torch.dtype | None = torch.float32
        self.before = Pass([])
        self.widened = False
        # a model may fail on few samples, or in another precision than its own
        attempts = [(some, dtype) for dtype in (torch.float32, None) for some in (few(example, samples), example)]
        for self.example, self.dtype in attempts:
            try:
                self.before = self._run()
                self.problem = self._fault()
                return
            except Exception as error:
                self.problem = self.problem or f"the model fails in evaluation mode ({_short(error)})"

    def widen(self) -> None:
        """Compute in float64 from now on, if the model can. The model must be in its state before the change."""
        self.widened, narrow = True, self.dtype
        self.dtype = torch.float64
        try:
            self.before = self._run()
        except Exception:
            self.dtype = narrow

    def difference(self) -> Difference:
        """Return the relative changes of the model and of the observed layers, looked up under the same module paths.

        Cost: two or three forward passes in evaluation mode.
        """
        try:
            after = self._run().outputs
            total = _largest(self.before.outputs, after)
            # both passes used the same random numbers of torch, numpy and Python; any other randomness shows when the
            # model runs twice
            if total is not None and LAYER_KEPT < total < math.inf:
                noise = _largest(after, self._run().outputs)
                if noise is None or noise > LAYER_KEPT:
                    self.problem = "the model is random: it gives other outputs for the same input"
                    return Difference(None, {})
            replayed = self._run(replay=True).layers
        except Exception as error:
            return Difference(None, {}, _short(error))
        layers = {}
        for name in self.places:
            old, new = self.before.layers.get(name, []), replayed.get(name, [])
            layers[name] = _largest(old, new) if old and len(old) == len(new) else None
        return Difference(total, layers)

    def _fault(self) -> str | None:
        """Return the reason why the outputs cannot be compared, in words; None if they can."""
        outputs = self.before.outputs
        if not outputs:
            return "the model returns no floating-point tensor"
        if any(output.is_meta for output in outputs):
            return "the model is on the meta device and has no values"
        if not all(bool(output.isfinite().all()) for output in outputs):
            return f"its outputs are not finite for an input of shape {shapes(self.example)}"
        return None

    def _run(self, replay: bool = False) -> Pass:
        """Run the model once in evaluation mode.

        Args:
            replay: whether to replace the output of each observed layer by its output before the change, after
                recording it. Then each layer gets the inputs that it had before the change, and its own change is
                measured alone.
        """
        seen: dict[str, list[Tensor]] = {}
        handles = [self._watch(name, seen, replay) for name in self.places]
        try:
            with _evaluating(self.module), attributes_kept(self.module), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                args, kwargs = arguments(pytree.tree_map(self._cast, self.example))
                outputs = functional_call(self.module, self._state(), args, kwargs, tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()
        return Pass([_detached(tensor) for tensor in tensors_in(outputs) if tensor.is_floating_point()], seen)

    def _watch(self, name: str, seen: dict[str, list[Tensor]], replay: bool) -> Any:
        def note(_layer: nn.Module, _args: Any, output: Any) -> Any:
            if not _is_number(output):
                return None
            calls = seen.setdefault(name, [])
            calls.append(_detached(output))
            earlier = self.before.layers.get(name, [])
            if not replay or len(calls) > len(earlier) or earlier[len(calls) - 1].shape != output.shape:
                return None
            return earlier[len(calls) - 1].clone()

        return self.module.get_submodule(name).register_forward_hook(note)

    def _state(self) -> dict[str, Tensor]:
        """Return parameters and copies of buffers, each under one name of its module, and tied ones as one tensor.

        With ``tie_weights`` torch would leave the copies behind in a module that has two names.
        """
        state: dict[str, Tensor] = {}
        wide: dict[int, Tensor] = {}
        for path, child in self.module.named_modules():
            for name, parameter in child.named_parameters(path, recurse=False):
                state[name] = wide.setdefault(id(parameter), self._cast(parameter.detach()))
            for name, buffer in child.named_buffers(path, recurse=False):
                state[name] = wide.setdefault(id(buffer), self._cast(buffer.clone()))
        return state

    def _cast(self, value: Any) -> Any:
        if self.dtype is None or not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return value.to(torch.promote_types(value.dtype, self.dtype))
        return value.to(torch.complex128) if value.is_complex() and self.dtype == torch.float64 else value


def layer_tolerance(dtype: torch.dtype) -> float:
    """Return the relative change up to which a layer counts as unchanged, for weights of a dtype."""
    return max(LAYER_KEPT, 8 * torch.finfo(dtype).eps)


def _largest(before: list[Tensor], after: list[Tensor]) -> float | None:
    """Return the largest relative change among pairs of tensors: inf if shapes differ, None if it is unknown."""
    if len(before) != len(after):
        return math.inf
    changes = [_relative(old, new) for old, new in zip(before, after, strict=True)]
    return None if None in changes else max((change for change in changes if change is not None), default=None)


def _relative(before: Tensor, after: Tensor) -> float | None:
    if before.shape != after.shape:
        return math.inf
    if before.is_meta or not before.isfinite().all():
        return None
    wide = torch.promote_types(before.dtype, torch.float32)
    change: float = (after.to(wide) - before.to(wide)).norm().item()
    size: float = before.to(wide).norm().item()
    if not math.isfinite(change):
        return math.inf
    if size:
        return change / size
    return math.inf if change else 0.0


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode flag by flag, since ``eval`` may be overridden; restore modes and random states on exit."""
    modes = [(child, child.training) for child in module.modules()]
    with torch.inference_mode(False), random_states(gpus_of(module)), torch.enable_grad():
        try:
            for child, _ in modes:
                child.training = False
            yield
        finally:
            for child, mode in modes:
                child.training = mode


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()  # a copy, since later layers may work in place


def _short(error: Exception) -> str:
    text = said_in_one_line(error)
    return text if len(text) <= 120 else f"{text[:117]}..."
