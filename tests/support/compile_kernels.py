"""Compile every GPU kernel as it is launched, for some GPUs, without one.

Run as a script, since the tests import the kernels interpreted. A line has the GPU, the kernel and its bytes of code.
"""

from __future__ import annotations

import sys
from typing import Any

import triton.language as tl
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_normgeo.geometry.products import triton_kernels as kernels
from lightning_normgeo.geometry.products import triton_launches as launches

_POINTERS = {"addresses": "*i64", "columns": "*i64", "first": "*i64", "first_row": "*i64"}
_POINTERS |= {
    "pass_of": "*i32",
    "pass_of_row": "*i32",
    "numbers": "*fp64",
    "out": "*fp64",
    "parts": "*fp64",
    "terms": "*fp64",
}
_KINDS = dict.fromkeys(("WEIGHT", "GRADIENT", "FIRST", "SECOND"), tl.float32)
_SEGMENT = {"SEGMENT": launches.SEGMENT}
_OVER_SEGMENTS = {**_SEGMENT, "BLOCK": 32}


def _weights(rule: int, state: bool, keep: bool, **kinds: Any) -> tuple[Any, dict[str, Any], int]:
    sizes = {**_SEGMENT, "BLOCK": launches._BLOCK[rule]}
    given = {"RULE": rule, "STATE": state, "KEEP": keep, **_KINDS, **kinds, **sizes}
    return kernels.weight_kernel, given, launches._WARPS


KERNELS: list[tuple[Any, dict[str, Any], int]] = [
    *(_weights(rule, state=True, keep=True) for rule in (0, 1, 2)),
    _weights(2, state=False, keep=False, GRADIENT=tl.bfloat16),
    _weights(2, state=True, keep=True, **dict.fromkeys(_KINDS, tl.float64)),
    (
        kernels.update_kernel,
        {"OLD": tl.float32, "NEW": tl.float32, **_SEGMENT, "BLOCK": launches._BLOCK[0]},
        launches._WARPS,
    ),
    (kernels.sum_kernel, {"SUMS": 8, **_OVER_SEGMENTS}, 1),
    (kernels.join_kernel, _OVER_SEGMENTS, 1),
    (
        kernels.rounding_kernel,
        {"ROUNDOFF": 2.0**-24, "TINY": 2.0**-1022, "BLOCK": launches._BLOCK[0]},
        launches._WARPS,
    ),
]
"""Kernels, their constants, and the number of warps of a program."""

for capability in (75, 80, 90):
    for kernel, constants, warps in KERNELS:
        signature = {n: "constexpr" if n in constants else _POINTERS.get(n, "i32") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        made = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        sys.stdout.write(f"{capability} {kernel.__name__} {len(made.asm['cubin'])}\n")
