"""Names of parameters and modules as metric keys and reports show them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)
_ORIGINAL = re.compile(r"^(.*\.|)parametrizations\.(\w+)\.original(\d+)$")
_PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.(?:original\d*)$")


def clean_name(name: str) -> str:
    """Return the name of a parameter or module without the infix ``_orig_mod`` that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def layer_name(name: str) -> str:
    """Return the module path for a parameter called ``weight``, parametrized or not; any other name unchanged."""
    return _PARAMETRIZED.sub(r".\1", clean_name(name)).removesuffix(".weight")


def bias_of(name: str) -> str:
    """Return the name of the bias of the same layer; the layer need not have one."""
    return f"{layer_name(name)}.bias"


def by_clean_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return the parameters by the names that units and metric keys use, each parameter once.

    A weight keeps the name ``weight`` when ``torch.nn.utils`` prunes it (stored as ``weight_orig``) or normalizes it
    (stored as ``weight_v`` and ``weight_g``). Where a parametrization computes the weight from several parameters,
    these are named ``weight.original0``, ``weight.original1``, ...; for torch's weight normalization the direction v
    counts as the weight.
    """
    parameters = _without_infix(named)
    return dict(zip(_kept_names(parameters), parameters.values(), strict=True))


def named_weights(module: nn.Module, frozen: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters that have rows, under clean names; with ``frozen`` also the frozen ones.

    Vectors (γ, β, biases) are left out, and so are parameters with one number per row: the lengths g of weight
    normalization and layer scales.
    """
    own = _without_infix(module.named_parameters())
    for (name, parameter), kept in zip(own.items(), _kept_names(own), strict=True):
        if has_rows(parameter) and not _is_length(name, own) and (parameter.requires_grad or frozen):
            yield kept, parameter


def has_rows(parameter: Tensor) -> bool:
    """Whether a parameter has rows of more than one number."""
    return parameter.ndim >= 2 and parameter.numel() > parameter.shape[0]


def _without_infix(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    return {clean_name(name): parameter for name, parameter in named}


def _kept_names(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return a name for each parameter; no two get the same."""
    found: dict[str, str] = {}
    for name in parameters:
        kept = _kept_name(name, parameters)
        found[name if kept in parameters or kept in found else kept] = name
    return list(found)


def _kept_name(name: str, parameters: Mapping[str, Tensor]) -> str:
    """Return the clean name of a parameter as in :func:`by_clean_name`; another parameter may have the same."""
    factor = _ORIGINAL.match(name) if "parametrizations." in name else None
    if factor is not None:
        direction = _is_length(name[: -len(factor[3])] + "0", parameters)
        return name if direction else f"{factor[1]}{factor[2]}.original{factor[3]}"
    if name.endswith("_orig"):
        return name.removesuffix("_orig")
    if name.endswith("_v") and _is_length(f"{name[:-2]}_g", parameters):
        return name.removesuffix("_v")
    return name


def _is_length(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a parameter holds the row lengths g of torch's weight normalization, in its old or its new form."""
    for ending, other in (("original0", "original1"), ("_g", "_v")):
        if not name.endswith(ending) or name not in parameters:
            continue
        length, direction = parameters[name], parameters.get(name.removesuffix(ending) + other)
        if direction is None:
            continue
        one_each = all(size in (1, full) for size, full in zip(length.shape, direction.shape, strict=False))
        if length.ndim in (0, direction.ndim) and one_each and length.numel() < direction.numel():
            return True
    return False
