"""Rules for linear maps and normalizations."""

from __future__ import annotations

from dataclasses import replace

from lightning_normgeo.normalization.invariance.node_context import (
    NodeContext,
    NotInvariantError,
    bias_axis,
    dimensions,
    name_of,
    shape_of,
    without_offset,
)
from lightning_normgeo.normalization.invariance.row_layout import Axis, ScaleState, fused, plain_axis, split

_ADDED = "a bias that is computed from it is added to other outputs"


def convolution(walk: NodeContext) -> ScaleState | None:
    """Rule for a convolution whose weight, input, or both scale."""
    x, weight, bias = (*walk.operands, None)[:3]
    node = walk.node
    transposed, groups = bool(node._saved_transposed), int(node._saved_groups)
    if x is not None and weight is not None:
        state = _all_together(walk, x, weight)
    elif weight is not None:
        state = _by_weight(walk, without_offset(weight), transposed, groups)
    elif x is not None:
        state = _by_input(walk, without_offset(x), groups)
    else:
        raise NotInvariantError(_ADDED)
    return _with_bias(walk, state, bias, 1, sum(node._saved_bias_sym_sizes_opt or ()) > 0)


def _by_weight(walk: NodeContext, weight: ScaleState, transposed: bool, groups: int) -> ScaleState:
    if not transposed:
        channels = weight.axes[0].pieces
        walk.reduce(weight.axes[1:])
    else:
        parts = split(weight.axes[0], groups)
        if parts is None or weight.axes[0].cut or weight.axes[1].cut:
            raise NotInvariantError("the weight of a transposed convolution is put together from parts of it")
        channels = fused(parts[0] + weight.axes[1].pieces)
        walk.merge(parts[1])
        walk.reduce(weight.axes[2:])
    batch, out, *space = walk.shape
    axes = (plain_axis(batch), Axis(out, channels, weight.axes[0].cut), *map(plain_axis, space))
    return ScaleState(axes, weight.degree, None, True)


