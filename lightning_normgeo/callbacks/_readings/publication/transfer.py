"""Transfer of the readings of one measured step from the device to the host: one copy, which nothing waits for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.readings import HostValues, Reading


class HostCopy:
    """Values on their way to the host.

    From a CUDA device they are copied to pinned memory behind the work that is queued there, while the host goes on.
    From other devices they are read at once, as they are where the system gives no pinned memory.

    Args:
        values: a flat tensor.
    """

    def __init__(self, values: Tensor) -> None:
        pinned = _pinned_like(values) if values.device.type == "cuda" else None
        self.asynchronous = pinned is not None
        self._values = values if pinned is None else pinned
        if pinned is not None:
            pinned.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[float]:
        """Return the values; waits until they have arrived."""
        if self.asynchronous:
            self._copied.synchronize()
        return self._values.tolist()


def _pinned_like(values: Tensor) -> Tensor | None:
    """Return pinned memory for values; None where there is none, as with a low limit on locked memory."""
    try:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    except RuntimeError:
        return None


class Transfer:
    """The readings of one measured step on their way to the host.

    Args:
        readings: quantities on one device.
        valid: boolean scalars on the device. The step is invalid unless all are true.
    """

    def __init__(self, readings: Sequence[Reading], valid: Sequence[Tensor]) -> None:
        self.readings, self._flags = readings, len(valid)
        parts = [flag.reshape(1) for flag in valid]
        for reading in readings:
            parts += [part.reshape(-1) for part in (reading.total, reading.by_layer) if part is not None]
        wide = next((part.dtype for part in parts if part.is_floating_point()), torch.float64)
        self._copy = HostCopy(torch.cat([part.to(wide) for part in parts]))

    @property
    def asynchronous(self) -> bool:
        """Whether values may still be on their way."""
        return self._copy.asynchronous

    def row(self, chosen: dict[str, frozenset[str]]) -> HostValues | None:
        """Return the row on the host, or None for an invalid step, such as one with gradients that are not finite.

        Args:
            chosen: for each metric group, the layers that get metric keys of their own.
        """
        values = iter(self._copy.wait())
        flags = [next(values) for _ in range(self._flags)]
        if not all(flags):
            return None
        row = HostValues({}, {}, [])
        dropped = [reading.key for reading in self.readings if not _unpack(reading, values, chosen, row)]
        return replace(row, dropped=dropped)


def _unpack(reading: Reading, values: Iterator[float], chosen: dict[str, frozenset[str]], row: HostValues) -> bool:
    """Add one reading to the row; return whether all values that have to be finite are."""
    complete = True
    if reading.total is not None:
        total = next(values)
        if math.isfinite(total):
            row.scalars[reading.key] = total
            if not reading.of_this_process:
                row.watched.append(reading.key)
        else:
            complete = False
    if reading.by_layer is not None:
        by_layer = dict(zip(reading.layers, values))  # noqa: B905  the values of other readings follow
        finite = by_layer
        if not math.isfinite(sum(by_layer.values())):
            finite = {layer: value for layer, value in by_layer.items() if math.isfinite(value)}
        complete = complete and len(finite) == len(by_layer)
        if reading.internal:
            row.internal.setdefault(reading.key, {}).update(finite)  # invariant weights and controls
        else:
            row.layers[reading.key] = finite
            wanted = chosen.get(reading.key.partition("/")[0])
            if wanted:
                some = {f"{reading.key}/{layer}": value for layer, value in finite.items() if layer in wanted}
                row.scalars.update(some)
    return complete or reading.partial or reading.internal
