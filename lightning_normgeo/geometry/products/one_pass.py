"""Inner products of weights before a step, from one pass over the weight, its gradient and its optimizer state.

Reading memory is what costs time here. Weights on a CPU are read by the compiled loops of :mod:`.numba_kernels` where
numba is installed, those on a GPU by the kernels of :mod:`.triton_kernels` where Triton is, and all others by torch,
with the same results up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import UpdateRule
from lightning_normgeo.geometry.products.compiled import loop_sums
from lightning_normgeo.geometry.products.rule_numbers import has_numbers
from lightning_normgeo.geometry.products.weight_pass import WeightPass, WeightProducts
from lightning_normgeo.geometry.rows import column_blocks, concatenated, dot, row_blocks, wide_dtype


def weight_products(
    weight: Tensor,
    gradient: Tensor,
    *state: Tensor,
    rule: UpdateRule | None = None,
    gradient_scale: Tensor | None = None,
    keep: Tensor | None = None,
) -> WeightProducts:
    """Return the inner products of a weight before a step; for several weights see :func:`many_weight_products`.

    Args:
        weight: W, ``(units, n)``.
        gradient: g, ``(units, n)``.
        state: the optimizer state that ``rule`` reads, each ``(units, n)``, of any float dtype.
        rule: the optimizer's update rule. Default: none, for the products that need no rule.
        gradient_scale: scalar by which the gradient still has to be divided. Default: 1.
        keep: tensor of W's shape and dtype that receives a copy of W, made while W is in cache. Default: no copy.

    Returns:
        The products, each ``(units,)``.

    Cost: one pass over all inputs.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, gradient = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> products = weight_products(weight, gradient, gradient_scale=torch.tensor(2.0))
        >>> torch.allclose(products.inner, (weight * gradient).sum(1) / 2)
        True
        >>> torch.allclose(products.quartic, weight.pow(4).sum(1))
        True
    """
    return many_weight_products([WeightPass(weight, gradient, state, rule, gradient_scale, keep)])[0]


def many_weight_products(passes: Sequence[WeightPass]) -> list[WeightProducts]:
    """Return :func:`weight_products` of several weights, with threads started once for all of them."""
    found = _read([one._replace(rule=None, state=()) if one.known else one for one in passes])
    return [
        WeightProducts(torch.cat([products.sums, torch.stack(one.known)])) if one.known else products
        for one, products in zip(passes, found, strict=True)
    ]


def _read(passes: Sequence[WeightPass]) -> list[WeightProducts]:
    found = loop_sums("weight_sums", passes, [_matrices(one) for one in passes])
    return [
        WeightProducts(found[k]).joined(one.weight.shape[0]) if k in found else _by_torch(one)
        for k, one in enumerate(passes)
    ]


def _matrices(one: WeightPass) -> list[Tensor] | None:
    """Return the matrices that a compiled loop would read and write; None if there is no loop for the pass."""
    kept = [] if one.keep is None else [one.keep]
    return [one.weight, one.gradient, *one.state, *kept] if has_numbers(one) and _is_wide(one) else None


def _is_wide(one: WeightPass) -> bool:
    """Whether a loop has 1 - β^t as the optimizer has it; the host's is float64, a float32 ``step`` has it in float32.

    The columns that are made on a device are of the dtype of ``step``.
    """
    step = getattr(one.rule, "step", None)
    return not isinstance(step, Tensor) or step.dtype == torch.float64 or not step.is_cpu


def _by_torch(one: WeightPass) -> WeightProducts:
    def reduce(w: Tensor, g: Tensor, *s: Tensor) -> tuple[Tensor, ...]:
        g = g if one.gradient_scale is None else g / one.gradient_scale
        inner, gradient_sq = dot(w, g), dot(g, g)
        products = () if one.rule is None else one.rule.products(w, g, *s)
        square = w.square()
        return square.sum(1), inner, gradient_sq, dot(square, square), *products

    def reduce_columns(columns: slice) -> tuple[Tensor, ...]:
        weight, gradient, *state = (tensor.detach()[:, columns] for tensor in (one.weight, one.gradient, *one.state))
        parts = []
        for rows in row_blocks(weight):
            if one.keep is not None:
                one.keep[rows, columns].copy_(weight[rows])
            parts.append(reduce(*(tensor[rows].to(wide) for tensor in (weight, gradient, *state))))
        return concatenated(parts)

    wide = wide_dtype(one.weight.device)
    blocks = column_blocks(one.weight) if is_additive(one.rule) else [slice(None)]
    by_block = [reduce_columns(columns) for columns in blocks]
    return WeightProducts(torch.stack([sum(parts[1:], parts[0]) for parts in zip(*by_block, strict=True)]))


def is_additive(rule: UpdateRule | None) -> bool:
    """Whether the products of a row are sums over its elements, as the class of the rule says itself, not a base.

    Without a rule there are only inner products, which are such sums.
    """
    return rule is None or bool(vars(type(rule)).get("additive", False))
