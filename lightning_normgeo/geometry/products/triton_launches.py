"""Launches of the Triton kernels: tables of addresses and numbers, and the sums of all weights of one step.

This module is imported by :mod:`.compiled` only, which falls back to torch where Triton cannot be imported or cannot
compile. Nothing here waits for the device: tables reach it by asynchronous copies from pinned memory.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.products import triton_kernels as kernels
from lightning_normgeo.geometry.products.rule_numbers import adam_numbers, loop_of, numbers_of, on_device, unscale_of
from lightning_normgeo.geometry.products.weight_pass import WeightPass
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule

SEGMENT = 2**13
"""Elements of a row that one program sums; longer rows are cut into segments, for many programs at once."""
_BLOCK = {0: 1024, 1: 512, 2: 512}
"""Elements that a program has in registers at a time, by the number of the rule."""
_WARPS = 4
_SUMS = {0: 4, 1: 6, 2: 8}
_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_TABLES = 64
"""Number of tables kept on the device; addresses and numbers are often the same in the next measured step."""


class Layout(NamedTuple):
    """Places of the rows of several weights among programs and results, as tables on the device."""

    columns: Tensor
    first: Tensor
    first_row: Tensor
    pass_of: Tensor
    pass_of_row: Tensor
    programs: int
    rows: int
    heights: list[int]


def weight_sums(passes: Sequence[WeightPass]) -> list[Tensor]:
    """Return ‖W‖², ⟨W, g⟩, ‖g‖², ΣW⁴ and the rule's products of each weight, each ``(sums, units)``."""
    return _grouped(passes, [_group_of(one) for one in passes], _weights)


