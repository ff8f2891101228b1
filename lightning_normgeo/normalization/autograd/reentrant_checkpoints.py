"""Operations inside reentrant activation checkpoints, added to the autograd graph by running them again.

``torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`` runs a function without gradients and records a single
node. This module runs the function once more, with gradients and on the inputs saved on the node, which connects its
operations to the graph in front of the checkpoint. Nothing is stored for a backward pass, and none is run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import checkpoint

from lightning_normgeo.normalization.autograd.graph import Edge, Graph, Node
from lightning_normgeo.normalization.autograd.side_effects import Attributes, gpus_of, random_states, silence

_RUNS_AGAIN = ContextVar("runs_again", default=False)


def opened(graph: Graph, module: nn.Module) -> Graph:
    """Return the graph with the operations inside its reentrant checkpoints, including nested ones.

    Args:
        graph: of a forward pass, before its backward pass.
        module: the model; its buffers, its attributes and all random states are restored afterwards.

    Returns:
        The graph itself if it has no such checkpoints. ``hides_reentrant`` of the returned graph is set if some
        function could not be run again.

    Cost: one forward pass of the checkpointed functions, and memory for the largest activations in them.
    """
    if not graph.reentrant:
        return graph
    with _undisturbed(module):
        while graph.reentrant:  # each round may uncover checkpoints nested in those run before
            graph = graph.with_inside({node: _inside(node) for node in graph.reentrant})
    return graph


def runs_again() -> bool:
    """Whether the forward pass that is running repeats one for :func:`opened`, and is none of the training."""
    return _RUNS_AGAIN.get()


def _inside(node: Node) -> tuple[Edge, ...] | None:
    """Return the edges that compute the outputs of a checkpoint, one per output; None if it cannot be run again."""
    try:
        results = _run_again(node)
        found: list[Edge] = []
        for position, result in enumerate(results):
            differentiable = isinstance(result, Tensor) and result.requires_grad
            if differentiable and tuple(result.shape) != tuple(node._input_metadata[position].shape):
                return None
            edge = get_gradient_edge(result) if differentiable else None
            found.append((None, 0) if edge is None else (edge.node, edge.output_nr))
    except Exception:  # a model may fail in any way outside of its forward pass; weights inside then get no units
        return None
    return tuple(found) or None


def _run_again(node: Node) -> tuple[Any, ...]:
    """Run the function of a checkpoint as its backward pass would, but on inputs that are not detached."""
    inputs = list(node.inputs)
    for position, tensor in zip(node.tensor_indices, node.saved_tensors, strict=True):
        # copies, since the function may write to its inputs
        inputs[position] = tensor.clone() if tensor.requires_grad else tensor.detach().clone()
    with ExitStack() as stack:
        if node.preserve_rng_state:
            torch.set_rng_state(node.fwd_cpu_state)
            if node.had_device_in_fwd:
                checkpoint.set_device_states(node.fwd_devices, node.fwd_device_states, device_type=node.device_type)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # they were shown when the function ran first
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(node.device_type, **node.device_autocast_kwargs))
        stack.enter_context(torch.autocast("cpu", **node.cpu_autocast_kwargs))
        stack.enter_context(saved_tensors_hooks(_dropped, _kept))
        results = node.run_function(*inputs)
    return results if isinstance(results, tuple) else (results,)


def _dropped(tensor: Tensor) -> Any:
    """Hook for saving a tensor: store nothing, except inputs of a nested checkpoint, which are needed to run it."""
    return tensor if _called_by_checkpoint(sys._getframe(1)) else "not stored"


def _called_by_checkpoint(frame: FrameType) -> bool:
    caller = frame.f_back if frame.f_code.co_filename == torch.autograd.function.__file__ else frame
    return caller is not None and caller.f_code.co_filename == checkpoint.__file__


def _kept(stored: Any) -> Any:
    """Hook for reading a saved tensor."""
    return stored


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Restore buffers, attributes and random states on exit; until then suppress logging, and let hooks know.

    Buffers are replaced by copies. If the originals were written to and restored, autograd would still count them as
    modified in place, and the backward pass of the training would fail.
    """
    children = list(module.modules())
    attributes = [Attributes(child) for child in children]
    buffers = [(child._buffers, dict(child._buffers)) for child in children]
    copies: dict[int, Tensor] = {}
    with random_states(gpus_of(module)), torch.inference_mode(False):
        token = _RUNS_AGAIN.set(True)
        try:
            for child in children:
                for name, buffer in child._buffers.items():
                    if buffer is not None:
                        child._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
                silence(child)
            yield
        finally:
            _RUNS_AGAIN.reset(token)
            for kept in attributes:
                kept.restore()
            for table, saved in buffers:
                table.clear()
                table.update(saved)
