"""Autograd node of a batch normalization, and the statistics saved on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NODES = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"}
_LAYERS = ("Convolution", "Addmm", "Mm", "Bmm", "Baddbmm", "Linear")
"""First letters of the nodes of layers with weights."""
_NEAR = 8
"""Operations between a weight and its normalization that are looked at."""
_SYNC_NODE = "SyncBatchNormBackward"


def held(layer: nn.Module, name: str) -> Tensor | None:
    """Return γ (``weight``) or β (``bias``) as a layer holds it: a parameter, or what pruning has computed from one.

    None if it is computed anew wherever it is accessed, as by a parametrization: another access might change the state
    or the random numbers of the training.
    """
    found = layer._parameters.get(name, vars(layer).get(name))
    return found if isinstance(found, Tensor) else None


def own_node(layer: nn.Module, node: Any) -> Any:
    """Return the autograd node of a batch normalization; None if it cannot be found.

    Args:
        layer: the batch normalization.
        node: ``grad_fn`` of the layer's output: the wanted node, or one up to three nodes behind it, since a subclass
            may run an activation after the normalization.
    """
    for _ in range(4):
        if node is None:
            return None
        if node.name() in _NODES or node.name() == _SYNC_NODE:
            # with another γ it is the node of another layer, and this layer computes something else
            return node if _leads_to(node.next_functions[1][0], held(layer, "weight")) else None
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return None


def _leads_to(scale: Any, gamma: Tensor | None) -> bool:
    """Whether the node behind a normalization's factor is that of γ; it is None where γ has no gradient.

    So it is in the network of a GAN that is not being trained.
    """
    if scale is None or gamma is None:
        return gamma is not None and not gamma.requires_grad
    return scale is gamma.grad_fn if gamma.grad_fn is not None else getattr(scale, "variable", None) is gamma


def follows_hook(node: Any) -> bool:
    """Whether a full backward hook of a module may change the gradient between the node and the layer before it."""
    for _ in range(_NEAR):
        node = node.next_functions[0][0] if node.next_functions else None
        if node is None or node.name().startswith(_LAYERS):
            return False
        if node.name() == "BackwardHookFunctionBackward":
            return True
    return False


def saved_statistics(node: Any) -> tuple[Tensor, Tensor]:
    """Return mean and 1/√(σ² + ε) per channel, which the node keeps until a backward pass has gone through it."""
    if node.name() == _SYNC_NODE:
        _, _, mean, inverse_std, *_ = node.saved_tensors
        return mean, inverse_std
    return node._saved_result1, node._saved_result2


def saving_is_hooked() -> bool:
    """Whether hooks for saved tensors are active, as in activation checkpointing; reading a saved tensor runs them.

    The hook of activation checkpointing computes the forward pass again.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def is_inside_backward() -> bool:
    """Whether a backward pass is running, in which checkpoints compute part of the forward pass again."""
    return torch._C._current_graph_task_id() >= 0
