"""Loops that read each weight once, compiled by numba, for matrices of float32 and float64 on a CPU.

Sums are float64. Each sum is taken by one thread, always in the same order, so results do not depend on the number of
threads. The threads are Python's, as numba's own may abort the process under fork or concurrent use. This module is
imported by :mod:`.compiled` only, which falls back to torch where numba cannot be imported or cannot compile.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

import numba
import torch
from numba import float64
from torch import Tensor

from lightning_normgeo.geometry.products.rule_numbers import loop_of, numbers_of
from lightning_normgeo.geometry.products.weight_pass import SAFE_DIFFERENCE, WeightPass

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and these loops would take minutes in plain Python")

Kernel = Callable[..., None]
Loop = tuple[Kernel, tuple[Tensor, ...], tuple[Any, ...], int]
"""A kernel, the matrices it reads, its other arguments, and the number of sums it returns for each segment."""

SEGMENT = 2**13
"""Elements of a row that are summed at once; longer rows are cut into segments. A segment stays in cache for a second
reading."""
_CHUNK = 2**19
"""Elements that a thread processes at a time: a call from Python takes as long as reading some 5,000 elements."""
_HELPED = 2**17
"""Elements that are worth another thread."""


def compiled_loop(function: Kernel) -> Kernel:
    """Compile a loop and cache its machine code on disk for the next process, where the disk can be written."""
    # sums may be reordered, but NaN and infinite gradients have to give NaN and infinite sums: neither nnan nor ninf
    return _compiled(function, {"reassoc", "contract", "nsz"})


def exact_loop(function: Kernel) -> Kernel:
    """Compile a loop as :func:`compiled_loop`, but with each operation rounded by itself and in the order written."""
    return _compiled(function, False)


def _compiled(function: Kernel, fastmath: set[str] | bool) -> Kernel:
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


@compiled_loop
def _plain(weight: Any, gradient: Any, keep: Any, numbers: Any, out: Any, at: int, start: int, stop: int) -> None:
    (unscale,) = numbers
    count = -(-weight.shape[1] // SEGMENT)
    for k in range(start, stop):
        row, begin = k // count, k % count * SEGMENT
        w, g = weight[row, begin : begin + SEGMENT], gradient[row, begin : begin + SEGMENT]
        if keep is not None:
            kept = keep[row, begin : begin + SEGMENT]
        weight_sq = inner = gradient_sq = quartic = 0.0
        for i in range(w.size):
            if keep is not None:
                kept[i] = w[i]
            x, y = float64(w[i]), float64(g[i])
            weight_sq += x * x
            inner += x * y
            gradient_sq += y * y
            quartic += (x * x) * (x * x)
        out[0, at + k], out[1, at + k] = weight_sq, unscale * inner
        out[2, at + k], out[3, at + k] = unscale * unscale * gradient_sq, quartic


@compiled_loop
def _sgd(
    weight: Any, gradient: Any, buffer: Any, keep: Any, numbers: Any, out: Any, at: int, start: int, stop: int
) -> None:
    unscale, by_gradient, by_weight, by_buffer = numbers
    count = -(-weight.shape[1] // SEGMENT)
    for k in range(start, stop):
        row, begin = k // count, k % count * SEGMENT
        w, g = weight[row, begin : begin + SEGMENT], gradient[row, begin : begin + SEGMENT]
        b = buffer[row, begin : begin + SEGMENT]
        if keep is not None:
            kept = keep[row, begin : begin + SEGMENT]
        weight_sq = inner = gradient_sq = quartic = buffer_inner = direction_sq = 0.0
        for i in range(w.size):
            if keep is not None:
                kept[i] = w[i]
            x, y, z = float64(w[i]), float64(g[i]), float64(b[i])
            direction = by_gradient * y + by_weight * x + by_buffer * z
            weight_sq += x * x
            inner += x * y
            gradient_sq += y * y
            quartic += (x * x) * (x * x)
            buffer_inner += x * z
            direction_sq += direction * direction
        out[0, at + k], out[1, at + k] = weight_sq, unscale * inner
        out[2, at + k], out[3, at + k] = unscale * unscale * gradient_sq, quartic
        out[4, at + k], out[5, at + k] = buffer_inner, direction_sq


@compiled_loop
def _adam(
    weight: Any,
    gradient: Any,
    mean: Any,
    square: Any,
    keep: Any,
    numbers: Any,
    out: Any,
    at: int,
    start: int,
    stop: int,
) -> None:
    unscale, coupled, old, new, eps, by_gradient, by_mean, by_weight = numbers
    count = -(-weight.shape[1] // SEGMENT)
    for k in range(start, stop):
        row, begin = k // count, k % count * SEGMENT
        w, g = weight[row, begin : begin + SEGMENT], gradient[row, begin : begin + SEGMENT]
        m, v = mean[row, begin : begin + SEGMENT], square[row, begin : begin + SEGMENT]
        if keep is not None:
            kept = keep[row, begin : begin + SEGMENT]
        weight_sq = inner = gradient_sq = quartic = by_g = by_m = by_w = whole_sq = 0.0
        for i in range(w.size):
            if keep is not None:
                kept[i] = w[i]
            x, y, z = float64(w[i]), unscale * float64(g[i]), float64(m[i])
            full = y + coupled * x
            rate = 1.0 / (math.sqrt(old * float64(v[i]) + new * (full * full)) + eps)
            share = x * rate
            whole = (by_gradient * y + by_mean * z + by_weight * x) * rate
            weight_sq += x * x
            inner += x * y
            gradient_sq += y * y
            quartic += (x * x) * (x * x)
            by_g += share * y
            by_m += share * z
            by_w += share * x
            whole_sq += whole * whole
        out[0, at + k], out[1, at + k], out[2, at + k], out[3, at + k] = weight_sq, inner, gradient_sq, quartic
        out[4, at + k], out[5, at + k] = by_gradient * by_g, by_mean * by_m
        out[6, at + k], out[7, at + k] = by_weight * by_w, whole_sq


def _change(new: float, old: float) -> float:
    return new - old


def _across(new: float, old: float, radial: float) -> float:
    return (new - old) - radial * old


# compiled without "reassoc", which may turn the second into new - (1 + ρ) old, where a small update cancels
_change, _across = numba.njit(fastmath={"contract"})(_change), numba.njit(fastmath={"contract"})(_across)


@compiled_loop
def _update(weight: Any, new_weight: Any, out: Any, at: int, start: int, stop: int) -> None:
    count = -(-weight.shape[1] // SEGMENT)
    for k in range(start, stop):
        row, begin = k // count, k % count * SEGMENT
        w, n = weight[row, begin : begin + SEGMENT], new_weight[row, begin : begin + SEGMENT]
        weight_sq = weight_update = update_sq = 0.0
        for i in range(w.size):
            x = float64(w[i])
            change = _change(float64(n[i]), x)
            weight_sq += x * x
            weight_update += x * change
            update_sq += change * change
        radial = weight_update / weight_sq if weight_sq > 0 else weight_update
        tangential_sq = update_sq - radial * weight_update
        # where the update is almost radial the difference cancels, and the segment is read a second time
        if not tangential_sq >= SAFE_DIFFERENCE * update_sq:
            tangential_sq = 0.0
            for i in range(w.size):
                across = _across(float64(n[i]), float64(w[i]), radial)
                tangential_sq += across * across
        out[0, at + k], out[1, at + k], out[2, at + k], out[3, at + k] = (
            weight_sq,
            weight_update,
            update_sq,
            tangential_sq,
        )


def weight_sums(passes: Sequence[WeightPass]) -> list[Tensor]:
    """Return ‖W‖², ⟨W, g⟩, ‖g‖², ΣW⁴ and the rule's products of each weight, each ``(sums, units * segments)``."""
    return _run([_loop(one) for one in passes])


