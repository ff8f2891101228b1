"""Evaluate a classifier batch by batch: clean, under noise, under attack. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo.robustness.active import ActiveSet, Ended
from lightning_normgeo.robustness.attacks import Logits, ascent, at_least_float32, lengths
from lightning_normgeo.robustness.catalogue import Attack, Batch, ProjectedGradient
from lightning_normgeo.robustness.checks import check_images, check_labels
from lightning_normgeo.robustness.decisions import Decisions, rows_of
from lightning_normgeo.robustness.folding import FoldedModel, folded_model
from lightning_normgeo.robustness.journal import Journal, identity_of
from lightning_normgeo.robustness.rescale import RescaledModel
from lightning_normgeo.robustness.settings import RESCALED, RobustnessSettings
from lightning_normgeo.robustness.shown import Shown
from lightning_normgeo.robustness.sizing import fitting_batch
from lightning_normgeo.robustness.threat import InputSpace

Progress = Callable[[str, int], None]


class RobustnessEvaluator:
    """Evaluates samples as they come, and keeps what became of each.

    Args:
        logits: maps images, as the loader yields them, to class logits; in evaluation mode.
        inputs: what those images are.
        settings: what to evaluate.
        module: holds the weights that ``logits`` uses; without it nothing is folded.
        num_images: how many samples to keep for showing.
        progress: called with the name of an attack before it runs (and 0), and when samples are done with it.

    Attributes:
        decisions: what became of the samples.
        shown: the first samples.
        folded: what stands in for the model's weights; None before the first batch and where nothing does.
        rescaled: what stands in for them in the control with longer weights, if asked for.
    """

    def __init__(
        self,
        logits: Logits,
        inputs: InputSpace,
        settings: RobustnessSettings,
        module: nn.Module | None = None,
        num_images: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.settings, self.inputs = settings, inputs
        self.decisions: Decisions = Decisions(settings.rows)
        self.shown = Shown(num_images)
        self.folded: FoldedModel | None = None
        self.rescaled: RescaledModel | None = None
        self._call, self._module = logits, module
        self._compiled = torch.compile(logits) if settings.compile else logits
        self.progress: Progress = progress or (lambda name, samples: None)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._active: dict[str, ActiveSet] = {}
        self._device = "cpu"
        self._classes: int | None = None
        self._batch_size: int | None = None

    def put(self, images: Tensor, labels: Tensor, indices: Sequence[int]) -> None:
        """Evaluate samples, or let them wait until there are enough for a batch.

        Args:
            images: ``(batch, channels, …)``, floating point, as the loader yields them.
            labels: ``(batch,)`` class indices.
            indices: position of each sample in the data set.

        Raises:
            ConfigurationError: for images outside [0, 1] where pixels are expected, or labels out of range.
        """
        if not len(labels):
            return
        check_images(images, self.inputs)
        self._device = images.device.type
        self._check(images, labels)
        if self._batch_size is None:
            self._batch_size = self._begin(images, labels)
        if self.decisions.done:
            images, labels, indices = self._not_done(images, labels, indices)
        numbers = torch.tensor(indices, dtype=torch.long, device=labels.device)
        self._waiting.append((images, labels, numbers))
        size = self._batch_size
        while sum(len(labels) for _, labels, _ in self._waiting) >= size:
            images, labels, numbers = map(torch.cat, zip(*self._waiting, strict=True))
            self._waiting = [(images[size:], labels[size:], numbers[size:])]
            self._evaluate(images[:size], labels[:size], numbers[:size])

    def resume(
        self, folder: Path, images: Tensor, dataloader: Any, module: nn.Module, number: int = 0, rank: int = 0
    ) -> Journal:
        """Keep a journal from now on, after what an earlier attempt at the same left in it; before the first batch.

        Args:
            folder: where it is kept.
            images: the first batch.
            dataloader: the loader.
            module: holds the weights.
            number: of the loader.
            rank: of the process.
        """
        identity = identity_of(self.settings.describe(self.inputs), module, images, dataloader, number)
        self.decisions = journal = Journal(self.decisions.attacks, folder, identity, rank)
        return journal

    def finish(self) -> Decisions:
        """Evaluate what is still waiting, and return all decisions."""
        if any(len(labels) for _, labels, _ in self._waiting):
            self._evaluate(*map(torch.cat, zip(*self._waiting, strict=True)))
        self._waiting = []
        for name, active in self._active.items():
            with self._ready(control=name.endswith(RESCALED)):
                self.progress(name, 0)
                active.run(self._model, everything=True)
        return self.decisions

    def weights(self) -> dict[str, Any]:
        """Return norms of weights as plain values: raw, effective, and in the control."""
        found: dict[str, Any] = {"effective_norms": {} if self.folded is None else self.folded.norms}
        if self.rescaled is not None:
            norms = {name: {"before": before, "after": after} for name, (before, after) in self.rescaled.layers.items()}
            found["rescaled"] = {
                "factor": self.rescaled.factor,
                "largest_logit_change": self.rescaled.difference,
                "norms": norms,
                "left_alone": list(self.rescaled.unscaled),
            }
        return found

    def _check(self, images: Tensor, labels: Tensor) -> None:
        """Check labels before anything is computed with them: on a GPU one out of range ends the process."""
        if self._classes is None:
            with torch.no_grad():
                scores = self._call(images[:2])
            check_labels(labels[:2], scores)
            self._classes = scores.shape[1]
        check_labels(labels, torch.empty(len(images), self._classes, device="meta"))

    def _not_done(self, images: Tensor, labels: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Leave out samples that an earlier attempt was done with; the batches that are left are as they were then."""
        left = [k for k, index in enumerate(indices) if index not in self.decisions.done]
        return images[left], labels[left], [indices[k] for k in left]

    def _evaluate(self, images: Tensor, labels: Tensor, numbers: Tensor) -> None:
        inside = self.inputs.to_space(images, self.settings.threat.space)
        for suffix in ("",) if self.rescaled is None else ("", RESCALED):
            with self._ready(control=bool(suffix)):
                self._attack(inside, labels, numbers, suffix)

    def _begin(self, images: Tensor, labels: Tensor) -> int:
        """Make the stand-ins of the weights, and return the size of batches."""
        if self.settings.fold and self._module is not None:
            last = images.device.type == "cpu" or self.settings.autocast is not None
            self.folded = folded_model(self._module, self._call, images, channels_last=last)
        if self.settings.rescale is not None and self._module is not None:
            self.rescaled = RescaledModel(self._module, self._call, images, self.settings.rescale)
        if self.settings.batch_size is not None:
            return self.settings.batch_size
        with self._ready():
            return fitting_batch(self._model, self.inputs.to_space(images, self.settings.threat.space), labels)

    @contextmanager
    def _ready(self, control: bool = False) -> Iterator[None]:
        """Compute in the precision and with the weights of the evaluation, or of the control."""
        stand_ins = self.rescaled if control else self.folded
        with ExitStack() as stack:
            if stand_ins is not None:
                stack.enter_context(stand_ins.active())
            if self.settings.autocast_dtype is not None:
                stack.enter_context(torch.autocast(self._device, self.settings.autocast_dtype))
            yield

    def _model(self, images: Tensor) -> Tensor:
        """Return logits of images of the threat model's space."""
        loaded = self.inputs.from_space(images, self.settings.threat.space)
        if self.folded is not None and self.folded.channels_last:
            loaded = loaded.contiguous(memory_format=torch.channels_last)
        return at_least_float32(self._compiled(loaded))

    def _attack(self, images: Tensor, labels: Tensor, numbers: Tensor, suffix: str) -> None:
        attacks, threat = self.settings.all_attacks, self.settings.threat
        self.progress("clean" + suffix, 0)
        gradient = None
        if any(isinstance(attack, ProjectedGradient) and not attack.random_start for attack in attacks):
            scores, _, gradient = ascent(self._model, images, labels)
        else:
            scores = self._scores(images)
        self._done("clean" + suffix, Ended(images, images, labels, numbers, scores), gradient)
        box = threat.box(self.inputs, images)
        indices = numbers.tolist()
        batch = Batch(self._model, images, labels, indices, box, gradient, self.inputs, threat, self.settings.seed)
        for attack in attacks:
            self.progress(attack.name + suffix, 0)
            if isinstance(attack, ProjectedGradient) and self.settings.semantics == "any":
                active = self._active_set(attack, batch, suffix)
                active.put(images, labels, numbers, scores, gradient)
                active.run(self._model)
            else:
                self._run(attack, batch, numbers, suffix)

    def _run(self, attack: Attack, batch: Batch, numbers: Tensor, suffix: str) -> None:
        perturbed = attack.perturb(batch)
        scores = self._scores(perturbed)
        for restart in range(1, getattr(attack, "restarts", 1)):
            stands = scores.argmax(1) == batch.labels
            if not stands.any():
                break
            again = attack.perturb(batch.part(stands), restart)  # type: ignore[call-arg]
            perturbed, scores = perturbed.clone(), scores.clone()
            perturbed[stands], scores[stands] = again, self._scores(again)
        self._done(attack.name + suffix, Ended(batch.images, perturbed, batch.labels, numbers, scores))

    def _active_set(self, attack: ProjectedGradient, batch: Batch, suffix: str) -> ActiveSet:
        name = attack.name + suffix
        if name not in self._active:
            ball, step_size = attack.ball(batch.images, batch.box)
            seed = self.settings.seed

            def restart(images: Tensor, indices: Tensor, number: int) -> Tensor:
                return ball.sample(images, seed, indices.tolist(), number)

            self._active[name] = ActiveSet(
                ball,
                step_size,
                attack.steps,
                restart if attack.random_start else None,
                attack.restarts,
                self._batch_size or len(batch.labels),
                lambda ended: self._done(name, ended),
            )
        return self._active[name]

    def _scores(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self._model(images)

    def _done(self, attack: str, ended: Ended, gradient: Tensor | None = None) -> None:
        """Keep what became of samples: one transfer to the host."""
        if not len(ended.labels):
            return
        with torch.no_grad():
            perturbation = ended.adversarial - ended.images
            predictions = ended.scores.argmax(1)
            losses = F.cross_entropy(ended.scores, ended.labels, reduction="none")
            slopes = torch.full_like(losses, torch.nan) if gradient is None else lengths(gradient, "linf")
            sizes = lengths(perturbation, "linf"), lengths(perturbation)
            columns = (ended.indices, ended.labels, predictions, losses, *sizes, slopes)
            rows = rows_of(torch.stack([column.double() for column in columns]).cpu())
        self.decisions.add(attack, rows)
        space = self.settings.threat.space
        self.shown.add(attack, ended.adversarial, rows, lambda images: self.inputs.to_pixels(images, space))
        self.progress(attack, len(ended.labels))
