"""The processes of an evaluation in a Trainer: when they wait for each other, and the model that each has to itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import nn

from lightning_normgeo.callbacks._monitors.sharded_models import runs_under
from lightning_normgeo.callbacks._robustness.dataloaders import check_all_take_part, check_not_sharded
from lightning_normgeo.callbacks._robustness.distributed.gathered_flat_model import GatheredFlatModel
from lightning_normgeo.callbacks._robustness.distributed.gathered_model import GatheredModel
from lightning_normgeo.callbacks._robustness.distributed.processes import Processes
from lightning_normgeo.errors import UnsuitableError, reason_of
from lightning_normgeo.utilities.checked_values import first_line

_T = TypeVar("_T")


class EvaluationProcesses:
    """The processes of an evaluation, each of which evaluates its own samples on a whole model.

    Every process has to construct it and to call :meth:`prepare`, :meth:`end_batches` and :meth:`gathered`, whatever
    became of its own evaluation.

    Args:
        trainer: the Trainer.
        module: the model.
        callback: name of the callback, for messages.
        in_loop: whether the project's own steps run between the batches of the evaluation.

    Attributes:
        refused: the error if nothing can be evaluated, on any process; else None.
        is_lost: whether another process has died, so that there is no further exchange.
    """

    def __init__(self, trainer: Any, module: nn.Module, callback: str, in_loop: bool) -> None:
        self._trainer, self._module, self._in_loop = trainer, module, in_loop
        self._model: GatheredModel | GatheredFlatModel | None = None
        self._is_prepared = self.is_lost = False
        self.refused: UnsuitableError | None = None
        try:
            check_not_sharded(trainer, callback)
            check_all_take_part(trainer, callback)
        except UnsuitableError as error:
            self.refused, self._is_prepared = error, True
        self._processes = Processes(trainer.world_size if self.refused is None else 1)

    @property
    def count(self) -> int:
        """The number of processes that take part."""
        return self._processes.count

    def prepare(self) -> bool:
        """Gather the weights of a sharded model before the first pass, and return whether this is the first call.

        A process without a batch calls it at the end.

        Raises:
            UnsuitableError: on the first call, on every process, if one of them cannot have the whole weights.
        """
        is_first, self._is_prepared = not self._is_prepared, True
        if is_first and runs_under(self._trainer, "ModelParallelStrategy", "FSDPStrategy") is not None:
            found: list[GatheredModel | GatheredFlatModel] = []
            self._agree(lambda: found.append(self._sharded_model()))
            self._agree(found[0].gather)
            self._model = found[0]
        return is_first

    def _sharded_model(self) -> GatheredModel | GatheredFlatModel:
        strategy = self._trainer.strategy
        if runs_under(self._trainer, "FSDPStrategy") is not None:
            return GatheredFlatModel(self._module, strategy.model, strategy.root_device)
        return GatheredModel(self._module, strategy.root_device)

    def whole_model(self) -> AbstractContextManager[None]:
        """Context in which passes of the model need no other process."""
        return nullcontext() if self._model is None else self._model.active()

    def meet_before_step(self) -> None:
        """Wait until every process is about to take the project's next step, if all of them take part in it.

        A process that is ahead would else wait inside that step, and fail after the timeout of its collectives.
        """
        if self._model is not None and self._in_loop:
            self.gathered(False)

    def end_batches(self) -> None:
        """Wait until every process has evaluated all its batches, of which each may have another number."""
        if self._model is not None and self._in_loop:
            while not all(self.gathered(True)):
                pass

    def gathered(self, mine: _T) -> list[_T]:
        """Return the objects of all processes, in the order of their ranks.

        Raises:
            UnsuitableError: if a process has died; from then on this process is alone.
        """
        try:
            return self._processes.gathered(mine)
        except Exception as error:
            self._processes, self.is_lost = Processes(1), True
            raise UnsuitableError(
                f"A process of the Trainer has died, or cannot be reached any more ({first_line(error)})."
            ) from error

    def _agree(self, step: Callable[[], None]) -> None:
        """Take a step on every process, and raise an error on all of them if one of them fails."""
        reason = ""
        try:
            step()
        except Exception as error:
            reason = reason_of(error)
        reason = next(filter(None, self.gathered(reason)), "")
        if reason:
            raise UnsuitableError(reason)
