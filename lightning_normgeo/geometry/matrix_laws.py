r"""Laws of gradients that follow from matrix symmetries: attention heads, and the rotations of a residual stream.

A head of an attention computes its scores from :math:`W_Q^T W_K` only, so that :math:`A W_Q` and :math:`A^{-T} W_K`
give the same function for every invertible matrix A. A scale symmetry is a diagonal A, and gives one law for each of
the d_h channels; all A give d_h². Marcotte et al. 2023 list such laws for gradient flows. They hold for the gradient at
any point, of any loss, in exact arithmetic.

Rows are channels of the head. A bias is one more column: ``torch.cat([weight, bias[:, None]], 1)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError


class MatrixLaw(NamedTuple):
    """Both sides of a law between matrices, which are equal if it holds."""

    left: Tensor
    """The left side, ``(heads, d_h, d_h)``, in units of loss."""
    right: Tensor
    """The right side, of the same shape."""

    @property
    def error(self) -> Tensor:
        """The Frobenius norm of the difference, relative to the larger side, ``(heads,)``; 0 if both are zero."""
        left, right = (torch.linalg.matrix_norm(side) for side in self)
        size = torch.maximum(left, right)
        gap: Tensor = torch.linalg.matrix_norm(self.left - self.right)
        return gap / torch.where(size > 0, size, 1.0)


def query_key_law(
    query: Tensor, query_gradient: Tensor, key: Tensor, key_gradient: Tensor, heads: int, key_heads: int | None = None
) -> MatrixLaw:
    r"""Return both sides of :math:`g_Q W_Q^T = W_K g_K^T`, d_h² laws for each head.

    The derivative of the loss along :math:`A W_Q, A^{-T} W_K` at A = 1. Where several heads share keys (grouped
    queries), the left side is the sum over them. It holds for attention without anything between the projection and
    the product q·k that is not the same for all channels: not with rotary positions, norms of queries or keys. The
    diagonal is the charge of the scale symmetries +W_Q[i] -W_K[i].

    Args:
        query: W_Q, ``(heads·d_h, n)``.
        query_gradient: g_Q, of the same shape.
        key: W_K, ``(key_heads·d_h, n)``.
        key_gradient: g_K, of the same shape.
        heads: number of heads of the queries.
        key_heads: number of heads of the keys, which has to divide ``heads``. Default: ``heads``.

    Returns:
        Both sides, each ``(key_heads, d_h, d_h)``, in units of loss.

    Cost: two matrix products per head.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(1, 6, 8, dtype=torch.float64)
        >>> query, key = torch.randn(2, 8, 8, dtype=torch.float64)
        >>> def loss(q, k):  # two heads of four channels
        ...     q, k = ((x @ w.T).unflatten(-1, (2, 4)).transpose(1, 2) for w in (q, k))
        ...     return (q @ k.mT).softmax(-1).square().sum()
        >>> law = query_key_law(query, (g := torch.func.grad(loss, (0, 1))(query, key))[0], key, g[1], heads=2)
        >>> torch.allclose(law.left, law.right)
        True
    """
    shared = heads if key_heads is None else key_heads
    q, q_gradient = (_by_head(tensor, heads) for tensor in (query, query_gradient))
    k, k_gradient = (_by_head(tensor, shared) for tensor in (key, key_gradient))
    return MatrixLaw(_over_groups(q_gradient @ q.mT, shared), k @ k_gradient.mT)


def value_output_law(
    value: Tensor,
    value_gradient: Tensor,
    output: Tensor,
    output_gradient: Tensor,
    heads: int,
    value_heads: int | None = None,
) -> MatrixLaw:
    r"""Return both sides of :math:`g_V W_V^T = W_O^T g_O`, d_h² laws for each head.

    The derivative of the loss along :math:`A W_V, W_O A^{-1}` at A = 1. Where several heads share values (grouped
    queries), the right side is the sum over them. It holds with rotary positions and norms of queries or keys too,
    since these do not touch the values. A bias of the output has no part in it.

    Args:
        value: W_V, ``(value_heads·d_h, n)``.
        value_gradient: g_V, of the same shape.
        output: W_O, ``(m, heads·d_h)``.
        output_gradient: g_O, of the same shape.
        heads: number of heads.
        value_heads: number of heads of the values, which has to divide ``heads``. Default: ``heads``.

    Returns:
        Both sides, each ``(value_heads, d_h, d_h)``, in units of loss.

    Cost: two matrix products per head.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, scores = torch.randn(6, 8, dtype=torch.float64), torch.randn(2, 6, 6, dtype=torch.float64).softmax(-1)
        >>> value, output = torch.randn(2, 8, 8, dtype=torch.float64)
        >>> def loss(v, o):  # two heads of four channels
        ...     mixed = scores @ (x @ v.T).unflatten(-1, (2, 4)).transpose(0, 1)
        ...     return (mixed.transpose(0, 1).flatten(1) @ o.T).tanh().sum()
        >>> law = value_output_law(value, (g := torch.func.grad(loss, (0, 1))(value, output))[0], output, g[1], heads=2)
        >>> torch.allclose(law.left, law.right)
        True
    """
    shared = heads if value_heads is None else value_heads
    v, v_gradient = (_by_head(tensor, shared) for tensor in (value, value_gradient))
    o, o_gradient = (_by_head(tensor.mT, heads) for tensor in (output, output_gradient))
    return MatrixLaw(v_gradient @ v.mT, _over_groups(o @ o_gradient.mT, shared))


def rotation_charge(writers: Iterable[tuple[Tensor, Tensor]], readers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    r"""Return the antisymmetric part of :math:`M = \sum_w W g^T + \sum_r W^T g`, which is zero: d(d-1)/2 laws.

    A residual stream of d channels that only RMS normalizations with γ = 1 read can be rotated: R W of everything that
    writes to it and :math:`W R^T` of everything that reads it give the same function for every orthogonal R, since R
    changes no norm. The law is the derivative at R = 1. With other γ, multiply it into the readers, and its inverse
    into their gradients. Layer normalization subtracts the mean, so only rotations that keep (1, …, 1) remain.

    Args:
        writers: weight and gradient of each writer, ``(d, n)``: rows are channels of the stream. The transpose of an
            embedding table, output projections, their biases as another column or as ``(d, 1)``.
        readers: weight and gradient of each reader, ``(m, d)``: columns are channels of the stream.

    Returns:
        :math:`M - M^T`, ``(d, d)``, in units of loss. Compare it with the size of M's parts.

    Raises:
        ConfigurationError: without any writer or reader.

    Cost: one matrix product per weight.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, writer, reader = torch.randn(3, 6, 6, dtype=torch.float64)
        >>> loss = lambda w, r: (torch.nn.functional.rms_norm(x @ w.T, (6,), eps=0.0) @ r.T).tanh().sum()
        >>> gradients = torch.func.grad(loss, (0, 1))(writer, reader)
        >>> charge = rotation_charge([(writer, gradients[0])], [(reader, gradients[1])])
        >>> bool(charge.abs().max() < 1e-13)
        True
    """
    parts = [weight @ gradient.mT for weight, gradient in writers]
    parts += [weight.mT @ gradient for weight, gradient in readers]
    if not parts:
        raise ConfigurationError("rotation_charge got no weight. Give pairs (weight, gradient) of writers and readers.")
    whole = torch.stack(parts).sum(0)
    return whole - whole.mT


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """Return ``(heads, d_h, n)``."""
    return tensor.reshape(heads, -1, tensor.shape[1])


def _over_groups(products: Tensor, shared: int) -> Tensor:
    """Return the sums over heads that share keys or values."""
    return products.reshape(shared, -1, *products.shape[1:]).sum(1)
