"""The autograd graph of one forward pass, as the trace of what a model computes."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.zero_constants import ZeroConstants
from lightning_normgeo.normalization.user_inputs import misfit
from lightning_normgeo.utilities.checked_values import first_line

Node = Any
"""An autograd node; torch has no public type for the C++ ones."""
Edge = tuple[Node, int]
"""A node, and which of its outputs; in the lists of readers: which of its inputs."""


class Graph:
    """The autograd graph below some tensors, with the edges turned round: who reads what a node produced.

    Args:
        results: the loss, or all that one is made of.
        stand_ins: names by id of what a model computed with, where that is not its parameters (``fully_shard``).
        zeros: nodes of operations whose constants are known to be zero (:class:`ZeroConstants`).

    Attributes:
        readers: for each node and output the readers and the position at which they read it.
        sources: for each node what it reads; for an opened checkpoint what it returns, by output.
        leaves: the nodes of parameters.
        results: the nodes and outputs that the tensors came from.
        order: an index for each node; what reads another node has a larger one.
        outputs: which outputs of a node are read, or are results.
        inside: what reentrant checkpoints compute, once they were looked into.
    """

    def __init__(self, *results: Tensor, unsharded: dict[int, str] | None = None, zeros: Collection[Node] = ()) -> None:
        self.unsharded = unsharded
        self.zeros = zeros
        self.inside: dict[Node, tuple[Edge, ...] | None] = {}
        edges = [get_gradient_edge(result) for result in results if result.requires_grad]  # of a parameter: its leaf
        self.results = {(edge.node, edge.output_nr) for edge in edges}
        self._start = [edge.node for edge in edges]
        self._walk()

    def _walk(self) -> None:
        self.readers: dict[Edge, list[Edge]] = defaultdict(list)
        self.leaves: list[Node] = []
        self.order: dict[Node, int] = {}
        self.sources: dict[Node, tuple[Edge, ...]] = {}  # torch makes a new tuple each time it is asked
        self.outputs: dict[Node, set[int]] = defaultdict(set)
        finished = itertools.count()
        stack: list[tuple[Node, bool]] = [(node, False) for node in self._start]
        while stack:
            node, done = stack.pop()
            if done:
                self.order[node] = next(finished)
            elif node not in self.order:
                self.order[node] = -1
                stack.append((node, True))
                self.sources[node] = edges = self.inside.get(node) or node.next_functions
                stack += [(source, False) for source, _ in edges if source not in self.order and source]
        self._turn_round()
        for node, output in [*self.readers, *self.results]:
            self.outputs[node].add(output)

    def _turn_round(self) -> None:
        for node in self.order:
            if hasattr(node, "variable"):
                self.leaves.append(node)
            for position, (source, output) in enumerate(self.sources[node]):
                if source is not None:
                    self.readers[source, output].append((node, position))

    def with_inside(self, inside: dict[Node, tuple[Edge, ...] | None]) -> Graph:
        """Return the graph with the insides of reentrant checkpoints in it; None for one that could not be seen."""
        graph = copy.copy(self)
        graph.inside = self.inside | inside
        graph._walk()
        return graph

    @property
    def reentrant(self) -> list[Node]:
        """The reentrant activation checkpoints (``use_reentrant=True``) that nobody looked into."""
        functions: list[Node] = [
            node for node in self.order if isinstance(node, BackwardCFunction) and node not in self.inside
        ]
        return [node for node in functions if node.name() == "CheckpointFunctionBackward"]

    @property
    def hides_reentrant(self) -> bool:
        """Whether what a reentrant activation checkpoint computes is not seen."""
        return bool(self.reentrant) or None in self.inside.values()

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """What was computed from which leaves: equal for two forward passes that ran the same operations."""
        return tuple(
            (
                node.name(),
                id(node.variable) if hasattr(node, "variable") else _constants(node),
                tuple((self.order.get(source), output) for source, output in self.sources[node]),
            )
            for node in self.order
        )

    @property
    def anonymous(self) -> bool:
        """Whether something stands in for the parameters, and the name of none of it is known."""
        return self.unsharded is not None and not any(id(leaf.variable) in self.unsharded for leaf in self.leaves)

    @property
    def compiled(self) -> bool:
        """Whether part of the graph is one opaque node made by torch.compile."""
        return any("CompiledFunction" in node.name() for node in self.order)


_CONSTANTS: dict[str, tuple[str, ...]] = {}


def _constants(node: Node) -> tuple[Any, ...]:
    """Return what a node keeps besides tensors: those have a raw form as well, and are not to be unpacked."""
    kind = node.name()
    if kind not in _CONSTANTS:
        names = dir(type(node))
        _CONSTANTS[kind] = tuple(n for n in names if n.startswith("_saved_") and f"_raw{n}" not in names)
    values = (getattr(node, name) for name in _CONSTANTS[kind])
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def traced_graph(module: nn.Module, example_batch: Any) -> Graph:
    """Return the graph of one forward pass (:func:`trace`), with the constants in it that are zero."""
    constants = ZeroConstants()
    with constants:
        results = trace(module, example_batch)
    return Graph(*results, zeros=constants.nodes)


def trace(module: nn.Module, example_batch: Any) -> list[Tensor]:
    """Run one forward pass and return all outputs that have a gradient, leaving no trace in the module.

    Buffers are replaced by copies for the time of the call, random number generators are put back, ``.grad`` is not
    touched. The module runs in the mode it is in.

    Args:
        module: any module.
        example_batch: its input; a tuple holds positional and a dict keyword arguments.

    Raises:
        ConfigurationError: where the module cannot take the batch, or returns nothing that depends on parameters.
    """
    kwargs = example_batch if isinstance(example_batch, dict) else {}
    args = example_batch if isinstance(example_batch, tuple) else () if kwargs else (example_batch,)
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    with torch.inference_mode(False), torch.random.fork_rng(sorted(devices, key=str)), torch.enable_grad():
        try:
            # each under one name of its module: torch would leave copies behind in modules that have two
            outputs = functional_call(module, _copied_buffers(module), args, kwargs, tie_weights=False)
        except Exception as error:
            advice = misfit(module, example_batch) or (
                "Give one batch as its forward takes it, without labels; a tuple holds several positional, a dict "
                "keyword arguments."
            )
            raise ConfigurationError(
                f"{type(module).__name__} cannot take the example batch ({_describe(example_batch)}): "
                f"{first_line(error)}. {advice}"
            ) from error
        found = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found:
        raise ConfigurationError(
            f"{type(module).__name__} returned {_describe(outputs)}, which depends on no trainable parameter. Return "
            "the tensors that the loss is made of, and unfreeze the parameters to be looked at."
        )
    return found


def _copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    copies: dict[int, Tensor] = {}
    return {
        name: copies.setdefault(id(buffer), buffer.clone())
        for path, child in module.named_modules()
        for name, buffer in child.named_buffers(path, recurse=False)
    }


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module, to a submodule, or to the LightningModule itself."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or type(child).__name__ == "OptimizedModule"
        for child in module.modules()
    )


def _describe(value: Any) -> str:
    """Return the shapes in a batch, or its type."""
    shapes = [str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return f"shape {', '.join(shapes)}" if shapes else type(value).__name__
