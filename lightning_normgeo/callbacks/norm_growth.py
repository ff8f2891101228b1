"""NormGrowthMonitor: what each optimizer step adds to ‖W‖², and why (eq 16)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_normgeo.callbacks.base import GeometryMonitor
from lightning_normgeo.callbacks.readings import Reading
from lightning_normgeo.callbacks.session import Measured
from lightning_normgeo.callbacks.sites import Sites
from lightning_normgeo.geometry.angles import UpdateProducts, effective_lr, split_update
from lightning_normgeo.geometry.increments import arithmetic_floor, measured_increment, storage_floor
from lightning_normgeo.probes.measurement import WeightStep


class NormGrowthMonitor(GeometryMonitor):
    r"""Logs weight norms and their increments: measured, predicted by eq 16, and explained term by term.

    Eq 16 of the paper, :math:`\Delta\lVert W\rVert^2 = \eta^2\lVert g\rVert^2`, holds for scale-invariant weights
    under plain SGD. ``explained`` holds for SGD with momentum, dampening, Nesterov and weight decay, for Adam and
    AdamW, and for any weight: it is the sum of the ``term_…`` keys. For other optimizers these keys are left out.

    =====================================  ==========  ==============================================================
    key                                    unit        meaning
    =====================================  ==========  ==============================================================
    ``norm_growth/weight_norm``            weight      ‖W‖ before the step (Fig 3)
    ``norm_growth/increment``              weight²     measured ‖W⁺‖² - ‖W‖²
    ``norm_growth/predicted``              weight²     η²‖g‖² (eq 16)
    ``norm_growth/explained``              weight²     sum of the four terms
    ``norm_growth/term_gradient``          weight²     from ⟨W, g⟩
    ``norm_growth/term_momentum``          weight²     from ⟨W, momentum before the step⟩
    ``norm_growth/term_weight_decay``      weight²     from weight decay
    ``norm_growth/term_quadratic``         weight²     η²‖update direction‖²
    ``norm_growth/residual``               weight²     increment - explained
    ``norm_growth/storage_floor``          weight²     what rounding in the weights' dtype can add to the increment
    ``norm_growth/angular_update``         radians     angle between W and W⁺, root mean square over units
    ``norm_growth/effective_lr``           1/weight²   η / ‖unit‖², mean over units
    ``norm_growth/equilibrium_angle``      radians     where weight decay and gradient noise balance
    ``norm_growth_control/*``              as above    the same for weights without an established invariance
    =====================================  ==========  ==============================================================

    Aggregates treat all units as one vector, unless the table says otherwise. Add ``/{module path}`` for one layer.

    Cost: a copy of the observed weights, and two passes over weights, gradients and momentum per measured step.

    Args:
        every_n_steps: measure each n-th optimizer step; the Trainer's ``log_every_n_steps`` if left out.
        layers: globs for the layers that get keys of their own; the first residual block if left out.
    """

    groups = ("norm_growth", "norm_growth_control")
    needs_updates = True

    def measure(self, measured: Measured) -> Iterable[Reading]:
        """Return the readings of one step."""
        moved = [step for step in measured.steps if step.update is not None]
        yield from _growth("norm_growth", [step for step in moved if step.units.invariant])
        yield from _growth("norm_growth_control", [step for step in moved if not step.units.invariant])


def _growth(group: str, steps: Sequence[WeightStep]) -> Iterator[Reading]:
    if not steps:
        return
    sites = Sites([step.units.site for step in steps], [step.units.count for step in steps], steps[0].inner.device)
    update = UpdateProducts(*map(torch.cat, zip(*(step.update for step in steps if step.update), strict=True)))
    increment = measured_increment(update.weight_update, update.update_sq)
    yield sites.reading(f"{group}/weight_norm", update.weight_sq, sites.sum, torch.sqrt, watch=True)
    yield sites.reading(f"{group}/increment", increment, sites.sum, watch=True)
    yield sites.reading(f"{group}/predicted", torch.cat([step.predicted for step in steps]), sites.sum, watch=True)
    yield from _explained(group, sites, steps, increment)
    yield _floor(f"{group}/storage_floor", sites, steps)
    angle = split_update(update).angle
    yield sites.reading(f"{group}/angular_update", angle.square(), sites.mean, torch.sqrt, watch=True)
    rates = torch.cat([effective_lr(step.lr, step.weight_sq) for step in steps])
    yield sites.reading(f"{group}/effective_lr", rates, sites.mean)
    yield from _equilibrium(group, steps)


def _explained(group: str, sites: Sites, steps: Sequence[WeightStep], increment: Tensor) -> Iterator[Reading]:
    if any(step.terms is None for step in steps):
        return
    terms = {
        name: torch.cat([getattr(step.terms, name) for step in steps])
        for name in ("total", "gradient", "momentum", "weight_decay", "quadratic")
    }
    explained = terms.pop("total")
    yield sites.reading(f"{group}/explained", explained, sites.sum, watch=True)
    for name, values in terms.items():
        yield sites.reading(f"{group}/term_{name}", values, sites.sum)
    yield sites.reading(f"{group}/residual", increment - explained, sites.sum)


def _floor(key: str, sites: Sites, steps: Sequence[WeightStep]) -> Reading:
    """Return what rounding explains of the residual: of stored weights at random, of arithmetic systematically."""
    stored = torch.cat([storage_floor(step.quartic, step.dtype) for step in steps]).square()
    computed = torch.cat(
        [
            step.inner.new_zeros(step.inner.shape) if step.terms is None else arithmetic_floor(step.terms, step.dtype)
            for step in steps
        ]
    )
    total = stored.sum().sqrt() + computed.sum()
    return Reading(key, total, sites.sum(stored).sqrt() + sites.sum(computed), sites.names)


def _equilibrium(group: str, steps: Sequence[WeightStep]) -> Iterator[Reading]:
    decayed = [step for step in steps if step.equilibrium is not None]
    known = [torch.ones_like(step.inner) * step.equilibrium for step in decayed if step.equilibrium is not None]
    if known:
        sites = Sites(
            [step.units.site for step in decayed], [step.units.count for step in decayed], steps[0].inner.device
        )
        yield sites.reading(f"{group}/equilibrium_angle", torch.cat(known).square(), sites.mean, torch.sqrt)
