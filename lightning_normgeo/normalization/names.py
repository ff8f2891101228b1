"""Names of parameters and modules, as metric keys and reports show them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.(?:original\d*)$")


def clean_name(name: str) -> str:
    """Return a parameter or module name without the infix that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def site_of(name: str) -> str:
    """Return the module path for ``….weight``, parametrized or not, the whole name for any other parameter."""
    return _PARAMETRIZED.sub(r".\1", clean_name(name)).removesuffix(".weight")


def bias_of(name: str) -> str:
    """Return the name that the bias of the same layer has, if there is one."""
    return f"{site_of(name)}.bias"


def named_weights(module: nn.Module, frozen: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters that are matrices of rows, under clean names; with ``frozen`` also the others.

    Leaves out vectors (γ, β, biases) and what has one number per row: lengths of weight normalization, layer scales.
    """
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        is_length = name.endswith(".original0") and f"{name[:-1]}1" in parameters
        has_rows = parameter.ndim >= 2 and parameter.numel() > parameter.shape[0] and not is_length
        if has_rows and (parameter.requires_grad or frozen):
            yield clean_name(name), parameter
