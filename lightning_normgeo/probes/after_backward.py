"""W, g and ∂L/∂γ right after the backward passes of a step, before anything else can change them.

What ε adds to ⟨W, g⟩ is known for the gradient that a backward pass has left. Until the optimizer applies it, it may be
clipped, scaled, or edited by the user's code, also through ``.data``, which no version counter shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.probes.explain import parameters_of
from lightning_normgeo.probes.weight_reader import WeightReader
from lightning_normgeo.probes.weight_step import Observed

Stamp = tuple[int, int, int]
_ONLY_READ = ("wandb.", f"{__package__}.")
"""Beginnings of the modules whose hooks change no gradients."""
_ORDER = 1e-12
"""Relative difference of two sums over the same numbers: they may be read in another order with other weights."""


@dataclass
class AfterBackward:
    """A weight with a batch normalization behind it, right after a backward pass.

    Attributes:
        weight: the id of W.
        scale_gradient: ∂L/∂γ in ``γ.grad``, ``(units,)`` in float64.
        stamp: the identity and version of g and the version of W, which in-place operations change.
        sums: ‖W‖², ⟨W, g⟩, ‖g‖² and ΣW⁴, ``(4, units)``; None if nothing should change W and g before the step.
        doubt: zeros, ``(units,)``, NaN where g was changed between two backward passes, or not zero before the first
            one; None if there was no gradient before the only one.
    """

    weight: int
    scale_gradient: Tensor
    stamp: Stamp
    sums: Tensor | None = None
    doubt: Tensor | None = None


class BackwardRecord:
    """The state of W, g and γ after the backward passes of a step.

    Args:
        reader: reads weights and their gradients.
    """

    def __init__(self, reader: WeightReader) -> None:
        self._reader = reader
        self._found: dict[str, AfterBackward] = {}
        self._doubts: dict[str, Tensor] = {}
        self._apart: set[str] = set()
        self._applied: dict[str, AfterBackward] = {}
        self._given_up = False

    def forget(self) -> None:
        """Discard all records, at the beginning of a step."""
        self._found, self._doubts, self._apart, self._applied = {}, {}, set(), {}
        self._given_up = False

    def give_up(self) -> None:
        """Have no records in this step, of which something could not be read."""
        self._given_up = True

    def apply(self, optimizer: Optimizer) -> None:
        """Keep the records of the weights that an optimizer is about to move, as they are now."""
        held = {id(parameter): parameter for parameter in parameters_of(optimizer)}
        for name, record in self._found.items():
            if record.weight in held:
                self._applied.pop(name, None)
                unchanged = record.sums is not None or record.stamp == _stamp(held[record.weight])
                if unchanged and name not in self._apart:
                    self._applied[name] = record

    @property
    def applied(self) -> Mapping[str, AfterBackward]:
        """The records of the weights that optimizers have moved, by name; without those that cannot be used."""
        return {} if self._given_up else self._applied

    @torch.no_grad()
    def begin(self, weights: Iterable[Observed], scales: Mapping[str, nn.Parameter]) -> None:
        """Compare gradients with those after the last backward pass, before another one adds to them."""
        again = []
        for one, gamma in _pairs(weights, scales):
            name = one.units.name
            if not _go_together(one.weight, gamma):
                self._apart.add(name)
            elif one.weight.grad is None:
                self._apart.discard(name)
                self._found.pop(name, None)
                self._doubts.pop(name, None)
            elif name not in self._found:
                self._doubts[name] = _doubt(one, gamma)
            elif self._found[name].sums is not None:
                again.append(one)
            elif self._found[name].stamp != _stamp(one.weight):
                self._apart.add(name)
        self._compare(again)

    def _compare(self, weights: Sequence[Observed]) -> None:
        """Find the units whose W or g is not as the last backward pass has left it."""
        names = [one.units.name for one in weights]
        left = [sums for name in names if (sums := self._found[name].sums) is not None]
        if not left:
            return
        now, before = torch.cat(self._reader.products(weights), 1), torch.cat(left, 1)
        sizes = torch.stack([before[0], (before[0] * before[2]).sqrt(), *before[2:]])
        same = ((now - before).abs() <= _ORDER * sizes).all(0)
        doubts = torch.split(torch.where(same, 0.0, torch.nan), [sums.shape[1] for sums in left])
        for name, doubt in zip(names, doubts, strict=True):
            self._doubts[name] = doubt + self._doubts.get(name, 0.0)

    @torch.no_grad()
    def note(self, weights: Iterable[Observed], scales: Mapping[str, nn.Parameter], thorough: bool) -> None:
        """Record gradients right after a backward pass.

        Args:
            weights: those behind the losses.
            scales: γ by name.
            thorough: whether to read all of W and g, since something may change them before the optimizer's step. It
                costs one pass over both.
        """
        pairs = [
            (one, gamma)
            for one, gamma in _pairs(weights, scales)
            if gamma.grad is not None and gamma.numel() == one.units.count and _is_dense(one)
            if not any(map(changes_gradient, (*one.parameters, gamma)))
        ]
        products: Sequence[Tensor | None] = [None] * len(pairs)
        if thorough:
            products = self._reader.products([one for one, _ in pairs])
        gradients = _copies([gamma.grad for _, gamma in pairs if gamma.grad is not None])
        self._found = {
            one.units.name: AfterBackward(
                id(one.weight), gradient, _stamp(one.weight), sums, self._doubts.get(one.units.name)
            )
            for (one, _), gradient, sums in zip(pairs, gradients, products, strict=True)
        }


def _stamp(weight: nn.Parameter) -> Stamp:
    gradient = weight.grad
    return id(gradient), -1 if gradient is None else gradient._version, weight._version


def _go_together(weight: nn.Parameter, gamma: nn.Parameter) -> bool:
    """Whether the gradients of W and γ come from the same backward passes."""
    same_passes = (weight.grad is None) == (gamma.grad is None)
    return same_passes and weight.requires_grad == gamma.requires_grad


def _doubt(one: Observed, gamma: nn.Parameter) -> Tensor:
    """Return zeros if the gradients that a step begins with are zero, as after ``zero_grad(set_to_none=False)``."""
    gradients = [parameter.grad for parameter in (*one.parameters, gamma) if parameter.grad is not None]
    left = torch.stack([on_observing_device(gradient).count_nonzero() for gradient in gradients]).sum()
    return torch.where(left == 0, 0.0, torch.nan).expand(one.units.count)


def changes_gradient(tensor: Tensor) -> bool:
    """Whether a hook may change the gradient of a tensor in the backward pass; wandb.watch and probes only read it."""
    hooks = [*(tensor._backward_hooks or {}).values()]
    hooks += (getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values()
    return any(not str(getattr(hook, "__module__", "")).startswith(_ONLY_READ) for hook in hooks)


def _pairs(weights: Iterable[Observed], scales: Mapping[str, nn.Parameter]) -> list[tuple[Observed, nn.Parameter]]:
    """Return the weights that have a batch normalization behind them, with its γ."""
    named = [(one, one.units.scale) for one in weights]
    return [(one, scales[scale]) for one, scale in named if scale is not None and scale in scales]


def _is_dense(one: Observed) -> bool:
    """Whether all parameters of the units have gradients that can be read."""
    return all(p.grad is not None and not p.grad.is_sparse for p in one.parameters)


def _copies(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return flat copies in float64, made together for all tensors of a device."""
    places: dict[torch.device, list[int]] = defaultdict(list)
    flat = [on_observing_device(gradient.detach()).reshape(-1) for gradient in gradients]
    for k, gradient in enumerate(flat):
        places[gradient.device].append(k)
    copies: dict[int, Tensor] = {}
    for some in places.values():
        together = torch.cat([flat[k] for k in some]).to(torch.float64)
        copies.update(zip(some, torch.split(together, [flat[k].numel() for k in some]), strict=True))
    return [copies[k] for k in range(len(flat))]
