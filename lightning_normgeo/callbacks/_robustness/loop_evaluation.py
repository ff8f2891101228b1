"""Robustness evaluation in one loop of a Trainer, over all its loaders and processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_normgeo.callbacks._robustness.dataloaders import batch_count, batches_at, batches_by_loader
from lightning_normgeo.callbacks._robustness.distributed.divided_samples import DividedSamples
from lightning_normgeo.callbacks._robustness.distributed.evaluation_processes import EvaluationProcesses
from lightning_normgeo.callbacks._robustness.evaluation_hooks import BatchEvaluation
from lightning_normgeo.callbacks._robustness.logging import local_folder, rows_left_out
from lightning_normgeo.callbacks._robustness.progress_bars import ProgressBar, bar_of
from lightning_normgeo.errors import reason_of, warn_once
from lightning_normgeo.robustness.inputs import unpacked
from lightning_normgeo.robustness.inputs.declared_inputs import DeclaredInputs
from lightning_normgeo.robustness.loader_evaluation import JournalPlace, LoaderEvaluation
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.model.surrogate import surrogate_of
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.results.samples.process_shares import EVERYTHING, ProcessShare, report_of
from lightning_normgeo.robustness.settings import RobustnessSettings

_T = TypeVar("_T")


class EvaluatingCallback(Protocol):
    """The callback of an evaluation, as far as its loops need it; see ``RobustnessHooks`` for the attributes."""

    settings: RobustnessSettings
    declared: DeclaredInputs
    num_images: int
    name: str | None
    resume: bool
    surrogate: str | None

    def logits(self, pl_module: Any, images: Tensor) -> Any:
        """Return the logits of images."""

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and labels of a batch."""


