"""Rules for operations on images that are a fixed sequence of reshapes and permutations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from lightning_normgeo.normalization.invariance.node_context import (
    NodeContext,
    NotInvariantError,
    dimensions,
    name_of,
    the_operand,
    without_offset,
)
from lightning_normgeo.normalization.invariance.row_layout import Axis, ScaleState, plain_axis, regroup


def pixel_shuffle(walk: NodeContext) -> ScaleState | None:
    """Rule for the pixel shuffle, which turns channels into pixels: (…, C·r², H, W) to (…, C, H·r, W·r)."""
    state, r = _image(walk), int(walk.node._saved_upscale_factor)
    *lead, channels, height, width = state.shape
    apart = _reshaped(state.axes, [*lead, channels // r**2, r, r, height, width])
    return state.over(_reshaped(_permuted(apart, [-5, -2, -4, -1, -3]), walk.shape))


def pixel_unshuffle(walk: NodeContext) -> ScaleState | None:
    """Rule for the inverse pixel shuffle, which turns pixels into channels: (…, C, H·r, W·r) to (…, C·r², H, W)."""
    state, r = _image(walk), int(walk.node._saved_downscale_factor)
    *lead, channels, height, width = state.shape
    apart = _reshaped(state.axes, [*lead, channels, height // r, r, width // r, r])
    return state.over(_reshaped(_permuted(apart, [-5, -3, -1, -4, -2]), walk.shape))


def channel_shuffle(walk: NodeContext) -> ScaleState | None:
    """Rule for the channel shuffle of ShuffleNet: channel c of each of g groups, for every c in turn."""
    state, groups = _image(walk), int(walk.node._saved_groups)
    batch, channels, *space = state.shape
    apart = _reshaped(state.axes, [batch, groups, channels // groups, *space])
    apart[1], apart[2] = apart[2], apart[1]
    return state.over(_reshaped(apart, walk.shape))


def im2col(walk: NodeContext) -> ScaleState | None:
    """Rule for ``F.unfold``, which returns all patches of an image, padded with zeros: (…, C, H, W) to (…, C·k², L)."""
    state = _image(walk)
    *lead, channels, height, width = state.axes
    walk.reduce([height, width])
    kernel = prod(walk.node._saved_kernel_size)
    rows = _reshaped([channels, plain_axis(kernel)], [channels.size * kernel])
    return state.over([*lead, *rows, plain_axis(walk.shape[-1])])


def col2im(walk: NodeContext) -> ScaleState | None:
    """Rule for ``F.fold``, which adds up patches to an image: (…, C·k², L) to (…, C, H, W)."""
    state = _image(walk)
    *lead, rows, places = state.axes
    kernel = prod(walk.node._saved_kernel_size)
    channels, *within = _reshaped([rows], [rows.size // kernel, kernel])
    walk.reduce([*within, places])
    return state.over([*lead, channels, *map(plain_axis, walk.shape[-2:])])


def restride(walk: NodeContext) -> ScaleState | None:
    """Rule for the ``as_strided`` at the end of adaptive average pooling to one pixel, with channels last.

    Any other ``as_strided`` ends the search, since it may read the memory in any order.
    """
    state, node = the_operand(walk), walk.node
    source = node.next_functions[0][0]
    pooled = name_of(source) == "Mean" and set(dimensions(source._saved_dim, len(state.axes))) == {2, 3}
    channels = state.axes[1].size if len(state.axes) == 4 else 0
    expected = (state.shape, (channels, 1, channels, channels))
    if not pooled or state.shape[2:] != (1, 1) or (tuple(node._saved_size), tuple(node._saved_stride)) != expected:
        raise NotInvariantError("its memory is read in another layout (as_strided)")
    return state


def _image(walk: NodeContext) -> ScaleState:
    return without_offset(the_operand(walk))


def _reshaped(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    found = regroup(axes, shape)
    if found is None:
        raise NotInvariantError(f"reshaped from {tuple(axis.size for axis in axes)} to {tuple(shape)}")
    return list(found)


def _permuted(axes: Sequence[Axis], last: Sequence[int]) -> list[Axis]:
    """Return the axes with the last ones in another order."""
    return [*axes[: -len(last)], *(axes[d] for d in last)]
