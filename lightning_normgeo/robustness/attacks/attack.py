"""Attack, a perturbation that makes one row of the results, and the batches it works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import gaussian_noise
from lightning_normgeo.robustness.attacks.search.ball import Bound
from lightning_normgeo.robustness.threat_models import InputSpace, ThreatModel


@dataclass(frozen=True)
class AttackBatch:
    """A batch of samples to be attacked.

    Attributes:
        logits: maps images in the threat model's space to logits.
        images: ``(batch, channels, …)`` in the threat model's space.
        labels: ``(batch,)`` class indices.
        indices: a number for each sample, which seeds its random numbers.
        box: lower and upper bound of image values.
        gradient: gradient of the cross entropy at ``images``; None if it is not known.
        inputs: how images relate to pixels.
        threat: the threat model.
        seed: seed of the evaluation.
        representable: see :class:`Ball`.
        counted: mask of the samples that count, on the host; None for all.
        clean: logits of ``images``; None before they are known.
        surrogate: maps images to the logits of another model, of which attacks are transferred; None if there is none.
        exact: logits that decide, in the model's own precision; None if :attr:`logits` do.
        exact_surrogate: the surrogate's logits in its own precision; None if :attr:`surrogate` has it.
    """

    logits: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    indices: Sequence[int]
    box: tuple[Bound, Bound]
    gradient: Tensor | None
    inputs: InputSpace
    threat: ThreatModel
    seed: int
    representable: Callable[[Tensor, Tensor], Tensor] | None = None
    counted: Tensor | None = None
    clean: Tensor | None = None
    surrogate: Callable[[Tensor], Tensor] | None = None
    exact: Callable[[Tensor], Tensor] | None = None
    exact_surrogate: Callable[[Tensor], Tensor] | None = None

    def exactly(self) -> AttackBatch:
        """Return the batch for an attack in the model's own precision."""
        if self.exact is None:
            return self
        return replace(self, logits=self.exact, surrogate=self.exact_surrogate, exact=None, exact_surrogate=None)

    def part(self, which: Tensor) -> AttackBatch:
        """Return the samples of a mask as a batch."""
        indices = [index for index, wanted in zip(self.indices, which.tolist(), strict=True) if wanted]
        gradient, clean = (None if tensor is None else tensor[which] for tensor in (self.gradient, self.clean))
        images, labels = self.images[which], self.labels[which]
        return replace(self, images=images, labels=labels, indices=indices, gradient=gradient, clean=clean)


@dataclass(frozen=True)
class Attack:
    """An attack, which makes one row of the results.

    Attributes:
        name: the name of the row, as in metric keys.
        after: the name of the row whose broken samples count as broken here too, so that this attack gets only the
            others, as in a suite; None for an attack on all samples.
        role: the part that the row plays in a check of the evaluation, see :mod:`.sanity_checks`; empty for none.
    """

    name: str
    after: str | None = None
    role: str = ""

    @property
    def part(self) -> str:
        """The kind of detail that the row is, ``check`` or another; empty for a row of its own."""
        return "check" if self.role else ""

    @property
    def follows_model(self) -> bool:
        """Whether the attacked images depend on a model."""
        return True

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return the attacked images, in the threat model's space."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values."""
        settings = {key: value for key, value in asdict(self).items() if key != "name"}
        return {key: value for key, value in settings.items() if value or key not in ("after", "role")}


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """White Gaussian noise.

    Attributes:
        std: standard deviation, in units of the threat model's space.
        clip: whether to clip noisy images to the box.
    """

    std: float
    clip: bool

    @property
    def follows_model(self) -> bool:
        """Whether the attacked images depend on a model."""
        return False

    def perturb(self, batch: AttackBatch) -> Tensor:
        """Return noisy images."""
        return gaussian_noise(batch.images, self.std, batch.seed, batch.indices, batch.box if self.clip else None)