class LoopEvaluation(BatchEvaluation):
    """Evaluates the batches of a loop, loader by loader.

    Args:
        callback: has the settings, and unpacks batches and calls the model.
        trainer: runs the loop.
        module: the model.
        loop: the Trainer's evaluation loop; None after fit.
        loaders: the loaders by name, in the order of their numbers.
        counts: the number of batches of each loader; None to ask the loaders.

    Attributes:
        names: the names of the loaders.
        evaluations: the evaluation of each loader, in the same order.
        bars: the progress bar of each loader, by number; None if the Trainer shows none.
        failed: the reason if nothing is evaluated on this process; else None.
    """

    def __init__(
        self,
        callback: EvaluatingCallback,
        trainer: Any,
        module: Any,
        loop: Any,
        loaders: Mapping[str, Any],
        counts: Sequence[float] | None,
    ) -> None:
        self._callback = callback
        self._trainer = trainer
        self._module = module
        self._loop = loop
        self._other: Any = None
        self._counts = [batch_count(trainer, one) for one in loaders.values()] if counts is None else list(counts)
        self.names, self._loaders = list(loaders), list(loaders.values())
        self.evaluations = [self._evaluation(k, name, loader) for k, (name, loader) in enumerate(loaders.items())]
        self.bars: dict[int, ProgressBar | None] = {}
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}
        self._told: set[str] = set()
        if getattr(getattr(loop, "_combined_loader", None), "_mode", "") == "max_size_cycle":
            for evaluation in self.evaluations:  # this mode starts shorter loaders again until the longest has ended
                evaluation.seen.order = replace(evaluation.seen.order, repeats=True)
        self.failed: str | None = None
        self._processes = EvaluationProcesses(trainer, module, "RobustnessEvaluation", in_loop=loop is not None)
        if self._processes.refused is not None:
            self.give_up(self._processes.refused)
        self._divided = DividedSamples(self._processes, self.evaluations, trainer.global_rank)

    def give_up(self, error: Exception) -> None:
        """Evaluate nothing more on this process; the other processes learn of it in :meth:`finish`."""
        self.failed = reason_of(error)
        for number in range(len(self.evaluations)):
            self._give_up(number, error)

    def take(self, batch: Any, number: int) -> None:
        """Keep a copy of a batch before the project's step, which may change it; begin with the first batch."""
        self._prepare()
        # a project's step that takes an iterator fetches its batch itself, so there is none yet
        if type(getattr(self._loop, "_data_fetcher", None)).__name__ != "_DataLoaderIterDataFetcher":
            for k, part in batches_by_loader(self._loop, batch, number):
                self._take(k, part)
        self._meet()

    def take_none(self) -> None:
        """Take part in what all processes exchange at their first batch, without one."""
        self._prepare()
        self._meet()

    def _meet(self) -> None:
        """Exchange with the other processes what has to be known before the project's step."""
        self.has_begun = True
        self._divide()
        self._exchanged(self._processes.meet_before_step)

    def evaluate(self, batch: Any, number: int) -> None:
        """Evaluate a batch, after the project's step."""
        self._prepare()
        parts = dict(batches_by_loader(self._loop, batch, number))
        for k in parts.keys() - self._taken.keys():
            self._take(k, parts[k])
        self._divide()
        for k in parts:
            taken, evaluation = self._taken.pop(k, None), self.evaluations[k]
            if taken is None or evaluation.stopped:
                continue
            left = len(evaluation.seen.left)
            try:
                with self._processes.whole_model(), preserved_state(self._module):
                    evaluation.add(*taken)
            except Exception as error:
                self._give_up(k, error)
            self._show(k, "clean", (len(evaluation.seen.left) - left) * len(self._callback.settings.rows))

    def finish(self) -> dict[str, RobustnessReport]:
        """Return the reports of all processes by suffix of their keys; every process has to call this."""
        self._prepare()
        self._divide()
        parts = {name: self._finished(number) for number, name in enumerate(self.names)}
        self._exchanged(self._processes.end_batches)
        for number, positions in (self._exchanged(self._divided.left) or {}).items():
            if positions:
                self._evaluate_left(number, positions)
                parts[self.names[number]] = self._finished(number)
        shares = self._exchanged(lambda: self._processes.gathered((parts, self.failed))) or [({}, self.failed)]
        shown = {name: evaluation.shown for name, evaluation in zip(self.names, self.evaluations, strict=True)}
        reports = {}
        for name in dict.fromkeys(name for found, _ in shares for name in found) or [""]:
            mine = [found.get(name, _nothing(failed)) for found, failed in shares]
            reports[self._suffix(name)] = report_of(mine, self._callback.settings, shown.get(name, ExampleImages()))
        self._say(reports)
        return reports

    def end(self, written: bool) -> None:
        """Close the progress bars and journals; remove the journals if rank zero has written all results."""
        all_written = self._exchanged(lambda: self._processes.gathered(written)) or [False]
        self.close(ended=all_written[0] and not self._processes.is_lost)

    def _exchanged(self, exchange: Callable[[], _T]) -> _T | None:
        """Return the outcome of an exchange with the other processes; give up if one of them has died."""
        try:
            return exchange()
        except Exception as error:
            self.give_up(error)
            return None

    def _prepare(self) -> None:
        """Get ready for the first pass; every process comes here, before its first batch or at the end without one."""
        try:
            if self._processes.prepare():
                with self._processes.whole_model():
                    self._other = surrogate_of(self._module, self._callback.surrogate)
        except Exception as error:
            self.give_up(error)

    def _divide(self) -> None:
        """Agree with the other processes on the division of samples, after the first batch or at the end."""
        first = next((images for images, _ in self._taken.values()), None)
        self._exchanged(lambda: self._divided.agree(first))

    def _evaluate_left(self, number: int, positions: Sequence[int]) -> None:
        """Evaluate samples that were left to other processes, which did not get them."""
        try:
            with self._processes.whole_model(), preserved_state(self._module):
                for batch in batches_at(self._trainer, self._loaders[number], positions, number):
                    found = unpacked(self._callback.unpack, batch)
                    images, labels = (tensor.to(self._module.device) for tensor in found)
                    self.evaluations[number].add_left(images, labels)
        except Exception as error:
            self._give_up(number, error)

    def close(self, ended: bool = False) -> None:
        """Close the progress bars and the journals; ``ended`` removes the journals, once the results are written."""
        for bar in self.bars.values():
            if bar is not None:
                bar.close()
        self.bars = {}
        for evaluation in self.evaluations:
            evaluation.close(ended)

    def _evaluation(self, number: int, name: str, loader: Any) -> LoaderEvaluation:
        callback, trainer, module = self._callback, self._trainer, self._module
        journal = None
        if callback.resume:
            part = f"{callback.name or ''}/{name}/{number}"
            journal = JournalPlace(local_folder(trainer.default_root_dir), part, trainer.global_rank)

        def logits(images: Tensor) -> Any:
            # tensors that forward creates must have the precision of the weights, as in Lightning's own test step
            with trainer.precision_plugin.tensor_init_context():
                return callback.logits(module, images)

        def surrogate(images: Tensor) -> Any:
            return callback.logits(self._other, images)

        return LoaderEvaluation(
            module,
            logits,
            callback.settings,
            callback.declared,
            loader,
            callback.num_images if number == 0 else 0,
            lambda attack, samples: self._show(number, attack, samples),
            journal,
            surrogate if callback.surrogate is not None else None,
        )

    def _take(self, number: int, batch: Any) -> None:
        evaluation = self.evaluations[number]
        if evaluation.stopped:
            return
        try:
            with torch.inference_mode(False):
                found = unpacked(self._callback.unpack, batch)
                images, labels = (tensor.clone().to(self._module.device) for tensor in found)
            if evaluation.evaluator is None:
                self._open_bar(number, len(images))
                with self._processes.whole_model(), preserved_state(self._module):
                    evaluation.begin(images, labels)
            self._taken[number] = images, labels
        except Exception as error:
            self._give_up(number, error)

    def _give_up(self, number: int, error: Exception) -> None:
        """Evaluate no more batches of a loader, and warn; with ``on_unsuitable="raise"`` raise the error."""
        if self._callback.settings.on_unsuitable == "raise":
            raise error
        why = self.evaluations[number].give_up(error)
        self._taken.pop(number, None)
        reason = f"Robustness{self._suffix(self.names[number])} is not evaluated. {why}"
        if reason not in self._told:
            self._told.add(reason)
            warn_once(reason)

    def _finished(self, number: int) -> ProcessShare:
        evaluation = self.evaluations[number]
        try:
            with self._processes.whole_model(), preserved_state(self._module):
                return evaluation.finish()
        except Exception as error:
            self._give_up(number, error)
            return evaluation.finish()

    def _suffix(self, name: str) -> str:
        return "".join(f"/{part}" for part in (self._callback.name, name) if part)

    def _say(self, reports: Mapping[str, RobustnessReport]) -> None:
        """Give the warnings of the reports that were not given yet."""
        told = {text for evaluation in self.evaluations for text in evaluation.told}
        found = dict.fromkeys(text for report in reports.values() for text in report.warnings if text not in told)
        for text in found:
            warn_once(text)
        for suffix, report in reports.items():
            for reason, rows in rows_left_out(report, suffix).items():
                if not any(reason in text for text in (*self._told, *told)):
                    warn_once(f"{', '.join(rows)} {'is' if len(rows) == 1 else 'are'} not evaluated. {reason}")

    def _open_bar(self, number: int, size: int) -> None:
        count = self._counts[number] if number < len(self._counts) else None
        total = None
        if count is not None and count != float("inf"):
            total = int(count) * size * len(self._callback.settings.rows)
        self.bars[number] = bar_of(self._trainer, total)

    def _show(self, number: int, attack: str, samples: int) -> None:
        bar = self.bars.get(number)
        if bar is not None:
            bar.show(self.evaluations[number].evaluator, attack, samples)


def _nothing(failed: str | None) -> ProcessShare:
    """Return the share of a process that has no such loader, or could not get it."""
    reasons = {} if failed is None else {EVERYTHING: failed}
    return ProcessShare({}, {}, False, {}, None, reasons, [])
