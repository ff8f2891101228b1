"""All attacks of an evaluation, run batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normgeo.errors import reason_of
from lightning_normgeo.robustness.attacks.attack import Attack, AttackBatch
from lightning_normgeo.robustness.attacks.native_attacks import BallAttack
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import mixed_seed
from lightning_normgeo.robustness.attacks.search.active_samples import FinishedSamples, any_point
from lightning_normgeo.robustness.attacks.search.ball import per_image
from lightning_normgeo.robustness.attacks.search.last_points import last_points
from lightning_normgeo.robustness.attacks.search.losses import predicted
from lightning_normgeo.robustness.attacks.search.projected_gradient import ascent
from lightning_normgeo.robustness.attacks.search.stages import Stage, stage_of
from lightning_normgeo.robustness.model.assumptions import Assumptions
from lightning_normgeo.robustness.model.evaluated_model import EvaluatedModel
from lightning_normgeo.robustness.model.preserved_state import seeded
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import rows_of
from lightning_normgeo.utilities.attack_names import RESCALED, draws_of_clean, is_control, without_control

Progress = Callable[[str, int], None]


_DRAWS = 2**22
"""Stream of the further draws of a random model."""


def suffix_of(name: str) -> str:
    """Return the ending of a row's name that marks the control; empty for other rows."""
    return RESCALED if is_control(name) else ""


