"""Batch normalizations with running statistics, and how a symmetry scales what they normalize."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.normalization.autograd.graph import Node
from lightning_normgeo.normalization.autograd.nodes import name_of
from lightning_normgeo.normalization.names import clean_name
from lightning_normgeo.symmetries.degrees.nodes import BATCH_NORMS
from lightning_normgeo.symmetries.equations.exponents import Ids

_REACH = 8
"""The largest number of nodes between a batch normalization and the output of its module."""


def with_statistics(module: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules that have a running mean and variance, by clean name."""
    return {
        clean_name(name): child
        for name, child in module.named_modules()
        if isinstance(getattr(child, "running_mean", None), Tensor)
        and isinstance(getattr(child, "running_var", None), Tensor)
    }


class ForwardHooks:
    """Context in which modules have hooks; a subclass registers them on entry, in ``_handles``."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()


class BatchNormNodes(ForwardHooks):
    """Context in which a forward pass notes the autograd node of each batch normalization with running statistics.

    Args:
        module: owner of the batch normalizations.

    Attributes:
        nodes: by module path; None where it was not found, as inside a reentrant checkpoint. Modules that did not run
            or depend on no parameter are left out.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.nodes: dict[str, Node | None] = {}
        self._module = module

    def __enter__(self) -> BatchNormNodes:
        for name, child in with_statistics(self._module).items():
            self._handles.append(child.register_forward_hook(self._hook(name)))
        return self

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            constant = torch.is_grad_enabled() and not (isinstance(output, Tensor) and output.requires_grad)
            if not constant:
                self.nodes[name] = nearest_node(getattr(output, "grad_fn", None), _is_batch_norm)

        return note


def _is_batch_norm(node: Node) -> bool:
    return name_of(node) in BATCH_NORMS


def nearest_node(node: Node, accepts: Callable[[Node], bool], before: Node = None) -> Node | None:
    """Return the nearest node that has computed a tensor and is accepted, behind the one that made the input."""
    waiting = [node]
    for _ in range(_REACH):
        waiting = [found for found in waiting if found is not None and found is not before]
        for found in waiting:
            if accepts(found):
                return found
        waiting = [source for found in waiting for source, _ in found.next_functions]
    return None


def input_exponents(
    nodes: Mapping[str, Node | None],
    channels: Mapping[Node, Ids],
    widths: Mapping[str, int],
    basis: csr_array,
) -> dict[str, csr_array | None]:
    """Return exponents of the inputs of batch normalizations, each of shape (generators, channels).

    Args:
        nodes: node of each batch normalization by module path.
        channels: unknown exponents of the channels of their inputs, by node.
        widths: number of channels by module path; that of an instance normalization is a part of its node's.
        basis: generators of shape (generators, unknowns).
    """
    return {
        name: None if node is None else basis[:, channels[node][: widths[name]]].tocsr()
        for name, node in nodes.items()
        if node is None or node in channels  # no result depends on the others
    }


def widths_of(module: nn.Module) -> dict[str, int]:
    """Return the number of channels of each batch normalization with running statistics."""
    return {name: int(cast(Tensor, child.running_mean).numel()) for name, child in with_statistics(module).items()}


def channel_means(inputs: Sequence[Tensor]) -> Tensor:
    """Return the mean of each channel of the first input of a batch normalization."""
    first = on_observing_device(inputs[0].detach())
    return first.double().mean([axis for axis in range(first.ndim) if axis != 1])
