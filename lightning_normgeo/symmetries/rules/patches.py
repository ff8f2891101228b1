"""Rules of operations on images that reorder elements: patches, pixel shuffles, complex numbers."""

from __future__ import annotations

from math import prod

import numpy as np

from lightning_normgeo.normalization.autograd.nodes import dimensions, name_of
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.degrees.nodes import signed
from lightning_normgeo.symmetries.rules.context import NoRuleError, Operation


def same_everywhere(walk: Operation) -> Degree:
    """Rule for operations that copy or add elements in some other order: all have to have the same degree."""
    degree = walk.over(walk.only, range(len(walk.only.shape)))
    terms = [term.reshape((1,) * walk.ndim) for term in degree.terms]
    return degree.over(walk.shape, terms).plain()


def sampled(walk: Operation) -> Degree:
    """Rule for interpolation at the points of a grid (``grid_sample``), which has degree 0; zeros lie outside."""
    for position in walk.positions[1:] if walk.operands[0] is not None else walk.positions:
        walk.vanish(position)
    image = walk.operands[0]
    if image is None:
        return walk.constant
    degree = walk.over(image, range(2, walk.ndim))
    return degree.over(walk.shape, degree.terms).plain()


def patches(walk: Operation) -> Degree:
    """Rule for ``F.unfold``, all patches of an image, padded with zeros: (…, C, H, W) to (…, C·k², L)."""
    degree = walk.over(walk.only, range(walk.ndim - 1, walk.ndim + 1))
    kernel = prod(int(size) for size in walk.node._saved_kernel_size)
    terms = []
    for term in degree.terms:
        *front, channels, _, _ = term.shape
        repeated = np.repeat(term, kernel if channels > 1 else 1, axis=-3)
        terms.append(repeated.reshape(*front, repeated.shape[-3], 1))
    return degree.over(walk.shape, terms).plain()


def image(walk: Operation) -> Degree:
    """Rule for ``F.fold``, the sum of all patches of an image: (…, C·k², L) to (…, C, H, W)."""
    kernel = prod(int(size) for size in walk.node._saved_kernel_size)
    degree = walk.only.plain()
    *front, channels, places = degree.shape
    apart = degree.viewed([*front, channels // kernel, kernel, places])
    degree = walk.over(apart, [len(front) + 1, len(front) + 2])
    return degree.over(walk.shape, degree.terms).plain()


def windows(walk: Operation) -> Degree:
    """Rule for sliding windows along an axis (``Tensor.unfold``); the position in a window becomes the last axis."""
    axis = signed(walk.node._saved_dimension) % (walk.ndim - 1)
    degree = walk.over(walk.only, [axis])
    return degree.over(walk.shape, [term[..., None] for term in degree.terms]).plain()


def pixel_shuffle(walk: Operation) -> Degree:
    """Rule for channels that become pixels: (…, C·r², H, W) to (…, C, H·r, W·r)."""
    degree, factor = walk.only.plain(), int(walk.node._saved_upscale_factor)
    *front, channels, height, width = degree.shape
    n = len(front)
    apart = degree.viewed([*front, channels // factor**2, factor, factor, height, width])
    return apart.permuted([*range(n), n, n + 3, n + 1, n + 4, n + 2]).viewed(walk.shape)


def pixel_unshuffle(walk: Operation) -> Degree:
    """Rule for pixels that become channels: (…, C, H·r, W·r) to (…, C·r², H, W)."""
    degree, factor = walk.only.plain(), int(walk.node._saved_downscale_factor)
    *front, channels, height, width = degree.shape
    n = len(front)
    apart = degree.viewed([*front, channels, height // factor, factor, width // factor, factor])
    return apart.permuted([*range(n), n, n + 2, n + 4, n + 1, n + 3]).viewed(walk.shape)


def channel_shuffle(walk: Operation) -> Degree:
    """Rule for channels of several groups that are interleaved."""
    degree, groups = walk.only, int(walk.node._saved_groups)
    channels = walk.shape[1]
    order = np.arange(channels).reshape(groups, channels // groups).T.reshape(-1)
    return degree.taken(1, order).plain()


def as_complex(walk: Operation) -> Degree:
    """Rule for pairs of numbers that become complex ones."""
    degree = walk.over(walk.only, [walk.ndim])
    return degree.over(walk.shape, [term[..., 0] for term in degree.terms]).plain()


def as_real(walk: Operation) -> Degree:
    """Rule for complex numbers that become pairs."""
    degree = walk.only.plain()
    return degree.over(walk.shape, [term[..., None] for term in degree.terms])


def restride(walk: Operation) -> Degree:
    """Rule for the ``as_strided`` at the end of adaptive average pooling to one pixel, with channels last.

    Any other ``as_strided`` is not understood, since it may read the memory in any order.
    """
    degree, node = walk.only, walk.node
    source = node.next_functions[0][0]
    pooled = name_of(source) == "Mean" and set(dimensions(source._saved_dim, len(degree.shape))) == {2, 3}
    channels = degree.shape[1] if len(degree.shape) == 4 else 0
    expected = (degree.shape, (channels, 1, channels, channels))
    if not pooled or degree.shape[2:] != (1, 1) or (tuple(node._saved_size), tuple(node._saved_stride)) != expected:
        raise NoRuleError
    return degree
