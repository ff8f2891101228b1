"""Names of parameters and modules, as metric keys and reports show them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)
_ORIGINAL = re.compile(r"^(.*\.|)parametrizations\.(\w+)\.original(\d+)$")
_PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.(?:original\d*)$")


def clean_name(name: str) -> str:
    """Return a parameter or module name without the infix that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def layer_name(name: str) -> str:
    """Return the module path for ``….weight``, parametrized or not, the whole name for any other parameter."""
    return _PARAMETRIZED.sub(r".\1", clean_name(name)).removesuffix(".weight")


def bias_of(name: str) -> str:
    """Return the name that the bias of the same layer has, if there is one."""
    return f"{layer_name(name)}.bias"


def by_clean_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return parameters by the names that units and metric keys have, each of them once.

    A weight keeps its name when ``torch.nn.utils`` prunes or normalizes it (``weight_orig``, or ``weight_v`` beside
    ``weight_g``). The factors of a weight that a parametrization computes from several parameters are named
    ``weight.original0``, ``weight.original1``; of torch's weight normalization the direction stands for the weight.
    """
    parameters = _without_infix(named)
    return dict(zip(_kept_names(parameters), parameters.values(), strict=True))


def named_weights(module: nn.Module, frozen: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters that are matrices of rows, under clean names; with ``frozen`` also the others.

    Leaves out vectors (γ, β, biases) and what has one number per row: lengths of weight normalization, layer scales.
    """
    own = _without_infix(module.named_parameters())
    for (name, parameter), kept in zip(own.items(), _kept_names(own), strict=True):
        has_rows = parameter.ndim >= 2 and parameter.numel() > parameter.shape[0] and not _is_length(name, own)
        if has_rows and (parameter.requires_grad or frozen):
            yield kept, parameter


def _without_infix(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    return {clean_name(name): parameter for name, parameter in named}


def _kept_names(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return a name for each parameter, no other one's."""
    found: dict[str, str] = {}
    for name in parameters:
        kept = _kept_name(name, parameters)
        found[name if kept in parameters or kept in found else kept] = name
    return list(found)


def _kept_name(name: str, parameters: Mapping[str, Tensor]) -> str:
    """Return the name of the parameter that this one took the place of."""
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
    """Whether a parameter holds the lengths of another one's rows, in torch's weight normalization, old or new."""
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
