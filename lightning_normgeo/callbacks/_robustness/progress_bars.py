"""Progress bars of evaluations, beside the Trainer's own progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm.auto import tqdm

from lightning_normgeo.robustness.evaluate import show_progress
from lightning_normgeo.robustness.evaluator import RobustnessEvaluator


class ProgressBar(Protocol):
    """A progress bar of an evaluation."""

    def show(self, evaluator: RobustnessEvaluator | None, name: str, samples: int) -> None:
        """Display the running attack and the accuracies so far, and advance the bar by ``samples``."""

    def close(self) -> None:
        """Remove the progress bar."""


def bar_of(trainer: Any, total: int | None) -> ProgressBar | None:
    """Return a progress bar of the same kind as the Trainer's (tqdm or rich); None if the Trainer shows none."""
    own = trainer.progress_bar_callback
    if own is None or not own.is_enabled or not trainer.is_global_zero:
        return None
    progress = getattr(own, "progress", None)
    return _Tqdm(total) if progress is None else _Task(progress, total)


class _Tqdm:
    def __init__(self, total: int | None) -> None:
        self._bar = tqdm(total=total, unit="img", leave=False, position=1, dynamic_ncols=True)

    def show(self, evaluator: RobustnessEvaluator | None, name: str, samples: int) -> None:
        show_progress(self._bar, evaluator, name, samples)

    def close(self) -> None:
        self._bar.close()


class _Task:
    """A further line in the Trainer's rich display; rich allows only one live display at a time."""

    def __init__(self, progress: Any, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("robustness", total=math.inf if total is None else total)  # it takes no None

    def show(self, evaluator: RobustnessEvaluator | None, name: str, samples: int) -> None:
        if evaluator is None:
            return
        correct, count = evaluator.decisions.seen.get(name, (0, 0))
        description = f"{name} {100 * correct / count:.1f} %" if count else name
        self._progress.update(self._task, advance=samples, description=description)

    def close(self) -> None:
        self._progress.update(self._task, visible=False)


@contextmanager
def named_steps(trainer: Any, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Context with a progress bar of named steps, of the same kind as the Trainer's, that appears after a second.

    Args:
        trainer: the Trainer, which may show no progress bar.
        title: name of what is done.
        total: number of steps.

    Yields:
        A function to be called with the name of each step when it begins.
    """
    own = trainer.progress_bar_callback
    if own is None or not own.is_enabled:
        yield lambda name: None
        return
    progress = getattr(own, "progress", None)
    if progress is None:
        with tqdm(total=total, desc=title, leave=False, delay=1, dynamic_ncols=True) as bar:
            yield lambda name: bar.update()
        return
    task = progress.add_task(title, total=total)
    try:
        yield lambda name: progress.update(task, advance=1, description=f"{title}: {name}")
    finally:
        progress.update(task, visible=False)
