"""Curves of a record, kept as columns of numbers instead of pairs: a tenth of the memory, and read when asked for.

The lines of a training repeat the same names at every measured step. All values of one set of names go into one block;
a curve is a view of a block's column, which looks like the list of its points.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

Value = TypeVar("Value")
Columns = Sequence[tuple[str, Sequence[str]]]
"""Quantities with values by layer, each with its layers."""


_SHARE = 1.25
"""Bytes of a record for each byte of its lines with values by layer, about: its metrics take the rest."""


@dataclass
class Block:
    """Rows of numbers that belong to the same names.

    Attributes:
        width: Numbers in a row.
        order: Number of the line that each row comes from.
        steps: Step of each row.
        values: The numbers of all rows, one row after the other.
    """

    width: int
    order: array[int] = field(default_factory=lambda: array("q"))
    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, order: int, step: int, values: Sequence[float] | Any) -> None:
        """Add a row."""
        self.order.append(order)
        self.steps.append(step)
        self.values.extend(values)

    def thin(self) -> None:
        """Drop every second row."""
        kept = [value for k in range(0, len(self.steps), 2) for value in self.row(k)]
        self.order, self.steps, self.values = self.order[::2], self.steps[::2], array("d", kept)

    def row(self, k: int) -> array[float]:
        """Return the numbers of a row."""
        return self.values[k * self.width : (k + 1) * self.width]

    def only(self, k: int) -> Block:
        """Return a block of one row."""
        return Block(self.width, self.order[k : k + 1], self.steps[k : k + 1], self.row(k))


class Points(Sequence[tuple[int, Value]]):
    """Points of a curve, read from blocks when they are asked for; equal to the list of them."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Block, Any]] = []
        self._ends: dict[int, int] = {}

    def add_block(self, process: int, block: Block, place: Any) -> None:
        """Continue the curve with a block, written by the process of this number."""
        self._parts.append((process, block, place))

    def restart(self, process: int, step: int) -> None:
        """Note the first step of a later process: it replaces the earlier points from this step on.

        A process that only evaluates, such as ``trainer.validate`` with a checkpoint, logs at step 0, because Lightning
        does not restore the step for it. Its value replaces another single value, but not a curve of several steps.
        """
        self._ends[process] = step

    @abstractmethod
    def _values(self, block: Block, place: Any) -> Sequence[Value]:
        """Return the values of all rows of a block at the place of this curve."""

    def _points(self) -> list[tuple[int, Value]]:
        return self._read(self._values)

    def _read(self, values: Callable[[Block, Any], Sequence[Any] | None]) -> list[tuple[int, Any]]:
        """Return the points of a curve with the values that a function returns of each block; None for none."""
        found: list[tuple[int, Any]] = []
        logged: set[int] = set()
        for process, group in itertools.groupby(self._parts, key=lambda part: part[0]):
            parts = list(group)
            steps = {step for _, block, _ in parts for step in block.steps} if self._ends else set()
            if process in self._ends and steps == {0} and len(logged) > 1:
                continue  # an evaluation in a process of its own
            logged = {step for step in logged if step < self._ends.get(process, math.inf)} | steps
            read = [(block, values(block, place)) for _, block, place in parts]
            own = [(block, some) for block, some in read if some is not None]
            if process in self._ends:
                found = [point for point in found if point[0] < self._ends[process]]
            if len(own) == 1:
                found += zip(own[0][0].steps, own[0][1], strict=True)
            else:
                rows = [row for block, some in own for row in zip(block.order, block.steps, some, strict=True)]
                found += [(step, value) for _, step, value in sorted(rows, key=lambda row: row[0])]
        return found

    def __len__(self) -> int:
        return sum(len(block.steps) for _, block, _ in self._parts) if not self._ends else len(self._points())

    @overload
    def __getitem__(self, index: int) -> tuple[int, Value]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, Value]]: ...

    def __getitem__(self, index: int | slice) -> tuple[int, Value] | list[tuple[int, Value]]:
        if index in (0, -1) and len(self._parts) == 1 and self._parts[0][1].steps:
            _, block, place = self._parts[0]
            row = 0 if index == 0 else len(block.steps) - 1
            return block.steps[row], self._values(block.only(row), place)[0]
        return self._points()[index]

    def __iter__(self) -> Iterator[tuple[int, Value]]:
        return iter(self._points())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, Points)) and self._points() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._points())


class MetricPoints(Points[float]):
    """(step, value) pairs of a metric."""

    def _values(self, block: Block, place: int) -> Sequence[float]:
        return block.values[place :: block.width]


