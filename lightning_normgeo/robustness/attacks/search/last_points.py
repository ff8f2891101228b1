"""Last points of attacks on a batch, and their repetition in the model's own precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.attack import Attack, AttackBatch
from lightning_normgeo.robustness.attacks.native_attacks import BallAttack
from lightning_normgeo.robustness.attacks.search.losses import at_least_float32, margin, predicted
from lightning_normgeo.robustness.attacks.verification import repeated
from lightning_normgeo.robustness.results.verified_decisions import CHANGED


class LastPoints(NamedTuple):
    """Attacked images of a batch, of each sample's first successful start, or else of its last.

    Attributes:
        images: the attacked images.
        scores: their logits, in the model's own precision.
        closest: the largest margin max_{j≠y} z_j − z_y of the last points of all starts.
        checked: whether and why the attack was repeated, see :mod:`.verified_decisions`; None if no sample's was.
    """

    images: Tensor
    scores: Tensor
    closest: Tensor
    checked: Tensor | None = None


def last_points(attack: Attack, batch: AttackBatch, independent: bool = True) -> LastPoints:
    """Return the last points of an attack, where samples near the decision boundary are attacked again if they must.

    Args:
        attack: the attack.
        batch: a batch. If it has logits ``exact``, these classify the points, and an attack that follows other logits
            is repeated with them for samples near the boundary and for audited ones.
        independent: whether an image's logits do not depend on the others of its batch.
    """
    found = _last_points(attack, batch, independent)
    if batch.exact is None or batch.clean is None or not attack.follows_model:
        return found
    reasons = repeated(found.closest, batch.clean, batch.labels, batch.indices, batch.seed)
    which = reasons > 0
    if not bool(which.any()):
        return found
    again = _last_points(attack, batch.part(which).exactly(), independent)
    images, scores, checked = found.images.clone(), found.scores.clone(), reasons.clone()
    labels = batch.labels[which]
    changed = (predicted(again.scores) == labels) != (predicted(scores[which]) == labels)
    images[which], scores[which], checked[which] = again.images, again.scores, reasons[which] + CHANGED * changed
    return LastPoints(images, scores, found.closest, checked)


def _last_points(attack: Attack, batch: AttackBatch, independent: bool) -> LastPoints:
    perturbed = attack.perturb(batch)
    scores = _classified(batch, perturbed)
    closest = margin(scores, batch.labels)
    starts = attack.objective.starts(attack.restarts, scores.shape[1]) if isinstance(attack, BallAttack) else 1
    for restart in range(1, starts):
        stands = predicted(scores) == batch.labels
        if not stands.any():
            break
        part = stands if independent else torch.ones_like(stands)
        again = attack.perturb(batch.part(part), restart)  # type: ignore[call-arg]
        found = _classified(batch, again)
        perturbed, scores, closest = perturbed.clone(), scores.clone(), closest.clone()
        perturbed[stands], scores[stands] = again[stands[part]], found[stands[part]]
        closest[stands] = torch.maximum(closest[stands], margin(scores, batch.labels)[stands])
    return LastPoints(perturbed, scores, closest)


def _classified(batch: AttackBatch, images: Tensor) -> Tensor:
    with torch.no_grad():
        return at_least_float32((batch.exact or batch.logits)(images))
