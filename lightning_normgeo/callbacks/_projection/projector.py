"""Projector of one training: the blocks of each optimizer, and their steps on the spheres."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.steps.sphere_steps import geodesic_step, hyperball_step
from lightning_normgeo.probes.explain import parameters_of
from lightning_normgeo.symmetries.spheres.local_parts import LocalParameters
from lightning_normgeo.symmetries.spheres.spheres import Spheres, StepSums
from lightning_normgeo.symmetries.symmetries import Symmetries

Mode = Literal["retract", "tangent", "geodesic", "hyperball"]
"""The ways to stay on spheres."""
_STEPS: dict[str, Callable[[StepSums, Tensor], tuple[Tensor, Tensor]]] = {
    "geodesic": lambda sums, radii: geodesic_step(sums.weight_sq, sums.inner, sums.update_sq, radii),
    "hyperball": lambda sums, radii: hyperball_step(*sums, radii),
}
"""Modes that replace the step of the optimizer."""


@dataclass
class BlockGroup:
    """Blocks that the same optimizers move.

    Attributes:
        owners: numbers of the optimizers.
        spheres: of the blocks.
        growth: log(‖W‖/r) of each block in free training with the same directions, since the radii were fixed.
        before: the parameters before a step.
        steps: number of steps since the last projection.
        factors: r/‖W‖ of each block at the last projection; None before it.
        rates: learning rate of each parameter in the last step, by id.
    """

    owners: frozenset[int]
    spheres: Spheres
    growth: Tensor
    before: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    factors: Tensor | None = None
    rates: Mapping[int, float] = field(default_factory=dict)


class Projector:
    """Keeps blocks on their spheres.

    Args:
        mode: the way to stay on spheres.
        radius: norm of every block. Default: the norm that it has when it is found.
        every_n_steps: number of optimizer steps between two projections.
        transport: whether the optimizer's state follows.
        optimizers: of the Trainer.

    Attributes:
        groups: the blocks found so far.
    """

    def __init__(
        self, mode: Mode, radius: float | None, every_n_steps: int, transport: bool, optimizers: Sequence[Optimizer]
    ) -> None:
        self.groups: list[BlockGroup] = []
        self._mode, self._radius = mode, radius
        self._every, self._transport = every_n_steps, transport
        self._optimizers = list(optimizers)
        self._looked_at: set[int] = set()
        self._stepped: set[int] = set()
        self._restored: Mapping[str, Mapping[str, Tensor]] = {}

    def lacks(self, optimizer: Optimizer) -> bool:
        """Whether the blocks of an optimizer have not been looked for."""
        return self._number(optimizer) not in self._looked_at

    @property
    def follows_free_training(self) -> bool:
        """Whether directions move as in free training with another learning rate."""
        return self._mode == "retract" and self._transport

    @property
    def complete(self) -> bool:
        """Whether the blocks of all optimizers have been looked for."""
        return len(self._looked_at) == len(self._optimizers)

    def add(self, optimizer: Optimizer, found: Sequence[Symmetries], module: nn.Module, own: LocalParameters) -> None:
        """Add the blocks that an optimizer moves.

        Gradients are sums over losses: only symmetries of graphs that share no parameter of the optimizer with another
        graph are invariances of the sum.

        Args:
            optimizer: about to take its first step.
            found: symmetries of the graphs that its gradients come from.
            module: the model.
            own: parameters of the model.
        """
        self._looked_at.add(self._number(optimizer))
        held = set(map(id, parameters_of(optimizer)))
        names = {name for name, parameter in own.parameters.items() if id(parameter) in held}
        graphs = [one for one in found if names & set(one.parameters)]
        for one in graphs:
            others = {name for other in graphs if other is not one for name in other.parameters}
            self._add_blocks(Spheres(one, module, parameters=own), others, self._number(optimizer))

    def _add_blocks(self, spheres: Spheres, others: set[str], number: int) -> None:
        """Add the blocks of an optimizer that no other graph and no group before it has."""
        if not len(spheres):
            return
        taken = others | {name for group in self.groups for name in group.spheres.parameters}
        free = np.ones(len(spheres), bool)
        for part in spheres.blocks.weights:
            if part.slices.parameter in taken:
                free[part.blocks[part.blocks >= 0]] = False
        moved = torch.stack([spheres.moved_by(one) for one in self._optimizers]).cpu().numpy()
        for owners in np.unique(moved.T, axis=0):
            chosen = free & (owners == moved.T).all(1)
            if owners[number] and chosen.any():
                self._add_group(frozenset(np.flatnonzero(owners).tolist()), spheres.only(chosen))

    def _add_group(self, owners: frozenset[int], spheres: Spheres) -> None:
        group = BlockGroup(owners, spheres, torch.zeros_like(spheres.radii))
        if not self._restore_group(group) and self._radius is not None:
            spheres.radii = torch.full_like(spheres.radii, self._radius)
            spheres.project([self._optimizers[k] for k in owners], self._transport, gradients=True)
        self.groups.append(group)

    def before_step(self, optimizer: Optimizer) -> None:
        """Prepare a step of an optimizer, whose gradients are final but for clipping."""
        number = self._number(optimizer)
        for group in self.groups:
            if number not in group.owners or self._stepped & group.owners:
                continue
            if self._mode == "tangent":
                group.spheres.make_tangential([self._optimizers[k] for k in group.owners])
            elif self._mode in _STEPS:
                group.before = group.spheres.copied()

    def after_step(self, optimizer: Optimizer) -> None:
        """Bring the blocks back to their spheres that all of their optimizers have moved."""
        self._stepped.add(self._number(optimizer))
        for group in self.groups:
            if self._number(optimizer) in group.owners and group.owners <= self._stepped:
                self._project(group)

    def end_batch(self) -> bool:
        """Bring blocks back that only some of their optimizers have moved in this batch, and return whether any has."""
        for group in self.groups:
            if self._stepped & group.owners and not group.owners <= self._stepped:
                self._project(group)
        any_step = bool(self._stepped)
        self._stepped.clear()
        return any_step

    def _project(self, group: BlockGroup) -> None:
        own = [self._optimizers[k] for k in sorted(group.owners)]
        group.rates = _rates(own)
        if self._mode in _STEPS:
            if group.before:
                group.spheres.turn(group.before, _STEPS[self._mode], group.rates)
            group.before = {}
            return
        group.steps += 1
        if group.steps >= self._every:
            group.steps = 0
            group.factors = group.spheres.project(own, self._transport)
            group.growth -= group.factors.log()

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the state of each group for a checkpoint, by the parameter of the first slice of each block."""
        if not self.groups:  # no step has been taken since the last checkpoint
            return dict(self._restored)
        radii, growth, steps = {}, {}, {}
        for group in self.groups:
            for name, numbers in group.spheres.blocks.places().items():
                key, at = _key(name, group.owners), torch.from_numpy(numbers).to(group.growth.device)
                radii[key] = group.spheres.radii[at].cpu()
                growth[key] = group.growth[at].cpu()
                steps[key] = torch.tensor(group.steps)
        return {"radii": radii, "growth": growth, "steps": steps}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the radii of a checkpoint, for blocks that are found later."""
        self._restored = state

    def _restore_group(self, group: BlockGroup) -> bool:
        """Take over the state of a group from the checkpoint; return whether there was one for the same blocks."""
        if not self._restored:
            return False
        radii, growth = torch.zeros_like(group.growth), torch.zeros_like(group.growth)
        for name, numbers in group.spheres.blocks.places().items():
            key, at = _key(name, group.owners), torch.from_numpy(numbers).to(radii.device)
            known = self._restored["radii"].get(key)
            if known is None or len(known) != len(numbers):
                warn_once(
                    f"The checkpoint has radii of other blocks than those of {name}. They are fixed anew, at the norms "
                    "that the blocks have now."
                )
                return False
            radii[at], growth[at] = known.to(radii), self._restored["growth"][key].to(radii)
            group.steps = int(self._restored["steps"][key])
        group.spheres.radii, group.growth = radii, growth
        return True

    def _number(self, optimizer: Optimizer) -> int:
        return next((k for k, one in enumerate(self._optimizers) if one is optimizer), -1)


def _rates(optimizers: Sequence[Optimizer]) -> dict[int, float]:
    """Return the learning rate of each parameter by its id."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}


def _key(parameter: str, owners: frozenset[int]) -> str:
    """Return the name of some blocks in a checkpoint: a parameter may be in blocks of several groups."""
    return f"{parameter} of {','.join(map(str, sorted(owners)))}"
