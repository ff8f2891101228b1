"""Evaluation of one loader: from its batches to this process's share of the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import UnsuitableError, reason_of, warn_once
from lightning_normgeo.normalization.user_inputs import weight_of
from lightning_normgeo.robustness.attacks.batch_attacks import Progress
from lightning_normgeo.robustness.attacks.native_attacks import BallAttack
from lightning_normgeo.robustness.evaluator import RobustnessEvaluator
from lightning_normgeo.robustness.inputs import DeclaredInputs, InputSpace, class_indices, class_logits, input_space
from lightning_normgeo.robustness.inputs.advice import override
from lightning_normgeo.robustness.inputs.pixel_lattice import confirms
from lightning_normgeo.robustness.inputs.pixel_range import check_range
from lightning_normgeo.robustness.model.assumptions import check_assumptions
from lightning_normgeo.robustness.model.image_copies import on_copies
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.robustness.results.samples.journal import Journal
from lightning_normgeo.robustness.results.samples.process_shares import EVERYTHING, ProcessShare
from lightning_normgeo.robustness.results.samples.sample_identity import SeenSamples, order_of, sample_keys
from lightning_normgeo.robustness.settings import RobustnessSettings
from lightning_normgeo.utilities.attack_names import control_of


class JournalPlace(NamedTuple):
    """The place of a journal of finished samples: a folder, the name of the evaluation, and the rank of the process."""

    folder: Path
    name: str = ""
    rank: int = 0


def _scores(logits: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Return the function that maps images to class logits, given one that maps them to the output of a model."""
    return on_copies(lambda images: class_logits(logits(images), len(images)))


