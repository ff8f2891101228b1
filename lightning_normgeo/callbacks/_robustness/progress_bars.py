"""A progress bar for attacks, beside the one that a Trainer shows."""

from __future__ import annotations

from typing import Any, Protocol

from tqdm.auto import tqdm

from lightning_normgeo.robustness.evaluate import show_progress
from lightning_normgeo.robustness.evaluator import RobustnessEvaluator


class ProgressBar(Protocol):
    """Shows how far an evaluation is."""

    def show(self, evaluator: RobustnessEvaluator | None, name: str, samples: int) -> None:
        """Show the attack that runs and the accuracies so far, ``samples`` further on."""

    def close(self) -> None:
        """Take the bar away."""


def bar_of(trainer: Any, total: int | None) -> ProgressBar | None:
    """Return a bar of the kind that the Trainer has; None where it shows none."""
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
    """A line in the display of rich, which allows for one display only."""

    def __init__(self, progress: Any, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("robustness", total=total)

    def show(self, evaluator: RobustnessEvaluator | None, name: str, samples: int) -> None:
        if evaluator is None:
            return
        found = [f"{100 * hits / n:.1f} %" for key, (hits, n) in evaluator.decisions.seen.items() if n and key == name]
        self._progress.update(self._task, advance=samples, description=" ".join([name, *found]))

    def close(self) -> None:
        self._progress.update(self._task, visible=False)