def chain_of(attack: Attack, attacks: Sequence[Attack]) -> list[Attack]:
    """Return an attack and those that get what it does not break, in order."""
    following = [one for one in attacks if one.after == attack.name]
    return [attack, *(chain_of(following[0], attacks) if following else [])]


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
        drawn = [] if assumptions.deterministic else draws_of_clean()
        self.decisions: SampleResults = SampleResults([*self.settings.rows, *drawn])
        self.shown = ExampleImages(num_images, self.settings.parts)
        self.failed: dict[str, str] = {}
        self.progress: Progress = progress or (lambda name, samples: None)
        self._stages: dict[tuple[str, torch.Size], Stage] = {}
        attacks = self.settings.all_attacks
        self._chains = {attack.name: chain_of(attack, attacks) for attack in attacks}

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
            logits=self.model.search,
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
            surrogate=self.model.search_surrogate,
            exact=self.model if self.settings.verified else None,
            exact_surrogate=self.model.surrogate if self.settings.verified else None,
        )
        suffixes = ("",) if self.model.rescaled is None else ("", RESCALED)
        for suffix in suffixes:
            with self.model.active(control=bool(suffix)), self._draws(batch):
                self._attack(batch, size, suffix)

    def finish(self) -> None:
        """Finish the attacks that still have samples in partly filled batches."""
        for (name, _), stage in list(self._stages.items()):  # those of a suite are in its order
            if name not in self.failed:
                with self.model.active(control=is_control(name)), self._failing(name):
                    self.progress(name, 0)
                    stage.run(self.model.search, everything=True)

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
        reason = reason_of(error)
        if "Inference tensors" in str(error):
            reason += " Trainer(inference_mode=False) makes tensors that have a gradient."
        self.failed[name] = reason
        for follower in self._chain(name)[1:]:
            self.failed[follower.name + suffix_of(name)] = f"{name}, which comes before it, failed. {reason}"

    def _chain(self, name: str) -> list[Attack]:
        return self._chains[without_control(name)]

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
        heads = [attack for attack in self.settings.all_attacks if attack.after is None]
        todo = [head for head in heads if any(one in todo for one in self._chain(head.name))]
        if not self._is_done(clean, batch):
            self._done(clean, batch, batch.images, scores, gradient)
            self._draw_again(batch, suffix)
        batch = replace(batch, gradient=gradient, clean=scores)
        for attack in todo:
            name = attack.name + suffix
            if name not in self.failed:
                self.progress(name, 0)
                with self._failing(name):
                    self._run(attack, batch, scores, size, suffix)

    def _draw_again(self, batch: AttackBatch, suffix: str) -> None:
        """Classify the clean images of a random model with other random numbers, for the spread of its accuracy."""
        if self.assumptions.deterministic or suffix:
            return
        for number, name in enumerate(draws_of_clean(), 1):
            with seeded(mixed_seed(self.settings.seed, number, _DRAWS), batch.indices[0]):
                self._done(name, batch, batch.images, self._scores(batch.images))

    def _clean(self, batch: AttackBatch, attacks: Sequence[Attack], suffix: str) -> tuple[Tensor, Tensor | None]:
        """Return the logits of the clean images and, if an attack starts there, the gradient, from the same pass."""
        beginning = [attack for attack in attacks if isinstance(attack, BallAttack) and attack.begins_with_gradient]
        if beginning:
            try:
                scores, _, gradient = ascent(self.model, batch.images, batch.labels)
                return scores, gradient
            except Exception as error:  # the backward pass may have failed; the forward pass alone is tried below
                for attack in beginning:
                    self._fail(attack.name + suffix, error)
        return self._scores(batch.images), None

    def _run(self, attack: Attack, batch: AttackBatch, scores: Tensor, size: int, suffix: str) -> None:
        """Run an attack and those that follow it on a batch; ``scores`` are the logits of the clean images."""
        chain = self._chain(attack.name)
        if len(chain) == 1 and not self._takes_any(attack):
            found = last_points(attack, batch, self.assumptions.independent)
            self._done(attack.name + suffix, batch, found.images, found.scores, checked=found.checked)
        elif not self.assumptions.independent:
            self._run_whole(chain, batch, scores, suffix)
        else:
            stages = [self._stage(one, batch, size, one.name + suffix) for one in chain]
            last = chain[-1].name + suffix
            done = self.decisions.done.get(last, set())
            todo = [sample not in done or self.shown.lacks(last, [sample]) for sample in batch.indices]
            part = batch.part(torch.tensor(todo, device=batch.labels.device))
            numbers = torch.tensor(part.indices, dtype=torch.long, device=part.labels.device)
            begins = isinstance(attack, BallAttack) and attack.begins_with_gradient
            assert part.clean is not None  # noqa: S101
            stages[0].put(part.images, part.labels, numbers, part.clean, part.gradient if begins else None)
            for one, stage in zip(chain, stages, strict=True):
                with self._failing(one.name + suffix):
                    stage.run(self.model.search)

    def _takes_any(self, attack: Attack) -> bool:
        return isinstance(attack, BallAttack) and (attack.takes_any or self.settings.semantics == "any")

    def _run_whole(self, chain: Sequence[Attack], batch: AttackBatch, scores: Tensor, suffix: str) -> None:
        """Run the attacks of a chain on a whole batch, of a model whose logits depend on all images of it."""
        found, found_scores = batch.images, scores
        for attack in chain:
            if attack.name + suffix in self.failed:
                return
            with self._failing(attack.name + suffix):
                if isinstance(attack, BallAttack):
                    attacked, attacked_scores = any_point(attack, batch, scores)
                else:
                    attacked, attacked_scores, *_ = last_points(attack, batch, independent=False)
                stands = predicted(found_scores) == batch.labels
                wide = per_image(stands, found)
                found = torch.where(wide, attacked, found)
                found_scores = torch.where(stands[:, None], attacked_scores, found_scores)
                self._done(attack.name + suffix, batch, found, found_scores)

    def _stage(self, attack: Attack, batch: AttackBatch, size: int, name: str) -> Stage:
        """Return the stage of an attack for images of this shape, which lives until :meth:`finish`."""
        key = name, batch.images.shape[1:]
        if key not in self._stages:
            self._stages[key] = stage_of(attack, batch, size, lambda ended: self._ended(name, ended))
        return self._stages[key]

    def _ended(self, name: str, ended: FinishedSamples) -> None:
        """Keep the results of finished samples, and pass them on to the attack that follows, if there is one."""
        self._keep(name, ended)
        chain = self._chain(name)
        if len(chain) == 1 or not len(ended.labels):
            return
        follower = chain[1].name + suffix_of(name)
        broken = predicted(ended.scores) != ended.labels
        self._ended(follower, ended.at(broken))
        rest = ended.at(~broken)
        stage = self._stages[follower, ended.images.shape[1:]]
        if follower not in self.failed:
            with self._failing(follower):
                stage.put(rest.images, rest.labels, rest.indices, rest.clean)

    def _scores(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(images)

    def _done(
        self,
        name: str,
        batch: AttackBatch,
        perturbed: Tensor,
        scores: Tensor,
        gradient: Tensor | None = None,
        checked: Tensor | None = None,
    ) -> None:
        """Keep the results of a whole batch under an attack."""
        samples = torch.tensor(batch.indices, dtype=torch.long, device=batch.labels.device)
        ended = FinishedSamples(batch.images, perturbed, batch.labels, samples, scores, scores, checked=checked)
        self._keep(name, ended, gradient, batch.counted)

    def _keep(
        self, name: str, ended: FinishedSamples, gradient: Tensor | None = None, counted: Tensor | None = None
    ) -> None:
        """Keep the per-sample results and the example images of finished samples, and report the progress."""
        if not len(ended.labels):
            return
        rows = rows_of(*ended[:5], gradient, ended.checked)
        done = self.decisions.done.get(name, ())
        counted = torch.ones_like(rows.sample, dtype=torch.bool) if counted is None else counted
        wanted = counted & torch.tensor([sample not in done for sample in rows.sample.tolist()])
        if wanted.any():
            self.decisions.add(name, rows.at(wanted))
        images, space = ended.adversarial[counted.to(ended.adversarial.device)], self.settings.threat.space
        to_pixels = self.model.inputs.to_pixels
        self.shown.add(name, images, rows.at(counted), lambda pictures: to_pixels(pictures, space))
        self.progress(name, int(wanted.sum()))
