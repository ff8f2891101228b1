"""Forward passes that are run only for their autograd graph, without side effects on the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.autograd.side_effects import without_side_effects
from lightning_normgeo.normalization.autograd.zero_constants import ZeroConstants
from lightning_normgeo.normalization.outputs import tensors_in
from lightning_normgeo.normalization.user_inputs import arguments, misfit
from lightning_normgeo.utilities.checked_values import first_line


def traced_graph(module: nn.Module, example_batch: Any, loss: Callable[[Any], Tensor] | None = None) -> Graph:
    """Return the graph of one forward pass (:func:`trace`), with what is known about its constants."""
    constants = ZeroConstants()
    with constants:
        results = trace(module, example_batch, loss)
    return Graph(*results, constants=constants.records())


def trace(module: nn.Module, example_batch: Any, loss: Callable[[Any], Tensor] | None = None) -> list[Tensor]:
    """Run one forward pass without side effects on the module, and return all outputs that require a gradient.

    Buffers and inputs are replaced by copies during the call; attributes, random number generators and parameters that
    the module writes to are restored, and ``.grad`` is not touched. The module runs in its current mode.

    Args:
        module: any module.
        example_batch: its input; a tuple holds positional and a dict keyword arguments.
        loss: function of the outputs whose result is returned in place of them. Default: none.

    Raises:
        ConfigurationError: if the module does not accept the batch, or if no output depends on a trainable parameter.
    """
    # Lightning validates and tests in inference mode, in which autograd records nothing.
    with torch.inference_mode(False), without_side_effects(module), torch.enable_grad():
        try:
            args, kwargs = arguments(example_batch)
            # with tie_weights torch would leave the copies behind in a module that has two names
            outputs = functional_call(module, _copied_buffers(module), args, kwargs, tie_weights=False)
        except Exception as error:
            advice = misfit(module, example_batch) or (
                "Give one batch as its forward takes it, without labels; a tuple holds several positional, a dict "
                "keyword arguments."
            )
            raise ConfigurationError(
                f"{_name_of(module)} cannot take the example batch ({_describe(example_batch)}): "
                f"{first_line(error)}. {advice}"
            ) from error
        outputs = outputs if loss is None else loss(outputs)
        tensors = tensors_in(outputs)
        found = [tensor for tensor in tensors if tensor.requires_grad]
    if not found:
        problem = (
            "which depends on no trainable parameter. Return the tensors that the loss is made of, and unfreeze the "
            "parameters to be looked at."
            if tensors
            else "in which no tensor is found. Return tensors, alone or in a tuple, list, dict, dataclass or namespace."
        )
        raise ConfigurationError(f"{_name_of(module)} returned {_describe(outputs)}, {problem}")
    return found


def _copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    copies: dict[int, Tensor] = {}  # by id, so that a buffer shared by several modules stays shared
    return {
        name: copies.setdefault(id(buffer), buffer.clone())
        for path, child in module.named_modules()
        for name, buffer in child.named_buffers(path, recurse=False)
    }


def _name_of(module: nn.Module) -> str:
    """Return the name of a model's class, as its representation shows it: a wrapper may give that of its model."""
    return str(module._get_name())  # type: ignore[no-untyped-call]


def _describe(value: Any) -> str:
    """Return the shapes of the tensors in a value as text; its type if there are none."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(value)]
    return f"shape {', '.join(shapes)}" if shapes else type(value).__name__
