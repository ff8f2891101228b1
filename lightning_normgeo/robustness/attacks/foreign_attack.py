"""Attacks of torchattacks as rows of an evaluation."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.attack import Attack, AttackBatch
from lightning_normgeo.robustness.attacks.search.ball import per_image
from lightning_normgeo.robustness.attacks.torchattacks_attack import check_torchattacks, torchattacks_attack
from lightning_normgeo.robustness.threat_models import ThreatModel


@dataclass(frozen=True, kw_only=True)
class TorchattacksAttack(Attack):
    """An attack of torchattacks, which works on pixels.

    Attributes:
        attack: name of its class in torchattacks.
        options: arguments for its constructor.
        version: installed version of torchattacks.
    """

    attack: str
    options: dict[str, Any] = field(default_factory=dict)
    version: str = ""

    @property
    def eps(self) -> float | None:
        """The radius among the options, in pixels; None if the attack has none."""
        return self.options.get("eps")

    @property
    def norm(self) -> str:
        """Norm of the radius."""
        return "l2" if self.options.get("norm") == "L2" else "linf"

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return the attacked images."""
        space = batch.threat.space
        pixels = batch.inputs.to_pixels(batch.images, space).clamp(0, 1)

        def logits(x: Tensor) -> Tensor:
            return batch.logits(batch.inputs.pixels_to_space(x, space))

        attacked = torchattacks_attack(
            self.attack, logits, pixels, batch.labels, self.options, batch.indices, batch.seed
        )
        # unchanged samples are returned as they were, since converting to pixels and back rounds
        same = per_image((attacked == pixels).flatten(1).all(1), pixels)
        return torch.where(same, batch.images, batch.inputs.pixels_to_space(attacked, space))


def foreign_attack(
    name: str, after: str | None, attack: str, threat: ThreatModel, options: Mapping[str, Any]
) -> TorchattacksAttack:
    """Return an attack of torchattacks, with its arguments checked.

    Args:
        name: the name of the row.
        after: see :class:`Attack`.
        attack: name of its class in torchattacks.
        threat: the threat model.
        options: arguments for its constructor.

    Raises:
        ConfigurationError: see :func:`.check_torchattacks`.
    """
    arguments = check_torchattacks(attack, threat, options)
    version = importlib.metadata.version("torchattacks")
    return TorchattacksAttack(name, after, attack=attack, options=arguments, version=version)
