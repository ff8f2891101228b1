"""Attacks that search in bfloat16, with decisions in the model's own precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.attack import Attack
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import mixed_seed
from lightning_normgeo.robustness.attacks.search.active_samples import ActiveSet, FinishedSamples
from lightning_normgeo.robustness.attacks.search.losses import margin, predicted
from lightning_normgeo.robustness.attacks.search.projected_gradient import Logits
from lightning_normgeo.robustness.attacks.search.rules import Rule
from lightning_normgeo.robustness.results.verified_decisions import AUDITED, CHANGED, NEAR

BAND = 0.15
"""Largest distance to the boundary of samples that are attacked again, over the distance that the attack moved them."""
AUDIT = 0.02
"""Share of all other samples that are attacked again, to measure how many decisions differ."""
_STREAM = 2**23
"""Stream of the random numbers that choose the audited samples."""


def reach(closest: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
    r"""Return the distance of samples to the decision boundary, over the distance that an attack moved them.

    .. math:: r = \frac{m(x')}{\lvert m(x') - m(x)\rvert}, \qquad m = \max_{j \neq y} z_j - z_y

    A trajectory in bfloat16 leaves that of float32 by a share of what it achieves, whatever the scale of the logits, so
    that \|r\| and not the margin tells whether the two could end on different sides.

    Args:
        closest: margins m(x') of the points closest to success, or of successful ones, ``(batch,)``.
        clean: logits of the clean images.
        labels: class indices.

    Returns:
        r, ``(batch,)``: negative for samples that stand; NaN if logits are not finite, or for a margin of zero that did
        not change.
    """
    return closest / (closest - margin(clean, labels)).abs()


def repeated(closest: Tensor, clean: Tensor, labels: Tensor, samples: Sequence[int], seed: int) -> Tensor:
    """Return the reason for which each sample is attacked again, :data:`NEAR` or :data:`AUDITED`; 0 if it is not.

    It depends on the sample alone, not on its batch or on other samples.

    Args:
        closest: see :func:`reach`.
        clean: logits of the clean images.
        labels: class indices.
        samples: a number for each sample.
        seed: seed of the evaluation.
    """
    limit = round(AUDIT * 2**63)
    drawn = torch.tensor([mixed_seed(seed, int(sample), _STREAM) < limit for sample in samples], dtype=torch.bool)
    near = ~(reach(closest, clean, labels).abs() > BAND)  # NaN is near
    return torch.where(near, NEAR, torch.where(drawn.to(labels.device), AUDITED, 0))


def verification_settings(attacks: Sequence[Attack], precision: str) -> dict[str, Any]:
    """Return the settings of a verification as plain values.

    Args:
        attacks: the attacks of the evaluation; only those that follow a model search in bfloat16.
        precision: name of the precision in which decisions are made, and everything else is computed.
    """
    searched = [attack.name for attack in attacks if attack.follows_model]
    return {"precision": precision, "band": BAND, "audit": AUDIT, "attacks": searched}


class VerifiedSet:
    """Runs an attack in which any point counts in bfloat16, and decides in the model's own precision.

    A sample counts as broken at a point that the model misclassifies in its own precision, and at no other. A sample
    that stands though it came near to the boundary, or is audited, is attacked again in the model's own precision from
    the beginning, with the same random numbers, and that result counts.

    Args:
        rule: the rule by which samples move.
        batch_size: samples per pass.
        ended: is called with the finished samples.
        exact: logits in the model's own precision.
        seed: seed of the evaluation.
        draws: see :class:`ActiveSet`.
        bisections: see :class:`ActiveSet`.
    """

    def __init__(
        self,
        rule: Rule,
        batch_size: int,
        ended: Callable[[FinishedSamples], None],
        exact: Logits,
        seed: int,
        draws: int = 1,
        bisections: int = 0,
    ) -> None:
        self.exact, self.seed, self.ended = exact, seed, ended
        self._search = ActiveSet(rule, batch_size, self._found, draws, bisections, judge=exact)
        self._again = ActiveSet(rule, batch_size, self._repeated, draws, bisections)
        self._reasons: dict[int, int] = {}

    @property
    def passes(self) -> float:
        """Number of samples that went through a pass of either precision, see :class:`ActiveSet`."""
        return self._search.passes + self._again.passes

    def put(
        self, images: Tensor, labels: Tensor, indices: Tensor, scores: Tensor, gradient: Tensor | None = None
    ) -> None:
        """Add samples to be attacked, with logits of their images in the model's own precision."""
        self._search.put(images, labels, indices, scores, gradient)

    def run(self, logits: Logits, everything: bool = False) -> None:
        """Attack as long as there are full batches; ``logits`` are those of the search."""
        self._search.run(logits, everything)
        self._again.run(self.exact, everything)

    def _found(self, ended: FinishedSamples) -> None:
        """Pass on samples that are decided, and queue the others to be attacked again."""
        if not len(ended.labels):
            return
        stands = predicted(ended.scores) == ended.labels
        reasons = torch.zeros_like(ended.labels)
        if ended.closest is not None:
            found = repeated(ended.closest, ended.clean, ended.labels, ended.indices.tolist(), self.seed)
            reasons = torch.where(stands, found, 0)
        again = ended.at(reasons > 0)
        self.ended(ended.at(reasons == 0))
        if len(again.labels):
            self._reasons.update(zip(again.indices.tolist(), reasons[reasons > 0].tolist(), strict=True))
            self._again.put(again.images, again.labels, again.indices, again.clean)

    def _repeated(self, ended: FinishedSamples) -> None:
        """Pass on samples that were attacked again, with the reason, and whether their decision has changed."""
        if not len(ended.labels):
            return
        known = [self._reasons.pop(sample) for sample in ended.indices.tolist()]
        reasons = torch.tensor(known, dtype=torch.long, device=ended.labels.device)
        broken = predicted(ended.scores) != ended.labels
        self.ended(ended._replace(checked=reasons + CHANGED * broken))
