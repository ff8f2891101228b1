"""Which optimizers are to be measured next: each at its first step after every n steps of the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

PATIENCE = 16
"""For how many batches an optimizer is waited for with everything armed, around the batch in which it should step."""


class Cadence:
    """The steps of every optimizer, and which of them are due.

    Steps of the training are counted as loggers count them. At every n-th one all optimizers become due, and each is
    measured at its next step: one that steps rarely (the generator of a GAN) is seen as often as the others. How often
    it steps is learned, so that nothing is armed while it is not expected.

    Attributes:
        taken: how many steps each optimizer has taken, by id.
        measured: how many of them were measured.
        missed: how often an n-th step came and no optimizer was measured until the next one was due.
    """

    def __init__(self) -> None:
        self.taken: Counter[int] = Counter()
        self.measured: Counter[int] = Counter()
        self.missed = 0
        self.step = 0
        self._due: dict[int, dict[int, int]] = {}
        self._last: dict[int, int] = {}
        self._gap: dict[int, int] = {}
        self._unfulfilled = False

    @property
    def waits(self) -> bool:
        """Whether any optimizer is due."""
        return any(self._due.values())

    def advance(self, step: int, cadences: Iterable[int], optimizers: Sequence[Any]) -> None:
        """Go to a step of the training; nothing happens if it is the same as before (another micro-batch).

        Args:
            step: counted from 1.
            cadences: of all monitors; 0 means never.
            optimizers: of the Trainer, now.
        """
        if step == self.step:
            return
        self.step = step
        due = [every for every in cadences if every and step % every == 0]
        if due:
            self.missed += self._unfulfilled
            self._unfulfilled = True
        for every in due:
            self._due[every] = {id(optimizer): step for optimizer in optimizers}

    def take(self, optimizer: Any) -> None:
        """Note a step of an optimizer."""
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
        """Note that these were measured; return the cadences that they were due for."""
        measured = set(optimizers)
        self.measured.update(measured)
        self._unfulfilled = self._unfulfilled and not measured
        found = set()
        for every, due in self._due.items():
            for key in measured & due.keys():
                found.add(every)
                del due[key]
        return found

    def finish(self) -> None:
        """Note that training ends: what was due until now is missed."""
        self.missed += self._unfulfilled
        self._unfulfilled = False

    def _may_step(self, key: int, since: int) -> bool:
        """Whether an optimizer that is due may take a step within the next batches."""
        last = self._last.get(key)
        if last is None:
            return self.step - since < PATIENCE
        gap = self._gap.get(key, 1)
        return gap - PATIENCE < self.step - last <= gap + PATIENCE