def update_sums(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return ‖W‖², ⟨W, D⟩, ‖D‖² and ‖D_⊥‖² of each weight, each ``(4, units)``."""
    return _grouped(pairs, [(pair[0].device, *(tensor.dtype for tensor in pair)) for pair in pairs], _updates)


def rounding_bounds(terms: Sequence[Tensor], weight_sq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``systematic_floor`` of terms and ‖W‖², each ``(units,)`` and of one dtype, in one launch."""
    columns = torch.stack([*terms, weight_sq])
    out = torch.empty_like(weight_sq, memory_format=torch.contiguous_format)
    launch(
        kernels.rounding_kernel,
        -(-out.numel() // _BLOCK[0]),
        columns,
        out,
        out.numel(),
        ROUNDOFF=torch.finfo(dtype).eps / 2,
        TINY=torch.finfo(out.dtype).tiny,
        BLOCK=_BLOCK[0],
        num_warps=_WARPS,
        device=out.device,
    )
    return out


def launch(kernel: Any, programs: int, *arguments: Any, device: torch.device, **options: Any) -> None:
    """Launch a kernel on a device."""
    with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
        kernel[(programs,)](*arguments, **options)


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's first element."""
    return tensor.data_ptr()


def _group_of(one: WeightPass) -> tuple[Any, ...]:
    """Return a key of the passes that share a launch: those of one kind, and of one rule if its numbers are tensors."""
    dtypes = tuple(tensor.dtype for tensor in (one.weight, one.gradient, *one.state))
    same: Any = None
    if on_device(one):
        same = one.rule, id(one.gradient_scale), getattr(getattr(one.rule, "step", None), "dtype", None)
    return one.weight.device, loop_of(one), one.keep is None, dtypes, same


def _grouped(
    items: Sequence[Any], groups: Sequence[Any], read: Callable[[Sequence[Any]], tuple[Tensor, Layout]]
) -> list[Tensor]:
    """Read items group by group and return the sums of each item, in the order of the items."""
    members: dict[Any, list[int]] = defaultdict(list)
    for k, group in enumerate(groups):
        members[group].append(k)
    found: dict[int, Tensor] = {}
    for some in members.values():
        sums, layout = read([items[k] for k in some])
        found.update(zip(some, torch.split(sums, layout.heights, dim=1), strict=True))
    return [found[k] for k in range(len(items))]


def _weights(passes: Sequence[WeightPass]) -> tuple[Tensor, Layout]:
    """Return the sums of weights that share a launch, ``(sums, rows)``."""
    one = passes[0]
    rule = loop_of(one)
    layout = _layout(tuple(tuple(other.weight.shape) for other in passes), one.weight.device)
    # where a pass has no state or keeps no copy, the kernel does not read the address
    sources = [(p.weight, p.gradient, *(*p.state, p.weight, p.weight)[:2], p.weight if p.keep is None else p.keep)
               for p in passes]  # fmt: skip
    dtypes = [_DTYPES[tensor.dtype] for tensor in sources[0]]
    out = torch.empty(_SUMS[rule], layout.programs, dtype=torch.float64, device=one.weight.device)
    launch(
        kernels.weight_kernel,
        layout.programs,
        _addresses(sources, one.weight.device),
        _numbers(passes),
        layout.columns,
        layout.first,
        layout.pass_of,
        out,
        len(passes),
        layout.programs,
        RULE=rule,
        STATE=bool(one.state),
        KEEP=one.keep is not None,
        WEIGHT=dtypes[0],
        GRADIENT=dtypes[1],
        FIRST=dtypes[2],
        SECOND=dtypes[3],
        SEGMENT=SEGMENT,
        BLOCK=_BLOCK[rule],
        num_warps=_WARPS,
        device=one.weight.device,
    )
    return _over_segments(kernels.sum_kernel, out, layout, SUMS=len(out)), layout


def _updates(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Layout]:
    """Return the products of updates that share a launch, ``(4, rows)``."""
    old, new = pairs[0]
    layout = _layout(tuple(tuple(pair[0].shape) for pair in pairs), old.device)
    out = torch.empty(4, layout.programs, dtype=torch.float64, device=old.device)
    launch(
        kernels.update_kernel,
        layout.programs,
        _addresses(pairs, old.device),
        layout.columns,
        layout.first,
        layout.pass_of,
        out,
        len(pairs),
        layout.programs,
        OLD=_DTYPES[old.dtype],
        NEW=_DTYPES[new.dtype],
        SEGMENT=SEGMENT,
        BLOCK=_BLOCK[0],
        num_warps=_WARPS,
        device=old.device,
    )
    return _over_segments(kernels.join_kernel, out, layout), layout


def _over_segments(kernel: Any, parts: Tensor, layout: Layout, **options: int) -> Tensor:
    """Return the sums of whole rows from those of their segments."""
    if layout.programs == layout.rows:
        return parts
    out = torch.empty(len(parts), layout.rows, dtype=torch.float64, device=parts.device)
    launch(
        kernel,
        layout.rows,
        parts,
        layout.columns,
        layout.first,
        layout.first_row,
        layout.pass_of_row,
        out,
        layout.programs,
        layout.rows,
        SEGMENT=SEGMENT,
        BLOCK=32,
        num_warps=1,
        device=parts.device,
        **options,
    )
    return out


def _numbers(passes: Sequence[WeightPass]) -> Tensor:
    """Return the numbers of all passes, ``(numbers, passes)``: a table of the host, or columns made on the device."""
    first, device = passes[0], passes[0].weight.device
    if not on_device(first):
        return _table(tuple(tuple(map(float, numbers_of(one))) for one in passes), torch.float64, device)
    if isinstance(first.rule, AdamRule) and isinstance(first.rule.step, Tensor):
        steps = torch.stack([one.rule.step for one in passes])  # type: ignore[union-attr]
        numbers = (unscale_of(first), *adam_numbers(first.rule, steps, has_state=bool(first.state)))
    else:
        numbers = numbers_of(first)
    return torch.stack([_column(number, len(passes), device) for number in numbers])  # one kernel for equal dtypes


def _column(number: Scalar, length: int, device: torch.device) -> Tensor:
    """Return a number, or one for each of several weights, as a column on a device."""
    if isinstance(number, Tensor):
        return number.to(torch.float64).expand(length)
    return _table(((number,),), torch.float64, device)[0].expand(length)


def _addresses(sources: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Return the addresses of tensors as a table, ``(kinds of tensors, passes)``."""
    return _table(tuple(tuple(map(address, tensors)) for tensors in sources), torch.int64, device)


@functools.lru_cache(maxsize=_TABLES)
def _table(columns: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers of the host on a device, transposed."""
    return _sent(torch.tensor(columns, dtype=dtype).T.contiguous(), device)


@functools.lru_cache(maxsize=16)
def _layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Layout:
    """Return the layout of weights of given shapes; cached, since they rarely change between steps."""
    heights = [height for height, _ in shapes]
    programs = [height * -(-width // SEGMENT) for height, width in shapes]
    order = torch.arange(len(shapes), dtype=torch.int32)
    tables = {
        "columns": torch.tensor([width for _, width in shapes]),
        "first": torch.tensor([0, *itertools.accumulate(programs)]),
        "first_row": torch.tensor([0, *itertools.accumulate(heights)]),
        "pass_of": order.repeat_interleave(torch.tensor(programs), output_size=sum(programs)),
        "pass_of_row": order.repeat_interleave(torch.tensor(heights), output_size=sum(heights)),
    }
    sent = {name: _sent(table, device) for name, table in tables.items()}
    return Layout(**sent, programs=sum(programs), rows=sum(heights), heights=heights)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Return values of the host on a device, by an asynchronous copy from pinned memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
