"""Compile every GPU kernel for some GPUs, without one; run as a script, since the tests import them interpreted."""

from __future__ import annotations

import sys
from typing import Any

import triton.language as tl
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_normgeo.geometry.products import triton_kernels as kernels

_POINTERS = {"addresses": "*i64", "columns": "*i64", "first": "*i64", "first_row": "*i64"}
_POINTERS |= {"pass_of": "*i32", "pass_of_row": "*i32", "numbers": "*fp64", "out": "*fp64", "parts": "*fp64"}
_KINDS = dict.fromkeys(("WEIGHT", "GRADIENT", "FIRST", "SECOND"), tl.float32)
_SIZES = {"SEGMENT": 2**13, "BLOCK": 512}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    *((kernels.weight_kernel, {"RULE": rule, "STATE": True, "KEEP": True, **_KINDS, **_SIZES}) for rule in (0, 1, 2)),
    (kernels.weight_kernel, {"RULE": 2, "STATE": False, "KEEP": False, **_KINDS, "GRADIENT": tl.bfloat16, **_SIZES}),
    (kernels.update_kernel, {"OLD": tl.float32, "NEW": tl.float32, **_SIZES}),
    (kernels.sum_kernel, {"SUMS": 8, **_SIZES}),
    (kernels.join_kernel, _SIZES),
    (kernels.rounding_kernel, {"ROUNDOFF": 2.0**-24, "TINY": 2.0**-1022, "BLOCK": 1024}),
]

for capability in (75, 80, 90):
    for kernel, constants in KERNELS:
        signature = {n: "constexpr" if n in constants else _POINTERS.get(n, "i32") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        made = compile_kernel(source, target=GPUTarget("cuda", capability, 32))
        sys.stdout.write(f"{capability} {kernel.__name__} {len(made.asm['cubin'])}\n")
