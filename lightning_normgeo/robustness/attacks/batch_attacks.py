"""All attacks of an evaluation, run batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.active_samples import ActiveSet, FinishedSamples, any_iterate
from lightning_normgeo.robustness.attacks.projected_gradient import ascent, predicted
from lightning_normgeo.robustness.attacks.registry import Attack, AttackBatch, ProjectedGradient
from lightning_normgeo.robustness.model.assumptions import Assumptions
from lightning_normgeo.robustness.model.evaluated_model import EvaluatedModel
from lightning_normgeo.robustness.model.preserved_state import seeded
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.robustness.results.sample_results import SampleResults, rows_of
from lightning_normgeo.utilities.attack_names import RESCALED, is_control

Progress = Callable[[str, int], None]


class BatchAttacks:
    """Runs all attacks of an evaluation on its batches, and collects the per-sample results.

    Args:
        model: the model under attack.
        assumptions: properties of the model.
        num_images: number of example images to keep.
        progress: called with an attack's name and 0 before it runs, and with its name and the number of samples when
            samples are finished.

    Attributes:
        decisions: the per-sample results.
        shown: the example images.
        failed: the reason for each attack that cannot be evaluated.
    """

    def __init__(
        self, model: EvaluatedModel, assumptions: Assumptions, num_images: int = 0, progress: Progress | None = None
    ) -> None:
        self.model = model
        self.settings = model.settings
        self.assumptions = assumptions
        self.decisions: SampleResults = SampleResults(self.settings.rows)
        self.shown = ExampleImages(num_images)
        self.failed: dict[str, str] = {}
        self.progress: Progress = progress or (lambda name, samples: None)
        self._active: dict[tuple[str, torch.Size], ActiveSet] = {}

    def evaluate(
        self, images: Tensor, labels: Tensor, samples: Tensor, size: int, counted: Tensor | None = None
    ) -> None:
        """Evaluate a batch: clean, then under every attack that has no results of an earlier attempt for it.

        Args:
            images: ``(batch, channels, …)``, as the loader yields them.
            labels: ``(batch,)`` class indices.
            samples: ``(batch,)`` int64, a number for each sample that identifies it and seeds its random numbers.
            size: batch size of attacks that refill their batches from several calls (``semantics="any"``).
            counted: mask of the samples that count. Default: all.
        """
        threat, inputs = self.settings.threat, self.model.inputs
        space_images = self.model.to_space(images)
        batch = AttackBatch(
            logits=self.model,
            images=space_images,
            labels=labels,
            indices=samples.tolist(),
            box=threat.box(inputs, space_images),
            gradient=None,
            inputs=inputs,
            threat=threat,
            seed=self.settings.seed,
            representable=self.model.representable,
            counted=None if counted is None else counted.cpu(),
        )
        suffixes = ("",) if self.model.rescaled is None else ("", RESCALED)
        for suffix in suffixes:
            with self.model.active(control=bool(suffix)), self._draws(batch):
                self._attack(batch, size, suffix)

    def finish(self) -> None:
        """Finish the attacks that still have samples in partly filled batches."""
        for (name, _), active in self._active.items():
            if name not in self.failed:
                with self.model.active(control=is_control(name)), self._failing(name):
                    self.progress(name, 0)
                    active.run(self.model, everything=True)

    def _draws(self, batch: AttackBatch) -> AbstractContextManager[None]:
        """Context in which a random model draws the same random numbers for the same batch."""
        return nullcontext() if self.assumptions.deterministic else seeded(self.settings.seed, batch.indices[0])

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """Context that records an attack's error as its failure; with ``on_unsuitable="raise"`` it raises the error."""
        try:
            yield
        except Exception as error:
            self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        if self.settings.on_unsuitable == "raise":
            raise error
        self.failed[name] = f"{type(error).__name__}: {error}"
        if "Inference tensors" in str(error):
            self.failed[name] += " Trainer(inference_mode=False) makes tensors that have a gradient."

    def _is_done(self, name: str, batch: AttackBatch) -> bool:
        """Whether an attack has failed, or has results of an earlier attempt for all samples of a batch."""
        if name in self.failed:
            return True
        done = self.decisions.done.get(name)
        return done is not None and done.issuperset(batch.indices) and not self.shown.lacks(name, batch.indices)

    def _attack(self, batch: AttackBatch, size: int, suffix: str) -> None:
        """Evaluate a batch with the current weights; ``suffix`` is that of the control's rows."""
        todo = [attack for attack in self.settings.all_attacks if not self._is_done(attack.name + suffix, batch)]
        clean = "clean" + suffix
        if not todo and self._is_done(clean, batch):
            return
        self.progress(clean, 0)
        scores, gradient = self._clean(batch, todo, suffix)
        todo = [attack for attack in todo if attack.name + suffix not in self.failed]
        if not self._is_done(clean, batch):
            self._done(clean, batch, batch.images, scores, gradient)
        batch = replace(batch, gradient=gradient)
        for attack in todo:
            self.progress(attack.name + suffix, 0)
            with self._failing(attack.name + suffix):
                self._run(attack, batch, scores, size, attack.name + suffix)

    def _clean(self, batch: AttackBatch, attacks: Sequence[Attack], suffix: str) -> tuple[Tensor, Tensor | None]:
        """Return the logits of the clean images and, if an attack starts there, the gradient, from the same pass."""
        beginning = [attack for attack in attacks if isinstance(attack, ProjectedGradient) and not attack.random_start]
        if beginning:
            try:
                scores, _, gradient = ascent(self.model, batch.images, batch.labels)
                return scores, gradient
            except Exception as error:  # the backward pass may have failed; the forward pass alone is tried below
                for attack in beginning:
                    self._fail(attack.name + suffix, error)
        return self._scores(batch.images), None

    def _run(self, attack: Attack, batch: AttackBatch, scores: Tensor, size: int, name: str) -> None:
        """Run one attack on a batch; ``name`` is that of its row, ``scores`` are the logits of the clean images."""
        if not isinstance(attack, ProjectedGradient) or self.settings.semantics == "final":
            self._done(name, batch, *self._last_iterate(attack, batch))
        elif not self.assumptions.independent:
            self._done(name, batch, *any_iterate(attack, batch, scores))
        else:
            active, done = self._active_set(attack, batch, size, name), self.decisions.done.get(name, set())
            todo = [sample not in done or self.shown.lacks(name, [sample]) for sample in batch.indices]
            fresh = torch.tensor(todo, device=batch.labels.device)
            part = batch.part(fresh)
            numbers = torch.tensor(part.indices, dtype=torch.long, device=part.labels.device)
            active.put(part.images, part.labels, numbers, scores[fresh], part.gradient)
            active.run(self.model)

    def _last_iterate(self, attack: Attack, batch: AttackBatch) -> tuple[Tensor, Tensor]:
        """Return attacked images and their logits, of each sample's first successful start, or else of its last."""
        perturbed = attack.perturb(batch)
        scores = self._scores(perturbed)
        for restart in range(1, getattr(attack, "restarts", 1)):
            stands = predicted(scores) == batch.labels
            if not stands.any():
                break
            part = stands if self.assumptions.independent else torch.ones_like(stands)
            again = attack.perturb(batch.part(part), restart)  # type: ignore[call-arg]
            found = self._scores(again)
            perturbed, scores = perturbed.clone(), scores.clone()
            perturbed[stands], scores[stands] = again[stands[part]], found[stands[part]]
        return perturbed, scores

    def _active_set(self, attack: ProjectedGradient, batch: AttackBatch, size: int, name: str) -> ActiveSet:
        """Return the queue of an attack for images of this shape, which lives until :meth:`finish`."""
        key = name, batch.images.shape[1:]
        if key not in self._active:
            ball, step_size = attack.ball(batch)
            seed = self.settings.seed

            def restart(images: Tensor, indices: Tensor, number: int) -> Tensor:
                return ball.sample(images, seed, indices.tolist(), number)

            self._active[key] = ActiveSet(
                ball,
                step_size,
                attack.steps,
                restart if attack.random_start else None,
                attack.restarts,
                size,
                lambda ended: self._keep(name, ended),
            )
        return self._active[key]

    def _scores(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(images)

    def _done(
        self, name: str, batch: AttackBatch, perturbed: Tensor, scores: Tensor, gradient: Tensor | None = None
    ) -> None:
        """Keep the results of a whole batch under an attack."""
        samples = torch.tensor(batch.indices, dtype=torch.long, device=batch.labels.device)
        self._keep(
            name, FinishedSamples(batch.images, perturbed, batch.labels, samples, scores), gradient, batch.counted
        )

    def _keep(
        self, name: str, ended: FinishedSamples, gradient: Tensor | None = None, counted: Tensor | None = None
    ) -> None:
        """Keep the per-sample results and the example images of finished samples, and report the progress."""
        if not len(ended.labels):
            return
        rows = rows_of(*ended, gradient)
        done = self.decisions.done.get(name, ())
        counted = torch.ones_like(rows.sample, dtype=torch.bool) if counted is None else counted
        wanted = counted & torch.tensor([sample not in done for sample in rows.sample.tolist()])
        if wanted.any():
            self.decisions.add(name, rows.at(wanted))
        images, space = ended.adversarial[counted.to(ended.adversarial.device)], self.settings.threat.space
        to_pixels = self.model.inputs.to_pixels
        self.shown.add(name, images, rows.at(counted), lambda pictures: to_pixels(pictures, space))
        self.progress(name, int(wanted.sum()))
