"""Evaluate a classifier batch by batch: clean, under noise, under attack. Needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.batch_attacks import BatchAttacks, Progress
from lightning_normgeo.robustness.attacks.batch_queue import BatchQueue
from lightning_normgeo.robustness.attacks.batch_size import fitting_batch
from lightning_normgeo.robustness.attacks.projected_gradient import Logits
from lightning_normgeo.robustness.inputs.checks import check_images, check_labels
from lightning_normgeo.robustness.inputs.input_space import InputSpace
from lightning_normgeo.robustness.model.assumptions import Assumptions
from lightning_normgeo.robustness.model.evaluated_model import EvaluatedModel
from lightning_normgeo.robustness.model.folded_model import FoldedModel
from lightning_normgeo.robustness.model.rescaled_model import RescaledModel
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.robustness.results.journal import Journal, identity_of
from lightning_normgeo.robustness.results.sample_results import SampleResults
from lightning_normgeo.robustness.settings import RESCALED, RobustnessSettings


class RobustnessEvaluator:
    """Evaluates samples as they come, and keeps what became of each.

    Args:
        logits: maps images, as the loader yields them, to class logits; in evaluation mode.
        inputs: what those images are.
        settings: what to evaluate.
        module: holds the weights that ``logits`` uses; without it nothing is folded.
        num_images: how many samples to keep for showing.
        progress: called with the name of an attack before it runs (and 0), and when samples are done with it.
        assumptions: what is known of the model. Where logits are random or depend on the batch, batches stay as given.
    """

    def __init__(
        self,
        logits: Logits,
        inputs: InputSpace,
        settings: RobustnessSettings,
        module: nn.Module | None = None,
        num_images: int = 0,
        progress: Progress | None = None,
        assumptions: Assumptions | None = None,
    ) -> None:
        self.settings, self.inputs = settings, inputs
        self.assumptions = assumptions or Assumptions()
        self.model = EvaluatedModel(logits, inputs, settings, module)
        self.attacks = BatchAttacks(self.model, self.assumptions, num_images, progress)
        self._queue = BatchQueue()
        self._classes: int | None = None
        self._sizes: dict[torch.Size, int] = {}

    @property
    def decisions(self) -> SampleResults:
        """What became of the samples."""
        return self.attacks.decisions

    @property
    def shown(self) -> ExampleImages:
        """The first samples."""
        return self.attacks.shown

    @property
    def failed(self) -> dict[str, str]:
        """For attacks that cannot be evaluated, why."""
        return self.attacks.failed

    @property
    def folded(self) -> FoldedModel | None:
        """What stands in for the model's weights; None before the first batch and where nothing does."""
        return self.model.folded

    @property
    def rescaled(self) -> RescaledModel | None:
        """What stands in for them in the control with longer weights, if asked for."""
        return self.model.rescaled

    def put(
        self, images: Tensor, labels: Tensor, samples: Sequence[int], counted: Sequence[bool] | None = None
    ) -> None:
        """Evaluate samples, or let them wait until there are enough for a batch; images of one size at a time.

        Args:
            images: ``(batch, channels, …)``, floating point, as the loader yields them.
            labels: ``(batch,)`` class indices.
            samples: a number for each, which decides its random draws and tells it from others.
            counted: which of them count; the others only keep their batch company. Default: all.

        Raises:
            ConfigurationError: for images outside [0, 1] where pixels are expected, or labels out of range.
        """
        if not len(labels):
            return
        if self.settings.on_unsuitable == "raise" or not self._sizes:
            check_images(images, self.inputs, self.settings.threat.space)
        self._check(images, labels)
        numbers = torch.tensor(samples, dtype=torch.long, device=labels.device)
        which = (
            torch.ones_like(labels, dtype=torch.bool) if counted is None else torch.tensor(counted).to(labels.device)
        )
        size = self._size(images, labels)
        if not self.assumptions.independent:
            self.attacks.evaluate(images, labels, numbers, size, which)
            return
        for batch in self._queue.add((images[which], labels[which], numbers[which]), size):
            self.attacks.evaluate(*batch, size)

    def resume(
        self, folder: Path, images: Tensor, dataloader: Any, module: nn.Module, name: str = "", rank: int = 0
    ) -> Journal:
        """Keep a journal from now on, after what an earlier attempt at the same left in it; before the first batch.

        Args:
            folder: where it is kept.
            images: the first batch.
            dataloader: the loader.
            module: holds the weights.
            name: of the evaluation and the loader, where there are several.
            rank: of the process.
        """
        identity = identity_of(self.settings.describe(self.inputs), module, images, dataloader, name)
        self.attacks.decisions = journal = Journal(self.decisions.attacks, folder, identity, rank)
        return journal

    def finish(self) -> SampleResults:
        """Evaluate what is still waiting, and return all decisions."""
        for batch in self._queue.rest():
            self.attacks.evaluate(*batch, self._sizes[batch[0].shape[1:]])
        self.attacks.finish()
        return self.decisions

    def _check(self, images: Tensor, labels: Tensor) -> None:
        """Check labels before anything is computed with them: on a GPU one out of range ends the process."""
        if self._classes is None:
            with torch.no_grad():
                scores = self.model.call(images[:2])
            check_labels(labels[:2], scores)
            self._classes = scores.shape[1]
        check_labels(labels, torch.empty(len(images), self._classes, device="meta"))

    def _size(self, images: Tensor, labels: Tensor) -> int:
        """The size of batches for images of a size; the weights' stand-ins are made with the first."""
        shape = images.shape[1:]
        if shape not in self._sizes:
            if not self._sizes:
                self._prepare(images)
            given = self.settings.batch_size
            if given is None and self.assumptions.independent and not self.assumptions.no_gradient:
                with self.model.active(), suppress(Exception):  # no gradient, or none for a single image
                    given = fitting_batch(self.model, self.model.to_space(images), labels)
            self._sizes[shape] = given or len(images)
        return self._sizes[shape]

    def _prepare(self, images: Tensor) -> None:
        try:
            self.model.prepare(images, self.assumptions.deterministic)
        except ConfigurationError as error:  # of the control: the evaluation itself needs no stand-ins
            if self.settings.on_unsuitable == "raise":
                raise
            self.attacks.failed |= {name: str(error) for name in self.settings.rows if name.endswith(RESCALED)}