class LoaderEvaluation:
    """Checks the images and labels of a loader, evaluates each of its samples once, and collects reasons for failures.

    Args:
        module: the model.
        logits: maps images to the model's output.
        settings: the settings of the evaluation.
        declared: the user's declaration of how images are normalized.
        loader: yields the batches.
        num_images: number of example images to keep.
        progress: see :class:`RobustnessEvaluator`.
        journal: the place of the journal of finished samples; None for no journal.
        surrogate: maps images to the output of another model, of which attacks are transferred; None for none.

    Attributes:
        evaluator: evaluates the samples; None before the first batch.
        seen: the samples so far.
        told: the warnings that were already given.
        confirmed: whether all images so far confirm their normalization.
    """

    def __init__(
        self,
        module: nn.Module,
        logits: Callable[[Tensor], Any],
        settings: RobustnessSettings,
        declared: DeclaredInputs,
        loader: Any,
        num_images: int = 0,
        progress: Progress | None = None,
        journal: JournalPlace | None = None,
        surrogate: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.settings = settings
        self.evaluator: RobustnessEvaluator | None = None
        self.seen = SeenSamples(order_of(loader), settings.max_samples)
        self._module, self._logits, self._scores = module, on_copies(logits), _scores(logits)
        self._declared, self._loader = declared, loader
        self._num_images, self._progress = num_images, progress
        self._journal, self._surrogate = journal, None if surrogate is None else _scores(surrogate)
        self._shapes: set[torch.Size] = set()
        self._dtype: torch.dtype | None = None
        self._failed: dict[str, str] = {}
        self._said: list[str] = []
        self.told: set[str] = set()
        self.confirmed = False

    @property
    def stopped(self) -> bool:
        """Whether no further batch is evaluated, after a failure or ``max_samples`` samples."""
        return EVERYTHING in self._failed or self.seen.full

    def begin(self, images: Tensor, labels: Tensor) -> None:
        """Check the model and the data on the first batch, and make the evaluator; warn of attacks that cannot run.

        Args:
            images: as the loader yields them.
            labels: of any form, see :func:`class_indices`.

        Raises:
            UnsuitableError: if nothing can be evaluated.
        """
        if not len(images):
            return  # an empty batch shows nothing; the next one is taken as the first
        images, labels = self._floating(images), class_indices(labels)
        inputs = self._input_space(images)
        self.confirmed = inputs.confirmed
        needs_gradient = bool(self._with_gradient)
        assumptions = check_assumptions(self._module, self._logits, images, labels, needs_gradient)
        self.evaluator = RobustnessEvaluator(
            self._scores,
            inputs,
            self.settings,
            self._module,
            self._num_images,
            self._progress,
            assumptions,
            self._surrogate,
        )
        self.evaluator.check_precision(images)
        self._said += [text for text in (inputs.said, *assumptions.said, self.evaluator.unverified) if text]
        if assumptions.no_gradient:
            self._without_gradient(assumptions.no_gradient)
        if self._journal is not None:
            folder, name, rank = self._journal
            self.evaluator.resume(folder, images, self._loader, self._module, name, rank)
        for text in self._said:
            self._tell(text)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Evaluate the next batch; the first one calls :meth:`begin`."""
        if self.stopped or not len(images):
            return
        if self.evaluator is None:
            self.begin(images, labels)
        assert self.evaluator is not None  # noqa: S101
        images, labels = self._floating(images), class_indices(labels)
        self._check_later(images)
        keys = sample_keys(images, labels, self.evaluator.inputs)
        counted = self.seen.new(keys)
        if self.evaluator.assumptions.independent:
            counted = self.seen.own(keys, counted)
        if any(counted):
            self._shapes.add(images.shape[1:])
            self.evaluator.put(images, labels, keys, counted)

    def add_left(self, images: Tensor, labels: Tensor) -> None:
        """Evaluate samples that were left to other processes, which did not get them."""
        assert self.evaluator is not None  # noqa: S101
        images, labels = self._floating(images), class_indices(labels)
        self.evaluator.put(images, labels, sample_keys(images, labels, self.evaluator.inputs))

    def give_up(self, error: BaseException) -> str:
        """Evaluate no further batch, and return the reason as given in the report."""
        reason = self._failed[EVERYTHING] = reason_of(error)
        return reason

    def finish(self) -> ProcessShare:
        """Evaluate the samples that are still queued, and return this process's share of the report."""
        rows = {}
        if self.evaluator is not None and EVERYTHING not in self._failed:
            decisions = self.evaluator.finish()
            rows = {attack: tuple(decisions.of(attack)) for attack in decisions.attacks}
        if self.evaluator is None:
            return ProcessShare(rows, {}, self.seen.order.positions is not None, {}, None, self._failed, self._said)
        failed = {**self.evaluator.failed, **self._failed}
        known = self.seen.order.positions is not None
        settings, weights = self._description(self.evaluator), self.evaluator.model.weights()
        return ProcessShare(rows, self.seen.places, known, settings, self.evaluator.inputs, failed, self._said, weights)

    def close(self, ended: bool = False) -> None:
        """Close the journal; ``ended`` removes it, once the results are written."""
        if self.evaluator is not None and isinstance(self.evaluator.decisions, Journal):
            self.evaluator.decisions.close(ended)

    @property
    def shown(self) -> ExampleImages:
        """The example images."""
        return ExampleImages() if self.evaluator is None else self.evaluator.shown

    def _description(self, evaluator: RobustnessEvaluator) -> dict[str, Any]:
        sizes = {shape.numel() for shape in self._shapes}
        holds = evaluator.assumptions
        return {
            **evaluator.settings.describe(
                replace(evaluator.inputs, confirmed=self.confirmed), evaluator.model.precision
            ),
            "values_per_image": sizes.pop() if len(sizes) == 1 else None,
            "deterministic": holds.deterministic,
            "independent_of_batch": holds.independent,
        }

    def _input_space(self, images: Tensor) -> InputSpace:
        threat = self.settings.threat
        if threat.space != "input":
            return input_space(self._module, self._loader, images, self._declared, threat.space)
        mean, std = threat.unit_range
        return InputSpace(mean, std, normalized_data=True, source="declared")

    def _floating(self, images: Tensor) -> Tensor:
        """Return images in floating point, so that they can have a gradient.

        Bytes are converted, if the model gives the same logits for both types. Images in floating point are converted
        to the model's precision if it cannot be called with theirs, as with arrays in float64.

        Raises:
            UnsuitableError: for bytes that the model treats differently from the same numbers in floating point.
        """
        if images.is_floating_point():
            if self.evaluator is None:
                self._dtype = self._precision(images)
            return images if self._dtype is None else images.to(self._dtype)
        floating = images.float()
        if self.evaluator is None:
            if self._declared.empty:
                self._declared = replace(self._declared, value_range=(0.0, 255.0))
            try:
                with torch.no_grad():
                    one, other = (class_logits(self._logits(batch[:2]), 2) for batch in (images, floating))
                same = torch.allclose(one, other, rtol=1e-4, atol=1e-6)
            except Exception:
                same = False
            if not same:
                raise UnsuitableError(
                    "Images are bytes, and the model does not give the same logits for the same numbers in floating "
                    f"point. {override('unpack')} to return the images as the model gets them, as images / 255."
                )
        return floating

    def _precision(self, images: Tensor) -> torch.dtype | None:
        """Return the model's precision, single or double, if it cannot be called with the images' own; else None."""
        weight = weight_of(self._module)
        if weight is None or weight.dtype not in (torch.float32, torch.float64, images.dtype):
            return None
        return None if weight.dtype == images.dtype or self._takes(images) else weight.dtype

    def _takes(self, images: Tensor) -> bool:
        """Whether the model can be called with images of this dtype."""
        try:
            with torch.no_grad(), preserved_state(self._module, fork_rng=False):
                self._logits(images[:2])
        except Exception:
            return False
        return True

    def _without_gradient(self, reason: str) -> None:
        """Leave out attacks that need a gradient with respect to the images, such as BIM."""
        assert self.evaluator is not None  # noqa: S101
        attacks = self._with_gradient
        if self.settings.on_unsuitable == "raise":
            raise UnsuitableError(f"{', '.join(attacks)} cannot be evaluated: {reason}.")
        for name in attacks:
            self.evaluator.failed.update({name: reason, control_of(name): reason})
        self._tell(f"{', '.join(attacks)} cannot be evaluated: {reason}. Clean images and noise are still evaluated.")

    @property
    def _with_gradient(self) -> list[str]:
        """The names of the attacks that need the gradient with respect to the images, and of those behind them."""
        found: list[str] = []
        for attack in self.settings.all_attacks:
            if (isinstance(attack, BallAttack) and attack.needs_gradient) or attack.after in found:
                found.append(attack.name)
        return found

    def _tell(self, text: str) -> None:
        self.told.add(text)
        warn_once(text)

    def _check_later(self, images: Tensor) -> None:
        """Warn once if later images contradict the normalization of the first batch, and continue.

        Stopping would lose the results so far.
        """
        assert self.evaluator is not None  # noqa: S101
        inputs = self.evaluator.inputs
        if self.settings.threat.space == "input":
            return
        if self.confirmed and confirms(images, *inputs.normalization, every_level=False) is False:
            self.confirmed = False
            self._said.append(
                "Some images are not 8-bit levels under the normalization of the first ones. If one loader mixes data "
                "sets with different normalizations, give each a loader of its own."
            )
        try:
            check_range(images, inputs)
        except UnsuitableError as error:
            if self.settings.on_unsuitable == "raise":
                raise
            if not any(text.startswith("Some images are out of range") for text in self._said):
                self._said.append(f"Some images are out of range and are attacked within the box of pixels. {error}")
