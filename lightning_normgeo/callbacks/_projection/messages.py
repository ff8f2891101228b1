"""Texts of SphereProjection: its opening line, and the effect that weight decay keeps on spheres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_normgeo.callbacks._projection.projector import BlockGroup, Mode
from lightning_normgeo.geometry.update_rules.decoupled_decay import shrink_of
from lightning_normgeo.symmetries.transformations.optimizer_states import STEP_AS_GRADIENT, scaling_of

_HOW = {
    "retract": "rescaled after the step",
    "tangent": "moved tangentially and rescaled after the step",
    "geodesic": "moved along great circles",
    "hyperball": "moved by the learning rate times the norm",
}


def opening(groups: Sequence[BlockGroup], mode: Mode, every_n_steps: int, optimizers: Sequence[Optimizer]) -> str:
    """Return the console line with the number of blocks, and a sentence on weight decay if there is any."""
    blocks = sum(len(group.spheres) for group in groups)
    names = {name for group in groups for name in group.spheres.parameters}
    every = "" if every_n_steps == 1 else f", every {every_n_steps} steps"
    what = "scale-invariant block is" if blocks == 1 else f"scale-invariant blocks of {len(names)} parameters are"
    line = f"SphereProjection: {blocks:,} {what} {_HOW[mode]}{every}."
    sentences = [_on_decay(optimizer, mode) for optimizer in optimizers]
    return " ".join([line, *dict.fromkeys(sentence for sentence in sentences if sentence)])


def _on_decay(optimizer: Optimizer, mode: Mode) -> str:
    """Return a sentence on the weight decay of an optimizer; empty without any."""
    decayed = [group for group in optimizer.param_groups if group.get("weight_decay")]
    if not decayed:
        return ""
    amount = f"{type(optimizer).__name__}'s weight decay {_number(decayed[0]['weight_decay'])}"
    if mode == "geodesic":
        return f"{amount} has no effect on them: it is radial."
    if mode == "hyperball":
        return f"{amount} changes the direction of their steps; set it to 0 for them to have the published algorithm."
    if any(shrink_of(optimizer, group) != 1 for group in decayed):
        return (
            f"{amount} does not vanish: it acts on them as the learning rate η/(1 - ηλ), and averages of gradients "
            "shrink by 1 - ηλ per step."
        )
    scaling = scaling_of(optimizer)
    if scaling is None or scaling.rate != STEP_AS_GRADIENT:
        return (
            f"{amount} is added to gradients, to which steps are not proportional here: it changes the direction of "
            "the steps. Decoupled weight decay does not."
        )
    return (
        f"{amount} does not vanish: it acts on them as the learning rate η/(1 - ηλ), and what momentum keeps of it is "
        "no longer radial in later steps."
    )


def _number(value: Any) -> str:
    return f"{float(value):g}"
