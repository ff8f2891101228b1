"""Evaluation with masked channels in one loop of a Trainer, over all its processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_normgeo.callbacks._robustness.distributed.evaluation_processes import EvaluationProcesses
from lightning_normgeo.callbacks._robustness.evaluation_hooks import BatchEvaluation
from lightning_normgeo.channels.evaluation import MaskedEvaluation
from lightning_normgeo.channels.report import MaskingReport
from lightning_normgeo.channels.settings import MaskingSettings
from lightning_normgeo.errors import UnsuitableError, reason_of, warn_once
from lightning_normgeo.robustness.inputs import unpacked
from lightning_normgeo.robustness.inputs.advice import CHANNELS, advising

NAME = CHANNELS.callback
_T = TypeVar("_T")


class ChannelsCallback(Protocol):
    """The callback of an evaluation, as far as its loop needs it."""

    settings: MaskingSettings
    limit_batches: int | None

    def logits(self, pl_module: Any, images: Tensor) -> Any:
        """Return the logits of images."""

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and labels of a batch."""


class ChannelLoop(BatchEvaluation):
    """Evaluates the batches of the first loader of a loop.

    Args:
        callback: has the settings, and unpacks batches and calls the model.
        trainer: runs the loop.
        module: the model.
        loader: the loader; None if there is none.
        data: ``test`` or ``validation``.
        count: number of its batches, infinite or None if it has no length.
        in_loop: whether the project's own steps run between the batches.
    """

    def __init__(
        self,
        callback: ChannelsCallback,
        trainer: Any,
        module: Any,
        loader: Any,
        data: str,
        count: float | None = None,
        in_loop: bool = True,
    ) -> None:
        self._callback, self._trainer, self._module, self._data = callback, trainer, module, data
        self._batches, self._is_planned = 0, False
        self._bar: _Tqdm | _Task | None = None
        self._count = count
        self._processes = EvaluationProcesses(trainer, module, NAME, in_loop)
        refused = self._processes.refused
        self._meets_others = trainer.world_size > 1 and refused is None

        def logits(images: Tensor) -> Any:
            # tensors that forward creates must have the precision of the weights, as in Lightning's own test step
            with trainer.precision_plugin.tensor_init_context():
                return callback.logits(module, images)

        self._evaluation = MaskedEvaluation(module, logits, callback.settings, loader, self._show, self._agreed)
        if refused is not None:
            self.give_up(refused)

    def take(self, batch: Any, number: int = 0) -> None:
        """Evaluate a batch of the first loader, of which the project's own step gets the original."""
        self._prepare()
        if number == 0:
            self._evaluate(batch)
        self._meet()

    def take_none(self) -> None:
        """Take part in what all processes exchange at their first batch, without one."""
        self._begin_late()
        self._meet()

    def _meet(self) -> None:
        """Wait for the other processes before the project's step."""
        self.has_begun = True
        try:
            self._processes.meet_before_step()
        except Exception as error:
            self.give_up(error)

    def _prepare(self) -> None:
        """Get ready for the first pass; every process comes here, before its first batch or at the end without one."""
        try:
            self._processes.prepare()
        except Exception as error:
            self.give_up(error)

    def _evaluate(self, batch: Any) -> None:
        evaluation = self._evaluation
        limit = self._callback.limit_batches
        if evaluation.failed or (limit is not None and self._batches >= limit):
            return
        self._batches += 1
        try:
            with self._processes.whole_model(), advising(CHANNELS):
                if not self._is_planned:
                    self._begin(lambda: self._unpacked(batch))
                evaluation.add(*self._unpacked(batch))
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Evaluate nothing more on this process, and warn; the other processes learn of it in :meth:`finish`."""
        reason = self._evaluation.give_up(error)
        if self._meets_others:
            self._prepare()
        if self._meets_others and not self._is_planned:
            self._begin_without(error)
        warn_once(f"Channels are not evaluated. {reason}")

    def _begin(self, first: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Take part in the plan, which all processes make together once."""
        self._is_planned = True
        self._evaluation.begin(first)

    def _begin_late(self) -> None:
        """Begin without a batch, if this process has not begun."""
        self._prepare()
        if self._meets_others and not self._is_planned:
            self._begin_without(UnsuitableError("The first process has no samples."))

    def _begin_without(self, error: Exception) -> None:
        """Take part in the plan without a batch, since the other processes wait for it."""

        def first() -> tuple[Tensor, Tensor]:
            raise error

        try:
            self._begin(first)
        except Exception as failed:
            self._evaluation.give_up(failed)

    def finish(self) -> MaskingReport:
        """Return the report of all processes; every process has to call this."""
        if self._bar is not None:
            self._bar.close()
        self._begin_late()
        self._processes.end_batches()
        shares = self._processes.gathered(self._evaluation.share())
        report = self._evaluation.report(shares, data=self._data, batches=self._batches)
        if report.not_evaluated and not self._evaluation.failed:
            warn_once(f"Channels are not evaluated. {report.not_evaluated}")
        for why in dict.fromkeys(report.left_out.values()):
            criteria = ", ".join(criterion for criterion, reason in report.left_out.items() if reason == why)
            warn_once(f"Channels are not ranked by {criteria}: {why}.")
        return report

    def _unpacked(self, batch: Any) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):
            images, labels = (
                tensor.clone().to(self._module.device) for tensor in unpacked(self._callback.unpack, batch)
            )
        return images, labels

    def _agreed(self, make: Callable[[], _T]) -> _T:
        """Return the object that the first process makes, on all of them; its error is raised on all of them."""
        if not self._meets_others:
            return make()
        found: tuple[Any, str] = (None, "")
        if self._trainer.global_rank == 0:
            try:
                found = make(), ""
            except Exception as error:
                found = None, reason_of(error)
        made, reason = self._processes.gathered(found)[0]
        if reason:
            raise UnsuitableError(reason)
        return made  # type: ignore[no-any-return]

    def _show(self, name: str, samples: int, correct: int, seen: int) -> None:
        """Advance the bar, which is opened when the first accuracy is there."""
        own = self._trainer.progress_bar_callback
        if own is None or not own.is_enabled or not self._trainer.is_global_zero:
            return
        if self._bar is None:
            self._bar = _bar(getattr(own, "progress", None), self._total(samples))
        self._bar.show(f"{name} {100 * correct / seen:.1f} %", samples)

    def _total(self, samples: int) -> int | None:
        """Return the number of images that the bar counts, if the loader has a length."""
        plan, limit = self._evaluation.plan, self._callback.limit_batches
        known = [count for count in (self._count, limit) if count is not None and count != math.inf]
        return None if plan is None or not known else int(min(known)) * samples * (1 + len(plan.conditions))


class _Tqdm:
    def __init__(self, total: int | None) -> None:
        self._bar = tqdm(total=total, unit="img", leave=False, position=1, dynamic_ncols=True)

    def show(self, text: str, samples: int) -> None:
        self._bar.set_description_str(f"channels {text}", refresh=False)
        self._bar.update(samples)

    def close(self) -> None:
        self._bar.close()


class _Task:
    """A further line in the Trainer's rich display; rich allows only one live display at a time."""

    def __init__(self, progress: Any, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("channels", total=math.inf if total is None else total)

    def show(self, text: str, samples: int) -> None:
        self._progress.update(self._task, advance=samples, description=text)

    def close(self) -> None:
        self._progress.update(self._task, visible=False)


def _bar(progress: Any, total: int | None) -> _Tqdm | _Task:
    """Return a progress bar of the same kind as the Trainer's, tqdm or rich."""
    return _Tqdm(total) if progress is None else _Task(progress, total)
