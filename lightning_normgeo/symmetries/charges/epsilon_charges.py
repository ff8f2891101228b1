"""Charges that the ε of normalization layers causes, exactly, for symmetries of any number of layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_normgeo.geometry.charges import epsilon_part
from lightning_normgeo.normalization.autograd.compiled_modules import check_not_compiled
from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.autograd.tracing import trace
from lightning_normgeo.normalization.autograd.zero_constants import ZeroConstants
from lightning_normgeo.normalization.user_inputs import as_example, check_module
from lightning_normgeo.symmetries.rules.context import Absorption
from lightning_normgeo.symmetries.search import symmetries_of
from lightning_normgeo.symmetries.solution import Solution, solve
from lightning_normgeo.symmetries.symmetries import Symmetries
from lightning_normgeo.symmetries.transformations.batch_norms import ForwardHooks, nearest_node

_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)


@dataclass
class _Call:
    """One call of a normalization layer."""

    layer: nn.Module
    input: Tensor
    node: Node
    before: Node
    part: Tensor | None = None


class _Calls(ForwardHooks):
    """Context in which the calls of all normalization layers are recorded, and the parts of ε in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: list[_Call] = []
        self._layers = [
            layer for layer in module.modules() if isinstance(layer, _LAYERS) and not isinstance(layer, _InstanceNorm)
        ]

    def __enter__(self) -> _Calls:
        self._handles = [layer.register_forward_hook(self._note) for layer in self._layers]
        return self

    def _note(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.grad_fn is not None:
            call = _Call(layer, inputs[0].detach(), output.grad_fn, inputs[0].grad_fn)
            self.found.append(call)
            output.register_hook(lambda gradient: self._read(call, gradient))  # type: ignore[no-untyped-call]

    def _read(self, call: _Call, gradient: Tensor) -> None:
        part = _part(call.layer, call.input, gradient.detach())
        call.part = part if call.part is None else call.part + part


def epsilon_charges(
    module: nn.Module, example_batch: Any, loss: Callable[[Any], Tensor]
) -> tuple[Symmetries, npt.NDArray[np.float64]]:
    r"""Return the symmetries of a network, and the charge of each generator that the ε of its normalizations causes.

    Symmetries take ε as zero. With ε a charge is exactly the sum over the normalizations that remove the scale, see
    :func:`lightning_normgeo.geometry.epsilon_part`; what remains of a measured charge after its subtraction is
    rounding. Covered are the layers ``LayerNorm``, ``GroupNorm``, ``RMSNorm`` and ``BatchNorm`` of torch. Generators
    whose scale another normalization removes, too, have NaN.

    The module runs one forward and backward pass in its current mode. Buffers, ``.grad`` and random number generators
    are left as they were; with dropout the charges are those of the drawn masks.

    Args:
        module: any module.
        example_batch: its input, as for :func:`scale_symmetries`.
        loss: function of the module's outputs.

    Returns:
        The symmetries, and one number per generator, in units of loss.

    Raises:
        ConfigurationError: for a compiled module, and for a batch that the module does not accept.

    Example:
        >>> import torch
        >>> from lightning_normgeo.symmetries import epsilon_charges
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5, eps=0.1)).double()
        >>> x, target = torch.randn(8, 4).double(), torch.randn(8, 5).double()
        >>> loss = lambda y: (y - target).square().mean()
        >>> symmetries, parts = epsilon_charges(network, x, loss)
        >>> loss(network(x)).backward()
        >>> charges = symmetries.charges(dict(network.named_parameters()))
        >>> bool(abs(charges).max() > 1e-3), bool(abs(charges - parts).max() < 1e-15)
        (True, True)
    """
    check_module("epsilon_charges(module, example_batch, loss)", module)
    check_not_compiled("epsilon_charges", module)
    constants = ZeroConstants()
    with _Calls(module) as calls:
        with constants:
            (result,) = trace(module, as_example(module, example_batch), loss)
        found = solve(Graph(result, constants=constants.records()), module)
        by_node = _by_absorption(found, calls.found)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        torch.autograd.grad(result.sum(), parameters, allow_unused=True)
    return symmetries_of(found), _summed(found, by_node)


def _by_absorption(found: Solution, calls: list[_Call]) -> dict[Node, list[_Call]]:
    """Return the calls of layers by the node that removes the scale, which lies inside the layer."""
    nodes = {one.node for one in found.degrees.absorbed}
    by_node: dict[Node, list[_Call]] = defaultdict(list)
    for call in calls:
        node = nearest_node(call.node, nodes.__contains__, call.before)
        if node is not None:
            by_node[node].append(call)
    return by_node


def _summed(found: Solution, by_node: Mapping[Node, list[_Call]]) -> npt.NDArray[np.float64]:
    charges = np.zeros(found.basis.shape[0])
    for one in found.degrees.absorbed:
        degrees = found.basis[:, one.exponents.ravel()] * one.factor
        parts = [call.part for call in by_node.get(one.node, ()) if call.part is not None]
        if parts:
            charges += degrees @ _over_alike(one, parts[0])
        else:
            charges[np.diff(degrees.tocsr().indptr) > 0] = np.nan
    return charges


def _over_alike(one: Absorption, part: Tensor) -> npt.NDArray[np.float64]:
    """Return the parts added up over all statistics of the same degree."""
    values = part.cpu().double().numpy()
    shape = (1,) * (values.ndim - one.exponents.ndim) + one.exponents.shape
    alike = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return np.asarray(values.sum(axis=alike)).reshape(-1)


def _part(layer: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """Return the part of ε for each statistic of a layer, in the shape in which its rule has their degrees."""
    by_channel = isinstance(layer, nn.GroupNorm | _BatchNorm)
    if layer.weight is not None:
        gamma = layer.weight.detach()
        gradient = gradient * (gamma.view(1, -1, *(1,) * (x.ndim - 2)) if by_channel else gamma)
    if isinstance(layer, nn.GroupNorm):
        shape = (x.shape[0], layer.num_groups, x.shape[1] // layer.num_groups, *x.shape[2:])
        return epsilon_part(x.reshape(shape), gradient.reshape(shape), layer.eps, range(2, len(shape)))
    if isinstance(layer, _BatchNorm):
        return epsilon_part(x, gradient, layer.eps, [axis for axis in range(x.ndim) if axis != 1])
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    axes = range(x.ndim - len(layer.normalized_shape), x.ndim)
    return epsilon_part(x, gradient, eps, axes, centered=not isinstance(layer, nn.RMSNorm))
