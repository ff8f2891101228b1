"""Constants of autograd nodes that the rules of all passes read: axes, permutations, cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.autograd.nodes import dimensions, name_of

VIEWS = frozenset({"View", "ReshapeAlias", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze"})
PASSED = frozenset({"RegisterPostBackwardFunction", "BackwardHookFunction"})
"""Functions that return all of their inputs: those of ``fully_shard``, and of modules with full backward hooks."""
COPIES = frozenset({"ToCopy", "Clone", "Alias", "Contiguous"}) | PASSED
PERMUTATIONS = frozenset({"T", "Transpose", "Permute"})
CUTS = frozenset({"Slice", "Split", "UnsafeSplit", "SplitWithSizes", "Narrow", "Select", "Unbind"})
ATTENTIONS = frozenset(
    {
        "ScaledDotProductFlashAttentionForCpu",
        "ScaledDotProductFlashAttention",
        "ScaledDotProductEfficientAttention",
        "ScaledDotProductCudnnAttention",
    }
)
BATCH_NORMS = frozenset({"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "SyncBatchNorm"})

_POOLINGS = (
    "MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D "
    "AdaptiveMaxPool2D AdaptiveMaxPool3D MkldnnMaxPool2D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
    "UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleBilinear2DAa UpsampleBicubic2DAa "
    "UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D ReflectionPad1D ReflectionPad2D "
    "ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D "
    "MaxPool2D"  # on MPS
)
POOLINGS = frozenset(_POOLINGS.split())
"""Maxima, means and interpolations of neighboring pixels."""


def spatial_axes(node: Node, ndim: int) -> list[int]:
    """Return the axes of the pixels in a tensor that an operation in :data:`POOLINGS` reads or makes."""
    spatial = next(count for count in (1, 2, 3) if f"{count}D" in name_of(node).upper())
    return list(range(ndim - spatial, ndim))


SOFTMAX = frozenset({"Softmax", "SafeSoftmax", "LogSoftmax"})


def input_shape(graph: Graph, node: Node, position: int) -> tuple[int, ...] | None:
    """Return the shape of an input of a node; None for an input that is no result of a recorded operation."""
    source, output = graph.inputs[node][position]
    return None if source is None else graph.shape_of(source, output)


def permutation(node: Node, ndim: int) -> list[int]:
    """Return the old axis of each axis of the result of a permutation or transposition."""
    order = list(range(ndim))
    if name_of(node) == "T":
        return order[::-1]
    if name_of(node) == "Permute":
        return dimensions(node._saved_dims, ndim)
    a, b = dimensions([node._saved_dim0, node._saved_dim1], ndim)
    order[a], order[b] = order[b], order[a]
    return order


def cuts(node: Node, shape: Sequence[int]) -> tuple[int, dict[int, tuple[list[int], bool]]]:
    """Return the axis along which a tensor is cut, and for each output its positions and whether the axis stays.

    Args:
        node: of an operation in :data:`CUTS`.
        shape: of its input.
    """
    name = name_of(node)
    (axis,) = dimensions(node._saved_dim, len(shape))
    length = shape[axis]
    if name == "Select":
        return axis, {0: ([signed(node._saved_index) % length], False)}
    if name == "Unbind":
        return axis, {k: ([k], False) for k in range(length)}
    if name == "Slice":
        start, end = (_clipped(value, length) for value in (node._saved_start, node._saved_end))
        return axis, {0: (list(range(start, end, int(node._saved_step))), True)}
    if name == "Narrow":
        start = signed(node._saved_start)
        return axis, {0: (list(range(start, start + int(node._saved_length))), True)}
    parts, start = {}, 0
    for output, metadata in enumerate(node._input_metadata):
        size = int(metadata.shape[axis])
        parts[output] = (list(range(start, start + size)), True)
        start += size
    return axis, parts


def _clipped(value: Any, length: int) -> int:
    number = signed(value) if value is not None else length
    return min(max(number + length if number < 0 else number, 0), length)


def signed(value: Any) -> int:
    """Return a number that autograd has saved as an unsigned 64-bit number."""
    number = int(value)
    return number - 2**64 if number >= 2**63 else number


def concatenation(graph: Graph, node: Node, position: int) -> tuple[int, int] | None:
    """Return the axis of a concatenation, and where an input begins in it; None if that is unknown."""
    shape = graph.shape_of(node)
    (axis,) = dimensions(node._saved_dim, len(shape))
    starts = [0]
    lengths = [input_shape(graph, node, k) for k in range(len(graph.inputs[node]))]
    known = [None if length is None else length[axis] for length in lengths]
    if known.count(None) == 1:  # a constant fills the rest
        rest = shape[axis] - sum(length for length in known if length is not None)
        known = [rest if length is None else length for length in known]
    if None in known[:position]:
        return None
    for length in known[:position]:
        starts.append(starts[-1] + int(length or 0))
    return axis, starts[-1]
