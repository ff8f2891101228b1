"""The robustness evaluation of one loader inside a Trainer's loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.callbacks.bars import bar_of
from lightning_normgeo.callbacks.loaders import indices_of
from lightning_normgeo.robustness.decisions import Decisions
from lightning_normgeo.robustness.evaluation import RobustnessEvaluator
from lightning_normgeo.robustness.journal import Journal
from lightning_normgeo.robustness.report import RobustnessReport, report_of
from lightning_normgeo.robustness.settings import RobustnessSettings
from lightning_normgeo.robustness.threat import InputSpace


class LoaderEvaluation:
    """Numbers the samples of one loader, evaluates them, and puts the processes' decisions together.

    Args:
        trainer: runs the loop.
        module: the model.
        logits: maps images to logits.
        inputs: what the images are.
        settings: what to evaluate.
        num_images: how many samples to keep for showing.
        resume: whether to go on with what an earlier attempt left.
        number: of the loader.
        batches: how many the loop has for it.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        logits: Callable[[Tensor], Tensor],
        inputs: InputSpace,
        settings: RobustnessSettings,
        num_images: int,
        resume: bool,
        number: int,
        batches: float | None,
    ) -> None:
        self._trainer, self._module, self._settings = trainer, module, settings
        self._resume, self._number, self._batches = resume, number, batches
        self._seen = 0
        self._bar: Any = None
        self.evaluator = RobustnessEvaluator(logits, inputs, settings, module, num_images, self._show)

    def add(self, images: Tensor, labels: Tensor, loader: Any) -> None:
        """Evaluate the next batch."""
        if self._seen == 0:
            self._begin(images, loader)
        positions = enumerate(indices_of(self._trainer, loader, self._seen, len(labels)))
        self._seen += len(labels)
        limit = float("inf") if self._settings.max_samples is None else self._settings.max_samples
        counted = {i: index for i, index in positions if index is not None and index < limit}
        if counted:
            keep = list(counted)
            self.evaluator.put(images[keep], labels[keep], list(counted.values()))

    def finish(self) -> RobustnessReport:
        """Return the report over all processes; every one of them has to call this."""
        decisions = self.evaluator.finish()
        whole = gathered(decisions, self._trainer.world_size)
        self.close(ended=True)
        return report_of(whole, self.evaluator)

    def close(self, ended: bool = False) -> None:
        """Take the bar away, and close the journal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if isinstance(self.evaluator.decisions, Journal):
            self.evaluator.decisions.close(ended)

    def _begin(self, images: Tensor, loader: Any) -> None:
        attacks = self.evaluator.decisions.attacks
        known = self._batches is not None and self._batches != float("inf")
        total = int(self._batches) * len(images) if known and self._batches is not None else None
        self._bar = bar_of(self._trainer, None if total is None else total * len(attacks))
        if self._resume:
            folder, rank = Path(self._trainer.default_root_dir), self._trainer.global_rank
            self.evaluator.resume(folder, images, loader, self._module, self._number, rank)

    def _show(self, name: str, samples: int) -> None:
        if self._bar is not None:
            self._bar.show(self.evaluator, name, samples)


def gathered(decisions: Decisions, processes: int) -> Decisions:
    """Return the decisions of all processes; a sample that several of them had counts once."""
    if processes == 1:
        return decisions
    found: list[Any] = [None] * processes
    mine = {attack: tuple(decisions.of(attack)) for attack in decisions.attacks}
    torch.distributed.all_gather_object(found, mine)
    return Decisions.from_parts(found)