class LayerPoints(Points[dict[str, float]]):
    """(step, values by layer) pairs of a quantity."""

    def _values(self, block: Block, place: tuple[int, tuple[str, ...]]) -> Sequence[dict[str, float]]:
        start, layers = place
        begins = (start + row * block.width for row in range(len(block.steps)))
        return [dict(zip(layers, block.values[k : k + len(layers)], strict=True)) for k in begins]

    @property
    def layers(self) -> dict[str, None]:
        """Names of all layers, in the order of their first occurrence."""
        return dict.fromkeys(layer for _, _, (_, layers) in self._parts for layer in layers)

    def of_layer(self, layer: str) -> list[tuple[int, float]]:
        """Return the (step, value) pairs of one layer."""

        def values(block: Block, place: tuple[int, tuple[str, ...]]) -> Sequence[float] | None:
            start, layers = place
            return block.values[start + layers.index(layer) :: block.width] if layer in layers else None

        return self._read(values)


class CurveReader:
    """Reads the lines of metrics and of values by layer into blocks.

    Args:
        most: Rows of values by layer to keep: of more than twice as many every second, fourth, eighth … is kept, and
            the last one. Default: all.
        size: Bytes of the record, by which the number of its rows is estimated. Default: unknown.

    Attributes:
        metrics: Curves of metrics.
        layers: Curves of quantities with values by layer.
        repeated: Whether several trainings of one process are in the record, of which curves have the last.
    """

    def __init__(self, most: int | None = None, size: int = 0) -> None:
        self.metrics: dict[str, MetricPoints] = {}
        self.layers: dict[str, LayerPoints] = {}
        self._most, self._size = most, size
        self._process, self._line = 0, 0
        self._blocks: dict[Any, Block] = {}
        self._seen: set[tuple[str, str]] = set()
        self.repeated, self._goes_back = False, False
        self._begin()

    def begin_process(self) -> None:
        """Begin with the lines of another process, which may log steps again that came after its checkpoint."""
        self._process += 1
        self._goes_back = False
        self._begin()

    def _block_at(self, key: Any, step: int) -> Block | None:
        """Return the block that a row at a step continues, or None for a row that begins one.

        Steps of the same names that go back are those of another Trainer, which begins at step 0 again; it is read like
        another process.
        """
        block = self._blocks.get(key)
        if block is not None and step < block.steps[-1]:
            self.begin_process()
            self._goes_back, block = True, None
        self.repeated |= self._goes_back and step > 0
        return block

    def _begin(self) -> None:
        self._blocks, self._seen = {}, set()
        self._stride, self._count = 1, 0

    def skips_layers(self, line: bytes) -> bool:
        """Whether a line with values by layer need not be parsed, unless it is the last one."""
        if self._count == 0 and self._most is not None:
            rows = self._size / (_SHARE * len(line))
            self._stride = 2 ** max(0, math.ceil(math.log2(max(rows, 1.0) / (2 * self._most))))
        self._count += 1
        return (self._count - 1) % self._stride != 0

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line of metrics."""
        self._line += 1
        names = tuple(values)
        block = self._block_at(names, step)
        if block is None:
            block = self._blocks[names] = Block(len(names))
            for place, name in enumerate(names):
                curve = self.metrics.setdefault(name, MetricPoints())
                self._continue("metrics", name, curve, block, place, step)
        block.add(self._line, step, values.values())

    def add_layers(self, step: int, columns: Columns, rows: Sequence[Sequence[float]]) -> None:
        """Add a line of values by layer."""
        self._line += 1
        names = tuple((quantity, tuple(layers)) for quantity, layers in columns)
        key = ("layers", names)
        block = self._block_at(key, step)
        if block is None:
            block = self._blocks[key] = Block(sum(len(layers) for _, layers in names))
            start = 0
            for quantity, layers in names:
                curve = self.layers.setdefault(quantity, LayerPoints())
                self._continue("layers", quantity, curve, block, (start, layers), step)
                start += len(layers)
        if self._most is not None and len(block.steps) >= 2 * self._most:
            block.thin()
            self._stride *= 2
        block.add(self._line, step, [value for row in rows for value in row])

    def _continue(self, kind: str, name: str, curve: Points[Any], block: Block, place: Any, step: int) -> None:
        """Continue a curve with a block; at its first step in this process earlier steps may be logged again."""
        if (kind, name) not in self._seen:
            self._seen.add((kind, name))
            if curve._parts:
                curve.restart(self._process, step)
        curve.add_block(self._process, block, place)
