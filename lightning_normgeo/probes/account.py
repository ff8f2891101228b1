"""The norm's account: what every optimizer step adds to ‖W‖², summed over a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.geometry.increments import IncrementTerms, systematic_floor
from lightning_normgeo.geometry.passes import WeightPass, WeightProducts, many_weight_products
from lightning_normgeo.geometry.rows import as_rows
from lightning_normgeo.probes.formulas import Plan, by_rule, explain, plan


class Entry(NamedTuple):
    """The account of one parameter, or of several: wide scalars in units of weight², and a count."""

    start: Tensor
    """‖W_0‖² before the first step that was counted."""
    predicted: Tensor
    """Σ η²‖g‖² (eq 16; Arora, Li & Lyu 2018)."""
    gradient: Tensor
    momentum: Tensor
    weight_decay: Tensor
    quadratic: Tensor
    rounding: Tensor
    """Σ of what the optimizer's rounding adds systematically, see ``systematic_floor``."""
    steps: Tensor
    """How many steps were counted."""

    @property
    def terms(self) -> IncrementTerms:
        """The sums of the four terms."""
        return IncrementTerms(self.gradient, self.momentum, self.weight_decay, self.quadratic)


class NormAccount:
    r"""Sums over all steps so that :math:`\lVert W_T\rVert^2 - \lVert W_0\rVert^2` is explained over a whole run.

    The increments of single steps telescope; in float64 the sum loses nothing that matters. Sums stay on the device.
    A step that the gradient scaler skipped adds nothing.

    Cost: one pass over weights, gradients and momentum per optimizer step; eight numbers per parameter.

    Attributes:
        unexplained: parameters that some step moved in a way that no formula for one update describes.
        unpredicted: parameters that some step moved without a gradient at W.
    """

    def __init__(self) -> None:
        self.unexplained: set[str] = set()
        self.unpredicted: set[str] = set()
        self._names: dict[int, str] = {}
        self._rows: dict[str, int] = {}
        self._sums = torch.zeros(0, len(Entry._fields), dtype=torch.float64)
        self._pending: list[tuple[list[str], Tensor]] = []
        self._moving: list[str] = []

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Count these parameters, by name, from their next step on."""
        self._names.update((id(parameter), name) for name, parameter in parameters.items())

    @torch.no_grad()
    def open(self, optimizer: Optimizer) -> None:
        """Note ‖W_0‖² of what ``optimizer`` moves and what has no account yet, before anything is moved."""
        new = [p for group in optimizer.param_groups for p in group["params"] if self._name(p) not in self._rows]
        new = [parameter for parameter in new if id(parameter) in self._names]
        if new:
            whole = [self._whole(parameter) for parameter in new]
            found = many_weight_products([WeightPass(rows, rows) for rows in whole])
            starts = found[0].weight_sq.new_zeros(len(new), len(Entry._fields))
            starts[:, 0] = torch.stack([products.weight_sq.sum() for products in found])
            self._rows |= {self._name(parameter): len(self._rows) + i for i, parameter in enumerate(new)}
            self._sums = torch.cat([self._sums.to(starts), starts])

    @torch.no_grad()
    def begin(self, optimizer: Optimizer, moved: bool) -> None:
        """Read what this step will add, before it is taken.

        Args:
            optimizer: about to move weights.
            moved: whether it has moved them already, so that no gradient is the one at W.
        """
        moving = [
            (parameter, group)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._names and parameter.grad is not None and not parameter.grad.is_sparse
        ]
        names = self._moving = [self._name(parameter) for parameter, _ in moving]
        if moved:
            self.unpredicted.update(names)
            self._pending = []
            return
        plans = [plan(parameter, self._whole, optimizer, group) for parameter, group in moving]
        products = many_weight_products([planned.reads for planned in plans])
        self._pending = [
            ([names[k] for k in some], _contributions([plans[k] for k in some], [products[k] for k in some]))
            for some in by_rule(plans)
        ]
        self.unexplained.update(name for name, planned in zip(names, plans, strict=True) if planned.reads.rule is None)

    @torch.no_grad()
    def commit(self, valid: list[Tensor], explained: bool) -> None:
        """Add what :meth:`begin` read.

        Args:
            valid: boolean scalars on the device; unless all hold the step did not happen.
            explained: whether the optimizer moved the weights once, along the gradient that was read.
        """
        pending, self._pending = self._pending, []
        if not explained:
            self.unexplained.update(self._moving)
        for names, added in pending:
            for flag in valid:
                added = torch.where(flag.to(added.device), added, 0.0)
            index = torch.tensor([self._rows[name] for name in names]).to(added.device, non_blocking=True)
            self._sums.index_add_(0, index, added)

    def entry(self, *names: str) -> Entry | None:
        """Return the account of parameters together, or None if one of them has none."""
        if any(name not in self._rows for name in names):
            return None
        sums = torch.stack([self._sums[self._rows[name]] for name in names])
        return Entry(*sums.sum(0))._replace(steps=sums[:, Entry._fields.index("steps")].amax())

    def state(self) -> dict[str, Any]:
        """Return everything as plain numbers, exactly, for a checkpoint."""
        sums = dict(zip(self._rows, self._sums.tolist(), strict=True))
        return {"sums": sums, "unexplained": sorted(self.unexplained), "unpredicted": sorted(self.unpredicted)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; from nothing where it is empty."""
        sums = state.get("sums", {})
        self._rows = {name: row for row, name in enumerate(sums)}
        device, dtype = self._sums.device, self._sums.dtype
        self._sums = torch.tensor(list(sums.values()), dtype=torch.float64).reshape(-1, len(Entry._fields))
        self._sums = self._sums.to(device, dtype)
        self.unexplained = set(state.get("unexplained", ()))
        self.unpredicted = set(state.get("unpredicted", ()))

    def _name(self, parameter: nn.Parameter) -> str:
        return self._names.get(id(parameter), "")

    def _whole(self, tensor: Tensor) -> Tensor:
        """View a tensor by output row: what rounding adds to one row does not cancel that of another."""
        return as_rows(tensor, tensor.shape[0] if tensor.ndim > 1 else 1)


def _contributions(plans: Sequence[Plan], products: Sequence[WeightProducts]) -> Tensor:
    """Return what one step adds to each field of :class:`Entry`, one row per parameter."""
    weight_sq, predicted, terms = explain(plans, products)
    none, dtype = torch.zeros_like(weight_sq), plans[0].dtype
    known = terms or IncrementTerms(none, none, none, none)
    rounding = systematic_floor(known, weight_sq, dtype)
    by_row = torch.stack([none, predicted, *known, rounding, none], 1)
    rows = [len(read.weight_sq) for read in products]
    sums = torch.stack([part.sum(0) for part in torch.split(by_row, rows)])
    sums[:, -1] = 1.0
    return sums
