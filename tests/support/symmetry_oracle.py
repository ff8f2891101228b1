"""Numerical oracle of scale symmetries: the null space of θ ⊙ ∇L over many random parameters and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_normgeo.symmetries import Symmetries, scale_symmetries

Matrix = npt.NDArray[np.float64]
_NO_EPSILON = 1e-60
_DEAD = 1e-8  # a channel without variance, whose normalization is decided by ε


@dataclass(frozen=True)
class Verdict:
    """A search compared with the oracle.

    Attributes:
        found: number of generators.
        rank: number of linearly independent generators.
        existing: number of independent symmetries that the gradients show.
        residual: largest charge of any generator on any draw, relative to ‖s‖·‖θ ⊙ ∇L‖.
        gap: ratio of the smallest singular value that is not zero to the largest that is.
    """

    found: int
    rank: int
    existing: int
    residual: float
    gap: float


def prepared(network: nn.Module) -> nn.Module:
    """Return a network in double precision, with the ε of all its normalizations at nearly zero."""
    for layer in network.modules():
        if isinstance(getattr(layer, "eps", None), float | None) and hasattr(layer, "eps"):
            layer.eps = _NO_EPSILON
    return network.double()


def randomize(network: nn.Module, seed: int) -> None:
    """Draw all parameters and the running statistics anew, frozen parameters included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.7 + 0.1)
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype) + 0.5)
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))


def some_loss(outputs: Any) -> Tensor:
    """Return a random function of the outputs that has no symmetry itself."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([(torch.randn_like(leaf) * F.softplus(leaf)).sum() for leaf in leaves]).sum()


def products(network: nn.Module, data: Any, loss: Callable[[Any], Tensor] = some_loss) -> Matrix:
    """Return θ ⊙ ∇L of all trainable parameters, one behind the other."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    arguments = data if isinstance(data, tuple) else (data,)
    gradients = torch.autograd.grad(loss(network(*arguments)), parameters, allow_unused=True)
    parts = [
        torch.zeros_like(p) if gradient is None else p * gradient
        for p, gradient in zip(parameters, gradients, strict=True)
    ]
    return torch.cat([part.detach().flatten() for part in parts]).numpy()


def draws(
    network: nn.Module, data: Callable[[], Any], count: int, loss: Callable[[Any], Tensor] = some_loss
) -> Iterator[Matrix]:
    """Yield normalized θ ⊙ ∇L of random parameters and inputs; draws with a dead channel are left out.

    A channel without variance in front of a normalization is divided by the root of ε, which decides about its scale.
    """
    smallest = [1.0]
    hooks = [layer.register_forward_pre_hook(_watch(smallest)) for layer in network.modules() if _normalizes(layer)]
    given = 0
    for seed in range(10 * count):
        if given == count:
            break
        randomize(network, seed)
        torch.manual_seed(seed)
        smallest[0] = 1.0
        found = products(network, data(), loss)
        size = np.linalg.norm(found)
        if smallest[0] > _DEAD and np.isfinite(size) and size > 0:
            given += 1
            yield found / size
    for hook in hooks:
        hook.remove()
    assert given == count


def _normalizes(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm)


def _watch(smallest: list[float]) -> Callable[[nn.Module, Any], None]:
    def hook(layer: nn.Module, inputs: Any) -> None:
        x = inputs[0].detach()
        if isinstance(layer, nn.GroupNorm):
            x = x.reshape(len(x) * layer.num_groups, -1)
        elif "Instance" in type(layer).__name__:
            x = x.flatten(0, 1).flatten(1)
        elif layer.training:
            x = x.transpose(0, 1).flatten(1)
        else:
            return
        smallest[0] = min(smallest[0], float(x.var(-1).min()))

    return hook


def elementwise(symmetries: Symmetries, network: nn.Module) -> Matrix:
    """Return the exponent of each element of the trainable parameters under each generator."""
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    starts = dict(zip(trainable, np.cumsum([0, *(p.numel() for p in trainable.values())]).tolist(), strict=False))
    result = np.zeros((len(symmetries), sum(p.numel() for p in trainable.values())))
    exponents = symmetries.exponents.toarray()
    for own in symmetries.slices:
        name = _full_name(own.parameter, trainable)
        for generator in range(len(symmetries)):
            spread = np.broadcast_to(own.spread(exponents[generator, own.start : own.stop]), own.shape).ravel()
            result[generator, starts[name] : starts[name] + spread.size] += spread
    return result


def _full_name(name: str, parameters: dict[str, nn.Parameter]) -> str:
    """Return the name in ``named_parameters`` of a parameter, which a clean name may have shortened."""
    if name in parameters:
        return name
    path, _, last = name.rpartition(".")
    parametrized = f"{path}.parametrizations.{last}" if path else f"parametrizations.{last}"
    (found,) = [
        full
        for full in (f"{name}_v", f"{name}_orig", f"{parametrized}.original1", f"{parametrized}.original")
        if full in parameters
    ]
    return found


def verdict(
    network: nn.Module, data: Callable[[], Any], loss: Callable[[Any], Tensor] | None = None, more: float = 1.15
) -> Verdict:
    """Search for the symmetries of a prepared network, and compare them with the oracle.

    Args:
        network: a network with few parameters.
        data: returns a new random input.
        loss: of the search and the oracle. Default: any loss for the search, a random one for the oracle.
        more: number of draws for each parameter.
    """
    randomize(network, 0)
    torch.manual_seed(0)
    symmetries = scale_symmetries(network, data(), loss)
    exponents = elementwise(symmetries, network)
    count = exponents.shape[1]
    drawn = np.stack(list(draws(network, data, int(more * count) + 30, loss or some_loss)))
    values = np.linalg.svd(drawn, compute_uv=False)
    zero = values < 1e-9 * values[0]
    lengths = np.linalg.norm(exponents, axis=1)
    residual = np.abs(drawn @ exponents.T / lengths).max() if len(exponents) else 0.0
    largest_zero = max(values[zero].max(initial=0.0), 1e-17 * values[0])
    return Verdict(
        len(symmetries),
        int(np.linalg.matrix_rank(exponents)) if len(exponents) else 0,
        int(zero.sum()),
        float(residual),
        float(values[~zero].min() / largest_zero),
    )
