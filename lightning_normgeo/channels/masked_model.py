"""A network with some channels masked, for the time of a context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.probes.batch_norm.layers import affine_batch_norms
from lightning_normgeo.robustness.model.parameter_swap import ParameterSlot, swapped_parameters
from lightning_normgeo.utilities.checked_values import entry_of, nearest

Replacement = Literal["zero", "mean", "partner"]
REPLACEMENTS: dict[str, str] = {
    "zero": "γ = β = 0: the output is zero, as network slimming does it",
    "mean": "γ = 0: the output is β, its mean over the training data",
    "partner": "the output is a multiple of that of the most similar channel that is kept",
}
"""What a masked channel's output becomes, by name."""


class Partners(NamedTuple):
    """Replacements of the channels of a layer by others.

    Attributes:
        channel: ``(channels,)``, the channel that is read in its place, itself where it is kept.
        factor: ``(channels,)``, the factor of that channel's output, 1 where it is kept.
    """

    channel: Tensor
    factor: Tensor


@contextmanager
def masked_channels(
    module: nn.Module,
    keep: Mapping[str, Tensor],
    replace: str = "zero",
    partners: Mapping[str, Partners] | None = None,
) -> Iterator[None]:
    """Context in which channels of batch normalizations are masked; afterwards the very same parameters are back.

    Args:
        module: the network.
        keep: for each batch normalization by module path which channels are kept, ``(channels,)``; others are left
            alone.
        replace: what a masked channel's output becomes, one of :data:`REPLACEMENTS`.
        partners: for ``partner``, what takes the place of each channel, by module path.

    Raises:
        ConfigurationError: for an unknown layer, a mask of another length, an unknown replacement, and ``partner``
            without partners.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).eval()
        >>> with masked_channels(network, {"1": torch.tensor([True, False, True])}), torch.no_grad():
        ...     network(torch.ones(1, 2))[0, 1]
        tensor(0.)
    """
    entry_of("replace", replace, REPLACEMENTS, REPLACEMENTS)
    norms = affine_batch_norms(module)
    with ExitStack() as stack:
        places: list[ParameterSlot] = []
        for name, mask in keep.items():
            layer = _layer(norms, name, mask)
            if replace == "partner":
                if partners is None or name not in partners:
                    raise ConfigurationError(f"replace='partner' needs the partners of the channels of {name!r}.")
                hook = partial(_read_partners, partners[name])
                stack.callback(layer.register_forward_hook(hook).remove)
            else:
                places += _masked(layer, mask, ("weight", "bias") if replace == "zero" else ("weight",))
        stack.enter_context(swapped_parameters(places))
        yield


def _layer(norms: Mapping[str, _BatchNorm], name: str, mask: Tensor) -> _BatchNorm:
    if name not in norms:
        raise ConfigurationError(f"keep has {name!r}, which is no batch normalization with γ; {nearest(name, norms)}.")
    if mask.shape != norms[name].weight.shape or mask.dtype != torch.bool:
        raise ConfigurationError(
            f"The mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}. Give one bool for each of its "
            f"{norms[name].num_features} channels, True for those to keep."
        )
    return norms[name]


@torch.no_grad()
def _masked(layer: _BatchNorm, mask: Tensor, names: tuple[str, ...]) -> list[ParameterSlot]:
    places: list[ParameterSlot] = []
    for name in names:
        own = layer._parameters[name]
        assert own is not None  # noqa: S101
        zeroed = torch.where(mask.to(own.device), own, torch.zeros_like(own))
        places.append((layer._parameters, name, nn.Parameter(zeroed, requires_grad=own.requires_grad)))
    return places


def _read_partners(partners: Partners, layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
    factor = partners.factor.to(output).view(-1, *[1] * (output.ndim - 2))
    return output.index_select(1, partners.channel.to(output.device)) * factor
