"""The autograd node of a batch normalization, and what it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NODES = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"}
_SYNC_NODE = "SyncBatchNormBackward"


def own_node(layer: nn.Module, node: Any) -> Any:
    """Return the autograd node of a layer: the output's, or one up to three nodes behind it (activations), or None."""
    for _ in range(4):
        if node is None:
            return None
        if node.name() in _NODES or node.name() == _SYNC_NODE:
            scale = node.next_functions[1][0]
            if scale is None:  # frozen, as all of a GAN's other network is
                return None if layer.weight.requires_grad else node
            # of another layer: this one does something of its own
            return node if getattr(scale, "variable", None) is layer.weight else None
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return None


def saved_statistics(node: Any) -> tuple[Tensor, Tensor]:
    """Return (mean, 1/std) that a node keeps until a backward pass has gone through it."""
    if node.name() == _SYNC_NODE:
        _, _, mean, inverse_std, *_ = node.saved_tensors
        return mean, inverse_std
    return node._saved_result1, node._saved_result2


def saving_is_hooked() -> bool:
    """Whether saved tensors go through hooks (activation checkpointing): reading one would recompute the forward."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def is_inside_backward() -> bool:
    """Whether a backward pass is under way: checkpoints compute a part of the forward pass anew inside it."""
    return torch._C._current_graph_task_id() >= 0
