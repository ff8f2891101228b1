"""Schedule of the measurements: each optimizer is measured at its first step after every n steps of the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

PATIENCE = 16
"""Number of batches, before and after the batch in which an optimizer should step, in which hooks wait for its step."""


DENSE = 100
"""Measurements of a cadence that thins before its first halving; half as many come between two halvings."""


def is_due(every: int, step: int) -> bool:
    """Whether a cadence is due at a step.

    Args:
        every: number of steps between two measurements. A negative number -n is a cadence that thins: n steps up to
            step 100·n, and twice as many each time the step has doubled, so that a training of N > 100·n steps has
            about 100 + 50·log2(N/100n) measurements. It depends on the step alone, also after a resume.
        step: the step number, counted from 1.
    """
    if every < 0:
        halvings = max(2 * step // (DENSE * -every), 1).bit_length() - 1
        every = -every * 2**halvings
    return step % every == 0


def measured_steps(every: int, steps: int) -> int:
    """Return the number of steps among 1 … ``steps`` at which :func:`is_due`. Cost: the logarithm of ``steps``."""
    if every >= 0:
        return steps // every if every else 0
    count, first, interval, end = 0, 0, -every, DENSE * -every
    while first < steps:  # from first + 1 to end - 1 the interval is the same; at the end it is the next one
        last = min(end - 1, steps)
        count += last // interval - first // interval
        first, interval, end = last, 2 * interval, 2 * end
    return count


class Cadence:
    """Counts the steps of every optimizer and decides which optimizers to measure next.

    Steps of the training are counted as loggers count them. At every n-th step all optimizers become due, and each is
    measured at its next step, so that an optimizer that steps rarely (such as the generator's in a GAN) is measured as
    often as the others. The interval between its steps is learned, so that hooks are active only while a step is
    expected.

    Attributes:
        taken: the number of steps that each optimizer has taken, by id.
        measured: the number of its measured steps, by id.
        missed: the number of times that no optimizer was measured between one n-th step and the next.
        exchanged: whether an optimizer was taken from the training.
    """

    def __init__(self) -> None:
        self.taken: Counter[int] = Counter()
        self.measured: Counter[int] = Counter()
        self.missed = 0
        self.exchanged = False
        self.step = 0
        self._due: dict[int, dict[int, int]] = {}
        self._last: dict[int, int] = {}
        self._gap: dict[int, int] = {}
        self._known: set[int] = set()
        self._unfulfilled = False

    @property
    def waits(self) -> bool:
        """Whether any optimizer is due."""
        return any(self._due.values())

    @property
    def due(self) -> set[int]:
        """The cadences that some optimizer is due for."""
        return {every for every, optimizers in self._due.items() if optimizers}

    def advance(self, step: int, cadences: Iterable[int], optimizers: Sequence[Any]) -> None:
        """Start a step of the training; does nothing if it is the current step (another micro-batch).

        Args:
            step: the step number, counted from 1.
            cadences: the n of all monitors, see :func:`is_due`; 0 means never.
            optimizers: the current optimizers of the Trainer.
        """
        if step == self.step:
            return
        self.step = step
        due = [every for every in cadences if every and is_due(every, step)]
        if due:
            self.missed += self._unfulfilled
            self._unfulfilled = True
        self._known = set(map(id, optimizers))
        for every in due:
            self._due[every] = {id(optimizer): step for optimizer in optimizers}

    def exchange(self, optimizers: Sequence[Any]) -> None:
        """Follow an exchange of optimizers: where one that is gone was due, those that are new are due instead."""
        now = {id(optimizer) for optimizer in optimizers}
        new = now - self._known
        self.exchanged |= bool(self._known - now)
        for due in self._due.values():
            gone = due.keys() - now
            if gone:
                since = min(due[key] for key in gone)
                due |= dict.fromkeys(new, since)
            for key in gone:
                del due[key]
        self._known = now

    def take(self, optimizer: Any) -> None:
        """Count a step of an optimizer."""
        key = id(optimizer)
        self.taken[key] += 1
        last = self._last.get(key, self.step)
        if last != self.step:
            self._gap[key] = self.step - last
        self._last[key] = self.step

    def expected(self) -> set[int]:
        """Return the optimizers that are due and may step soon, by id."""
        return {key for due in self._due.values() for key, since in due.items() if self._may_step(key, since)}

    def fulfil(self, optimizers: Iterable[int]) -> set[int]:
        """Count these optimizers, given by id, as measured; return the cadences that they were due for."""
        measured = set(optimizers)
        self.measured.update(measured)
        self._unfulfilled = self._unfulfilled and not measured
        found = set()
        for every, due in self._due.items():
            for key in measured & due.keys():
                found.add(every)
                del due[key]
        return found

    def give_up(self) -> None:
        """Do not count a step that an exception ended as missed; what was due for it stays due."""
        self._unfulfilled = False

    def finish(self) -> None:
        """End the training: optimizers that are still due count as missed."""
        self.missed += self._unfulfilled
        self._unfulfilled = False

    def _may_step(self, key: int, since: int) -> bool:
        """Whether an optimizer that is due may take a step within the next batches."""
        last = self._last.get(key)
        if last is None:
            return self.step - since < PATIENCE
        gap = self._gap.get(key, 1)
        return gap - PATIENCE < self.step - last <= gap + PATIENCE