def _by_input(walk: NodeContext, x: ScaleState, groups: int) -> ScaleState:
    """Return the state of a convolution whose input scales: each filter mixes the input channels of its group.

    A depthwise convolution has one channel per group and mixes none.
    """
    _, out, *space = walk.shape
    if x.axes[1].cut:
        raise NotInvariantError("its output is mixed with other outputs (a concatenation) before a normalization")
    parts = split(x.axes[1], groups)
    if parts is None:
        walk.reduce(x.axes[1:])
        return ScaleState((x.axes[0], plain_axis(out), *map(plain_axis, space)), x.degree, None, True)
    walk.merge(parts[1])
    walk.reduce(x.axes[2:])
    channels = fused((*parts[0], *plain_axis(out // groups).pieces))
    return ScaleState((x.axes[0], Axis(out, channels), *map(plain_axis, space)), x.degree, None, True)


def matrix_product(walk: NodeContext) -> ScaleState | None:
    """Rule for a matrix product of two tensors; ``addmm`` and ``baddbmm`` have a bias as the first operand."""
    has_bias = len(walk.operands) == 3
    a, b = walk.operands[-2:]
    if a is not None and b is not None:
        state = _all_together(walk, a, b)
    elif a is None and b is None:
        raise NotInvariantError(_ADDED)
    else:
        one = without_offset(a if a is not None else b)  # type: ignore[arg-type]
        contracted, kept = (-1, -2) if a is not None else (-2, -1)
        walk.reduce([one.axes[contracted]])
        lead = one.axes[:-2]
        rows = one.axes[kept]
        axes = (*lead, rows, plain_axis(walk.shape[-1])) if a is not None else (*lead, plain_axis(walk.shape[-2]), rows)
        state = ScaleState(axes, one.degree, None, True)
    bias = walk.operands[0] if has_bias else None
    added, output = walk.node.next_functions[0]
    if has_bias and added is not None and bias_axis(shape_of(added, output), walk.shape) != len(walk.shape) - 1:
        raise NotInvariantError("a matrix is added to its output before any normalization (a residual sum)")
    return _with_bias(walk, state, bias, len(walk.shape) - 1, has_bias)


def linear(walk: NodeContext) -> ScaleState | None:
    """Rule for ``F.linear`` recorded as one node, with the operands input, weight and bias."""
    x, weight, bias = (*walk.operands, None)[:3]
    if x is not None and weight is not None:
        state = _all_together(walk, x, weight)
    elif weight is not None:
        walk.reduce(without_offset(weight).axes[1:])
        state = ScaleState((*map(plain_axis, walk.shape[:-1]), weight.axes[0]), weight.degree, None, True)
    elif x is None:
        raise NotInvariantError(_ADDED)
    else:
        walk.reduce([without_offset(x).axes[-1]])
        state = ScaleState((*x.axes[:-1], plain_axis(walk.shape[-1])), x.degree, None, True)
    has_bias = len(walk.node.next_functions) > 2 and walk.node.next_functions[2][0] is not None
    return _with_bias(walk, state, bias, len(walk.shape) - 1, has_bias)


def sparse_product(walk: NodeContext) -> ScaleState | None:
    """Rule for the product of a constant sparse matrix, such as the adjacency of a graph, with a dense one."""
    added, sparse, dense = walk.operands
    if dense is None or added is not None or sparse is not None or walk.node._saved_beta != 0:
        raise NotInvariantError("a matrix is added to its output, or it is multiplied from the right")
    walk.reduce([without_offset(dense).axes[0]])
    return ScaleState((plain_axis(walk.shape[0]), dense.axes[1]), dense.degree, None, True)


def attention(walk: NodeContext) -> ScaleState | None:
    """Rule for attention recorded as one node: it is linear in the values, but not in queries and keys."""
    query, key, values, *masks = walk.operands
    if values is None or any(operand is not None for operand in (query, key, *masks)):
        raise NotInvariantError("it scales queries or keys of an attention")
    *lead, tokens, features = without_offset(values).axes
    walk.reduce([tokens])
    if walk.shape[:-2] != values.shape[:-2] or walk.shape[-1] != features.size:
        raise NotInvariantError("several heads share its values")
    return ScaleState((*lead, plain_axis(walk.shape[-2]), features), values.degree, None, True)


def vector_product(walk: NodeContext) -> ScaleState | None:
    """Rule for a product of a matrix with a vector, or of two vectors, as in a spectral normalization.

    The vectors are its estimates of singular vectors, not data; the result is a statistic of the weight.
    """
    scaled = [operand for operand in walk.operands if operand is not None]
    state = without_offset(scaled[0])
    if len(scaled) > 1:
        raise NotInvariantError(f"both sides of {name_of(walk.node)} depend on it")
    walk.reduce(state.axes[-1:])
    kept = state.axes[:-1] if len(state.axes) == 2 else map(plain_axis, walk.shape)
    return replace(state, axes=tuple(kept), statistic=True)


def _all_together(walk: NodeContext, a: ScaleState, b: ScaleState) -> ScaleState:
    """Return the state of a product of two tensors that both scale: degrees add up, and all rows are merged.

    Each element of the product is a sum over pairs of elements, which scale alike only under a common factor.
    """
    without_offset(a), without_offset(b)
    walk.reduce([*a.axes, *b.axes])
    return ScaleState(tuple(map(plain_axis, walk.shape)), a.degree + b.degree, None, True)


def _with_bias(walk: NodeContext, state: ScaleState, bias: ScaleState | None, axis: int, present: bool) -> ScaleState:
    if bias is None:
        return replace(state, offset=axis) if present else state
    if bias.degree != state.degree:
        raise NotInvariantError("weight and bias scale in different ways")
    joined = walk.joined(bias.axes[-1], state.axes[axis])
    return state.over([joined if d == axis else entry for d, entry in enumerate(state.axes)])


def batch_norm(walk: NodeContext) -> None:
    """Rule for batch normalization: statistics per channel, over the batch and all positions.

    Torch computes instance normalization as batch normalization of the view (1, N·C, ...).
    """
    if not getattr(walk.node, "_saved_training", True):  # SyncBatchNorm's node exists in training only
        raise NotInvariantError("batch normalization with frozen statistics (evaluation mode)")
    walk.absorb(_input(walk), kept=[1])


def group_norm(walk: NodeContext) -> None:
    """Rule for group normalization: statistics per sample and group of channels."""
    state, groups = _input(walk), int(walk.node._saved_group)
    walk.absorb(state, kept=[0], groups=groups)


def layer_norm(walk: NodeContext) -> None:
    """Rule for layer normalization: statistics over the last dimensions."""
    _over_the_last(walk, centers=True)


def rms_norm(walk: NodeContext) -> None:
    """Rule for normalization by the root mean square over the last dimensions, without centering."""
    _over_the_last(walk, centers=False)


def weight_norm(walk: NodeContext) -> None:
    """Rule for torch's weight normalization in one node: v is divided by its norm over all dimensions but one."""
    state = _input(walk)
    walk.absorb(state, kept=dimensions(walk.node._saved_dim, len(state.axes)), centers=False)


def _over_the_last(walk: NodeContext, centers: bool) -> None:
    state = _input(walk)
    kept = range(len(state.axes) - len(walk.node._saved_normalized_shape))
    walk.absorb(state, kept=kept, centers=centers)


def _input(walk: NodeContext) -> ScaleState:
    if walk.operands[0] is None or any(operand is not None for operand in walk.operands[1:]):
        raise NotInvariantError(f"it scales a parameter of {name_of(walk.node)}")
    return walk.operands[0]