def update_sums(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return ‖W‖², ⟨W, D⟩, ‖D‖² and ‖D_⊥‖² of each weight, each ``(4, units * segments)``."""
    return _run([(_update, pair, (), 4) for pair in pairs])


def _loop(one: WeightPass) -> Loop:
    keep = None if one.keep is None else one.keep.detach().numpy()
    rest = keep, tuple(map(float, numbers_of(one)))
    tensors, loop = (one.weight, one.gradient, *one.state), loop_of(one)
    if loop == 2:
        # at the first step there is no state; its coefficients are zero, so any finite tensor serves in its place
        return _adam, tensors if one.state else (*tensors, one.weight, one.weight), rest, 8
    return (_sgd, tensors, rest, 6) if loop == 1 else (_plain, tensors, rest, 4)


def _run(loops: Sequence[Loop]) -> list[Tensor]:
    """Run loops over matrices in all threads and return the sums of each loop."""
    pieces = [tensors[0].shape[0] * -(-tensors[0].shape[1] // SEGMENT) for _, tensors, _, _ in loops]
    most = max((count for *_, count in loops), default=0)
    sums = torch.empty(most, sum(pieces), dtype=torch.float64)
    out, at, elements = sums.numpy(), 0, 0
    chunks: deque[tuple[Kernel, tuple[Any, ...]]] = deque()
    for (kernel, tensors, rest, _), total in zip(loops, pieces, strict=True):
        arrays = [(tensor.detach() if tensor.requires_grad else tensor).numpy() for tensor in tensors]
        step = max(1, _CHUNK // min(arrays[0].shape[1], SEGMENT))
        for start in range(0, total, step):
            chunks.append((kernel, (*arrays, *rest, out, at, start, min(start + step, total))))
        at, elements = at + total, elements + arrays[0].size
    share(chunks, helpers=min(torch.get_num_threads(), len(chunks), elements // _HELPED) - 1)
    parts = zip(torch.split(sums, pieces, dim=1), loops, strict=True)
    return [part if count == most else part[:count] for part, (*_, count) in parts]


def share(chunks: deque[tuple[Kernel, tuple[Any, ...]]], helpers: int) -> None:
    """Process all chunks in this thread and some helper threads."""
    futures: list[Future[None]] = []
    try:
        futures.extend(_pool(torch.get_num_threads(), os.getpid()).submit(_drain, chunks) for _ in range(helpers))
        _drain(chunks)
    finally:
        chunks.clear()
        wait(futures)
    for future in futures:
        future.result()


def _drain(chunks: deque[tuple[Kernel, tuple[Any, ...]]]) -> None:
    """Process chunks until none is left; several threads may do so at the same time."""
    while True:
        try:
            kernel, arguments = chunks.popleft()
        except IndexError:
            return
        kernel(*arguments)


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the pool of helper threads."""
    del process  # only a key of the cache: threads do not survive a fork, so each process needs its own
    return ThreadPoolExecutor(threads, thread_name_prefix="normgeo")
