"""Cumulative increments: the terms of ‖W⁺‖² - ‖W‖² of every optimizer step, summed over a whole run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.geometry.columns import run_sums
from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms
from lightning_normgeo.geometry.increments.momentum_increments import MomentumState, momentum_increment
from lightning_normgeo.geometry.increments.rounding_floors import systematic_floor
from lightning_normgeo.geometry.products.one_pass import many_weight_products
from lightning_normgeo.geometry.products.weight_pass import WeightPass, WeightProducts
from lightning_normgeo.geometry.rows import as_rows, in_memory_order, observing_device, on_observing_device, output_rows
from lightning_normgeo.geometry.update_rules.device_scalars import copied_together
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.probes.cumulative.parameter_names import ParameterNames
from lightning_normgeo.probes.cumulative.totals import SummedWeight, Totals
from lightning_normgeo.probes.explain import ParameterReading, ReadPlan, by_rule, explain, parameters_of, plan
from lightning_normgeo.probes.momentum_buffers import first_state

_BUFFER = slice(Totals._fields.index("buffer_inner"), Totals._fields.index("buffer_sq") + 1)


class CumulativeIncrements:
    r"""Sums over all steps so that :math:`\lVert W_T\rVert^2 - \lVert W_0\rVert^2` is explained over a whole run.

    The increments of single steps telescope; in float64 the sum loses nothing that matters. Sums stay on the device.
    A step that the gradient scaler skipped adds nothing.

    Cost: one pass over weights, gradients and momentum per optimizer step; eleven numbers per parameter.

    Args:
        look_up: returns the parameters to count, by name; asked again whenever an optimizer has one that is not known.

    Attributes:
        unexplained: parameters that some step moved in a way that no formula for one update describes.
        unpredicted: parameters that some step moved without a gradient at W.
        without_momentum_form: parameters that some other optimizer than SGD moved, or another rule than their biases.
        parameters: those that were counted, by name.
        members: the weights that were measured, by name, as they were the last time.
    """

    def __init__(self, look_up: Callable[[], Mapping[str, nn.Parameter]] = dict) -> None:
        self.unexplained: set[str] = set()
        self.unpredicted: set[str] = set()
        self.without_momentum_form: set[str] = set()
        self.parameters: dict[str, nn.Parameter] = {}
        self.members: dict[str, SummedWeight] = {}
        self._names = ParameterNames(look_up)
        self._rows: dict[str, int] = {}
        self._counted: set[str] = set()
        self._sums = torch.zeros(0, len(Totals._fields), dtype=torch.float64)
        self._pending: list[tuple[list[str], Tensor]] = []
        self._moving: list[str] = []
        self._indices: dict[tuple[str, ...], Tensor] = {}

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Sum up these parameters, by name, from their next step on; a renamed parameter keeps its sums.

        One that is no longer among them may share its memory with another one, as in a layer that was parametrized: it
        has no norm of its own any more.
        """
        self._rename(self._names.update(parameters))
        self.parameters = {name: parameters[name] for name in self.parameters if name in parameters}

    def look_for(self, moved: Collection[str]) -> None:
        """Look up the parameters again if one that moved has no sums, or a weight did not move.

        It may have another name by now, or may have been replaced.
        """
        if not self._rows.keys() >= set(moved) >= self.members.keys():
            self.follow(self._names.look_up())

    @torch.no_grad()
    def open(self, optimizer: Optimizer) -> None:
        """Store ‖W_0‖² of the parameters of ``optimizer`` that have no sums yet, before anything is moved."""
        held = list(parameters_of(optimizer))
        if not all(map(self._names.knows, held)):
            self.follow(self._names.look_up())
            self._names.leave_nameless(held)
        named = {name: parameter for parameter in held if (name := self._names.of(parameter))}
        self.parameters.update(named)
        new = {name: parameter for name, parameter in named.items() if name not in self._rows}
        own = next(iter(named.values()), None)
        if own is not None:  # sums of a checkpoint are on the CPU
            self._sums = self._sums.to(observing_device(own.device))
        if new:
            norms = torch.stack(self._norms(list(new.values())))
            starts = norms.new_zeros(len(new), len(Totals._fields))
            starts[:, 0] = norms
            self._rows |= {name: len(self._rows) + i for i, name in enumerate(new)}
            self._sums = torch.cat([self._sums, starts])

    @torch.no_grad()
    def begin(self, optimizer: Optimizer, moved: bool, read: Mapping[int, ParameterReading] | None = None) -> None:
        """Find the increments of a step before it is taken.

        Args:
            optimizer: about to move weights.
            moved: whether it has moved them already, so that no gradient is the one at W.
            read: parameters that have been read by output rows for a measurement of the same step, by id; only the
                others are read here. Default: none.
        """
        moving = [
            (parameter, group)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if self._names.of(parameter) and parameter.grad is not None
        ]
        names = self._moving = [self._names.of(parameter) for parameter, _ in moving]
        self._pending = []
        if moved:
            self._give_up(names)
            return
        try:
            self._read([entry for entry in moving if not entry[0].grad.is_sparse], optimizer, read or {})
        except Exception:
            self._give_up(names)
            raise
        self._give_up([self._names.of(parameter) for parameter, _ in moving if parameter.grad.is_sparse])

    @torch.no_grad()
    def commit(self, valid: list[Tensor], explained: bool) -> None:
        """Add the increments that :meth:`begin` has found.

        Args:
            valid: boolean scalars on the device; unless all hold the step did not happen.
            explained: whether the optimizer moved the weights once, along the gradient that was read.
        """
        pending, self._pending = self._pending, []
        if not explained:
            self.unexplained.update(self._moving)
            self.without_momentum_form.update(self._moving)
        for names, added in pending:
            for flag in valid:
                added = torch.where(flag.to(added.device), added, 0.0)
            self._sums.index_add_(0, self._index(names, added.device), added)

    def entry(self, *names: str) -> Totals | None:
        """Return the sums of parameters together; None if one of them has none."""
        if any(name not in self._rows for name in names):
            return None
        sums = torch.stack([self._sums[self._rows[name]] for name in names])
        return Totals(*sums.sum(0))._replace(steps=sums[:, Totals._fields.index("steps")].amax())

    @torch.no_grad()
    def norms_sq(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return ‖W‖² of parameters as they are now; of those whose parameter is known."""
        known = [name for name in names if name in self.parameters]
        return dict(zip(known, self._norms([self.parameters[name] for name in known]), strict=True)) if known else {}

    def rest(self) -> None:
        """Release the model; the sums stay."""
        self._names, self.parameters = ParameterNames(), {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model out of copies."""
        return {**self.__dict__, "_names": ParameterNames(), "parameters": {}}

    def state(self) -> dict[str, Any]:
        """Return everything as plain numbers, exactly, for a checkpoint."""
        return {
            "fields": list(Totals._fields),
            "sums": dict(zip(self._rows, self._sums.tolist(), strict=True)),
            "unexplained": sorted(self.unexplained),
            "unpredicted": sorted(self.unpredicted),
            "without_momentum_form": sorted(self.without_momentum_form),
            "members": {name: [one.invariant, list(one.others), one.partners] for name, one in self.members.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint; from zero where it is empty.

        Raises:
            ValueError: for sums of another form than :meth:`state` returns.
        """
        sums = state.get("sums", {})
        if state and list(state.get("fields", ())) != list(Totals._fields):
            raise ValueError(f"its sums have the fields {list(state.get('fields', ()))}, not {list(Totals._fields)}")
        table = torch.tensor(list(sums.values()), dtype=torch.float64).reshape(-1, len(Totals._fields))
        self._rows = {str(name): row for row, name in enumerate(sums)}
        self._sums = table.to(self._sums.device, self._sums.dtype)
        self._counted, self._indices = set(self._rows), {}
        self.members = {
            name: SummedWeight(invariant, tuple(others), partners)
            for name, (invariant, others, partners) in state.get("members", {}).items()
        }
        for name in ("unexplained", "unpredicted", "without_momentum_form"):
            setattr(self, name, set(state.get(name, ())))

    def _read(
        self,
        moving: Sequence[tuple[nn.Parameter, dict[str, Any]]],
        optimizer: Optimizer,
        read: Mapping[int, ParameterReading],
    ) -> None:
        names = [self._names.of(parameter) for parameter, _ in moving]
        missing = [(parameter, group) for parameter, group in moving if id(parameter) not in read]
        with copied_together(optimizer):
            planned = [plan(p, functools.partial(self._whole, like=p), optimizer, group) for p, group in missing]
        found = iter(map(ParameterReading, planned, many_weight_products([one.reads for one in planned])))
        readings = [read[id(parameter)] if id(parameter) in read else next(found) for parameter, _ in moving]
        plans, products = [one.plan for one in readings], [one.products for one in readings]
        for some in by_rule(plans):
            members, chosen = [names[k] for k in some], [plans[k] for k in some]
            self._pending.append((members, self._contributions(members, chosen, [products[k] for k in some])))
        self.unexplained.update(name for name, planned in zip(names, plans, strict=True) if planned.reads.rule is None)

    def _contributions(self, names: list[str], plans: Sequence[ReadPlan], products: Sequence[WeightProducts]) -> Tensor:
        """Return the contributions of one step to :class:`Totals`, one row per parameter that one rule moves."""
        rule, found = plans[0].reads.rule, explain(plans, products)
        terms = found.terms or IncrementTerms(*torch.zeros_like(found.weight_sq).expand(4, -1))
        rounding = systematic_floor(terms, found.weight_sq, plans[0].arithmetic)
        direction = found.products[1:2] if isinstance(rule, SGDRule) else ()  # ‖u‖², where there is a buffer
        columns = [*terms, rounding, found.predicted, found.weight_sq, found.gradient_sq, *direction]
        sums = run_sums(torch.stack(columns), [read.units for read in products])
        *by_term, rounded, predicted, weight_sq, gradient_sq = sums[:8].unbind()
        direction_sq = sums[8] if direction else None
        nothing, once = torch.zeros_like(predicted), torch.ones_like(predicted)
        momentum = buffer_inner = buffer_sq = nothing
        if isinstance(rule, SGDRule):
            kept = MomentumState(*self._sums[self._index(names, predicted.device)][:, _BUFFER].unbind(1))
            before = first_state(kept, [name not in self._counted for name in names], plans, products)
            momentum, after = momentum_increment(rule, weight_sq, gradient_sq, direction_sq, before)
            buffer_inner, buffer_sq = after.inner - kept.inner, after.square - kept.square
        else:
            self.without_momentum_form.update(names)
        # torch leaves a buffer alone while there is no momentum; afterwards it is read again
        keeps = not isinstance(rule, SGDRule) or rule.momentum
        self._counted = self._counted | set(names) if keeps else self._counted - set(names)
        added = Totals(
            start=nothing,
            predicted=predicted,
            predicted_momentum=momentum,
            **IncrementTerms(*by_term)._asdict(),
            rounding=rounded,
            buffer_inner=buffer_inner,
            buffer_sq=buffer_sq,
            steps=once,
        )
        return torch.stack(list(added), 1)

    def _rename(self, called: Mapping[str, str]) -> None:
        """Rename parameters, from old to new names, as pruning and parametrizations do; nothing on a clash."""

        def now(name: str) -> str:
            return called.get(name, name)

        if not called or len({now(name) for name in self._rows}) < len(self._rows):
            return
        self._rows = {now(name): row for name, row in self._rows.items()}
        self.parameters = {now(name): parameter for name, parameter in self.parameters.items()}
        self.members = {
            now(name): one._replace(others=tuple(map(now, one.others))) for name, one in self.members.items()
        }
        for kept in ("_counted", "unexplained", "unpredicted", "without_momentum_form"):
            setattr(self, kept, set(map(now, getattr(self, kept))))
        self._indices = {}

    def _give_up(self, names: Sequence[str]) -> None:
        for missing in (self.unexplained, self.unpredicted, self.without_momentum_form):
            missing.update(names)

    def _index(self, names: Sequence[str], device: torch.device) -> Tensor:
        key = tuple(names)
        if key not in self._indices or self._indices[key].device != device:
            self._indices[key] = torch.tensor([self._rows[name] for name in names], device=device)
        return self._indices[key]

    def _norms(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        whole = [self._whole(parameter, parameter) for parameter in parameters]
        return [found.weight_sq.sum() for found in many_weight_products([WeightPass(rows, rows) for rows in whole])]

    def _whole(self, tensor: Tensor, like: Tensor) -> Tensor:
        """View a tensor by output row, so that the rounding errors of one row do not cancel those of another."""
        return as_rows(in_memory_order(on_observing_device(tensor), like), output_rows(tensor))
