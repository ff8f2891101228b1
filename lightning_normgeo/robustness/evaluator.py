"""Robustness of a classifier, batch by batch: clean, under noise, and under attack. Needs no Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.batch_attacks import BatchAttacks, Progress
from lightning_normgeo.robustness.attacks.search.batch_queue import BatchQueue
from lightning_normgeo.robustness.attacks.search.batch_size import fitting_batch
from lightning_normgeo.robustness.attacks.search.projected_gradient import Logits
from lightning_normgeo.robustness.inputs.checks import check_images, check_labels
from lightning_normgeo.robustness.inputs.input_space import InputSpace
from lightning_normgeo.robustness.model.assumptions import Assumptions
from lightning_normgeo.robustness.model.evaluated_model import EvaluatedModel
from lightning_normgeo.robustness.model.folded_model import FoldedModel
from lightning_normgeo.robustness.model.precision import check_verifiable, precision_of
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.model.rescaled_model import RescaledModel
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.robustness.results.samples.journal import Journal, identity_of
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.settings import RobustnessSettings
from lightning_normgeo.utilities.attack_names import is_control

_UNVERIFIED = (
    "Everything is computed in the model's own precision instead of autocast='bf16-verified': decisions that are "
    "random or depend on other images cannot be verified one by one."
)


class RobustnessEvaluator:
    """Evaluates samples batch by batch and collects the per-sample results.

    Args:
        logits: maps images, as the loader yields them, to class logits ``(batch, classes)``; in evaluation mode.
        inputs: how those images relate to pixels.
        settings: the settings of the evaluation.
        module: holds the weights that ``logits`` uses. Default: none, and batch normalization is not folded.
        num_images: number of example images to keep.
        progress: called with an attack's name and 0 before it runs, and with its name and the number of samples when
            samples are finished.
        assumptions: properties of the model. If its logits are random or depend on the batch, the loader's batches are
            evaluated as they are, instead of being joined to larger ones, and nothing is computed in bfloat16 with
            ``autocast="bf16-verified"``, since no single decision can be verified. Default: deterministic and
            independent.
        surrogate: the logits of another model, of which attacks are transferred. Default: none.

    Attributes:
        unverified: the reason if decisions are not verified though the settings say so; else empty.
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
        surrogate: Logits | None = None,
    ) -> None:
        self.assumptions = assumptions or Assumptions()
        self.settings, self.inputs, self.unverified = settings, inputs, ""
        if settings.verified and not (self.assumptions.deterministic and self.assumptions.independent):
            self.settings = settings = replace(settings, autocast=None)
            self.unverified = _UNVERIFIED
        self.model = EvaluatedModel(logits, inputs, settings, module, surrogate)
        self.attacks = BatchAttacks(self.model, self.assumptions, num_images, progress)
        self.module = module
        self._queue = BatchQueue()
        self._classes: int | None = None
        self._sizes: dict[torch.Size, int] = {}

    @property
    def decisions(self) -> SampleResults:
        """The per-sample results so far."""
        return self.attacks.decisions

    @property
    def shown(self) -> ExampleImages:
        """The example images so far."""
        return self.attacks.shown

    @property
    def failed(self) -> dict[str, str]:
        """The reason for each attack that cannot be evaluated."""
        return self.attacks.failed

    @property
    def folded(self) -> FoldedModel | None:
        """The model with folded batch normalization; None before the first batch and without folding."""
        return self.model.folded

    @property
    def rescaled(self) -> RescaledModel | None:
        """The model with rescaled weights, for the control; None if there is no control."""
        return self.model.rescaled

    def put(
        self, images: Tensor, labels: Tensor, samples: Sequence[int], counted: Sequence[bool] | None = None
    ) -> None:
        """Evaluate samples, or queue them until there are enough for a batch.

        Args:
            images: ``(batch, channels, …)``, floating point, as the loader yields them.
            labels: ``(batch,)`` class indices.
            samples: a number for each sample that identifies it, and seeds its noise and random starts.
            counted: for each sample whether it counts. The others are evaluated only where logits depend on the whole
                batch. Default: all count.

        Raises:
            ConfigurationError: for images that are not pixels in [0, 1] where these are expected, and for labels out of
                range.
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
        """Resume from the journal of an earlier attempt at the same evaluation, and write to it from now on.

        To be called before the first batch.

        Args:
            folder: the folder of the journal.
            images: the first batch.
            dataloader: the loader.
            module: holds the weights.
            name: names of the evaluation and the loader, if there are several.
            rank: rank of the process.

        Returns:
            The journal, which is also :attr:`decisions` from now on.
        """
        identity = identity_of(self.settings.describe(self.inputs), module, images, dataloader, name)
        self.attacks.decisions = journal = Journal(self.decisions.attacks, folder, identity, rank)
        return journal

    def finish(self) -> SampleResults:
        """Evaluate the samples that are still queued, and return all per-sample results."""
        for batch in self._queue.rest():
            self.attacks.evaluate(*batch, self._sizes[batch[0].shape[1:]])
        self.attacks.finish()
        return self.decisions

    def check_precision(self, images: Tensor) -> None:
        """Refuse to verify the decisions of a model that itself computes in half precision.

        Args:
            images: the first batch.

        Raises:
            UnsuitableError: with the remedy.

        Cost: one forward pass of two images, if decisions are verified.
        """
        if self.settings.verified:
            unchanged = nullcontext() if self.module is None else preserved_state(self.module, fork_rng=False)
            with torch.no_grad(), unchanged:
                check_verifiable(precision_of(images, self.module), self.model.call(images[:2]))

    def _check(self, images: Tensor, labels: Tensor) -> None:
        """Check labels before they are used: on a GPU a label out of range makes CUDA unusable in this process."""
        if self._classes is None:
            with torch.no_grad():
                scores = self.model.call(images[:2])
            if self.settings.verified:
                check_verifiable(precision_of(images, self.module), scores)
            check_labels(labels[:2], scores)
            self._classes = scores.shape[1]
        check_labels(labels, torch.empty(len(images), self._classes, device="meta"))

    def _size(self, images: Tensor, labels: Tensor) -> int:
        """Return the batch size for images of this shape; the first call prepares the model."""
        shape = images.shape[1:]
        if shape not in self._sizes:
            if not self._sizes:
                self._prepare(images)
            given = self.settings.batch_size
            if given is None and self.assumptions.independent and not self.assumptions.no_gradient:
                # the model may have no gradient, or refuse a single image: then the loader's batch size is used
                with self.model.active(), suppress(Exception):
                    given = fitting_batch(self.model, self.model.to_space(images), labels)
            self._sizes[shape] = given or len(images)
        return self._sizes[shape]

    def _prepare(self, images: Tensor) -> None:
        try:
            self.model.prepare(images, self.assumptions.deterministic)
        except ConfigurationError as error:  # the control cannot be made; the evaluation itself can go without it
            if self.settings.on_unsuitable == "raise":
                raise
            self.attacks.failed |= {name: str(error) for name in self.settings.rows if is_control(name)}
