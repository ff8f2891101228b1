"""Autograd graph of one forward pass, used as a record of the operations that a model has run."""

from __future__ import annotations

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Collection
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from lightning_normgeo.normalization.autograd.constants import Constants
from lightning_normgeo.normalization.autograd.nodes import is_leaf, name_of, shape_of

Node = Any
"""An autograd node; torch has no public type for those written in C++."""
Edge = tuple[Node, int]
"""A node and the index of one of its outputs; in :attr:`Graph.readers` the index of one of its inputs."""


class Graph:
    """The autograd graph of some tensors, with edges in both directions.

    Autograd links each node to the nodes that computed its inputs. The search for units starts at a parameter and
    needs the opposite direction: the nodes that read an output.

    Args:
        results: the loss, or the tensors that it is computed from.
        unsharded: names by id of the unsharded parameters in the graph of a sharded model (``fully_shard``); None for
            other models, whose graphs contain the parameters themselves.
        constants: records of the constants of the forward pass. Default: nothing is known about them.

    Attributes:
        inputs: for each node, the edges of its inputs; for a reentrant checkpoint whose inside was found, the
            edges of its outputs inside it.
        leaves: the nodes of the parameters.
        results: the nodes and outputs that have computed ``results``.
        order: topological index of each node; a node has a larger one than every node that it reads.
        inside: edges of the outputs inside each reentrant checkpoint that was run again; None where that failed.

    Cost: one walk over the graph in Python, and another one for :attr:`readers`; no tensor is read.
    """

    def __init__(
        self,
        *results: Tensor,
        unsharded: dict[int, str] | None = None,
        constants: Constants | None = None,
    ) -> None:
        self.unsharded = unsharded
        self.constants = constants or Constants()
        self.inside: dict[Node, tuple[Edge, ...] | None] = {}
        self._names: dict[Node, str] = {}
        self._shapes: dict[Edge, tuple[int, ...]] = {}
        # unlike ``grad_fn``, which is None for a parameter, the gradient edge of a parameter is its leaf node
        edges = [get_gradient_edge(result) for result in results if result.requires_grad]
        self.results = {(edge.node, edge.output_nr) for edge in edges}
        self._start = [edge.node for edge in edges]
        self._walk()

    def _walk(self) -> None:
        self.order: dict[Node, int] = {}
        # kept, since torch builds a new tuple on each access to next_functions
        self.inputs: dict[Node, tuple[Edge, ...]] = {}
        # A depth-first search numbers each node after all nodes that it reads, which makes the numbers a topological
        # order. It has a stack of its own, since deep networks exceed Python's limit for recursion.
        finished = itertools.count()
        stack: list[tuple[Node, bool]] = [(node, False) for node in self._start]
        while stack:
            node, done = stack.pop()
            if done:
                self.order[node] = next(finished)
            elif node not in self.order:
                self.order[node] = -1  # visited, but the nodes that it reads have no number yet
                stack.append((node, True))
                # a reentrant checkpoint whose inside is known is read through: its outputs come from inside
                self.inputs[node] = edges = self.inside.get(node) or node.next_functions
                stack += [(source, False) for source, _ in edges if source not in self.order and source]
        self.leaves: list[Node] = [node for node in self.order if is_leaf(node)]

    @cached_property
    def readers(self) -> dict[Edge, list[Edge]]:
        """The nodes that read each output of a node, with the input position."""
        readers: dict[Edge, list[Edge]] = defaultdict(list)
        for node in self.order:
            for position, (source, output) in enumerate(self.inputs[node]):
                if source is not None:  # None stands for an input without a gradient, such as the data
                    readers[source, output].append((node, position))
        return readers

    @cached_property
    def outputs(self) -> dict[Node, set[int]]:
        """The outputs of each node that are read or are results."""
        outputs: dict[Node, set[int]] = defaultdict(set)
        for node, output in [*self.readers, *self.results]:
            outputs[node].add(output)
        return outputs

    def with_inside(self, inside: dict[Node, tuple[Edge, ...] | None]) -> Graph:
        """Return a copy of the graph that includes the operations inside reentrant checkpoints.

        Args:
            inside: edges of the outputs of each checkpoint, inside it; None for one that could not be run again.
        """
        graph = copy.copy(self)
        graph.inside = self.inside | inside
        for derived in ("readers", "outputs"):
            graph.__dict__.pop(derived, None)
        graph._walk()
        return graph

    def name_of(self, node: Node) -> str:
        """Return the name of a node's operation; :func:`.nodes.name_of`, which asks torch each time, from a cache."""
        if node not in self._names:
            self._names[node] = name_of(node)
        return self._names[node]

    def shape_of(self, node: Node, output: int = 0) -> tuple[int, ...]:
        """Return the shape of an output of a node, from a cache."""
        edge = node, output
        if edge not in self._shapes:
            self._shapes[edge] = shape_of(node, output)
        return self._shapes[edge]

    @property
    def reentrant(self) -> list[Node]:
        """The reentrant activation checkpoints (``use_reentrant=True``) whose inside has not been determined yet."""
        # only functions written in Python have this base, and asking a node for its name is slower than for its type
        functions: list[Node] = [
            node for node in self.order if isinstance(node, BackwardCFunction) and node not in self.inside
        ]
        return [node for node in functions if node.name() == "CheckpointFunctionBackward"]

    @property
    def hides_reentrant(self) -> bool:
        """Whether the inside of some reentrant activation checkpoint is unknown."""
        return bool(self.reentrant) or None in self.inside.values()

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """Operations, their constants and parameters: equal for two forward passes that ran the same computation.

        Sizes that are those of no parameter, such as the number of samples or tokens, count by the order in which they
        appear: batches of texts of different lengths have the same signature. Units found for one pass are valid for
        another with the same signature.
        """
        leaves = {leaf: id(leaf.variable) for leaf in self.leaves}
        fixed = {1}.union(*(leaf.variable.shape for leaf in self.leaves))
        sizes: dict[int, int] = {}
        place, inputs = self.order.get, self.inputs
        signature: list[Any] = []
        for node in self.order:
            name = node.name()
            own = leaves[node] if node in leaves else _constants(node, name, fixed, sizes)
            signature += name, own, *[(place(source), output) for source, output in inputs[node]]
        return tuple(signature)

    @property
    def anonymous(self) -> bool:
        """Whether the model is sharded and no unsharded parameter in the graph has a known name."""
        return self.unsharded is not None and not any(id(leaf.variable) in self.unsharded for leaf in self.leaves)

    @property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` has replaced part of the graph by one opaque node."""
        return any("CompiledFunction" in node.name() for node in self.order)


_CONSTANTS: dict[str, tuple[tuple[str, bool], ...]] = {}
"""Names of the constants on each kind of node, and whether they are sizes; a cache, since ``dir`` is slow."""
_SIZES = re.compile(r"size|numel|stride|_saved_(N|HxW|max_[qk])$")
"""Names of constants that are sizes of tensors."""


def _constants(node: Node, name: str, fixed: Collection[int], sizes: dict[int, int]) -> tuple[Any, ...]:
    """Return the constants saved on a node, such as dimensions and strides, without its saved tensors.

    A saved tensor is recognized by its second, raw form. Reading it would run the hooks for saved tensors, with which
    activation checkpointing computes the forward pass again.

    Args:
        node: an autograd node.
        name: its name.
        fixed: sizes that count as they are.
        sizes: numbers of the others so far; new ones are added.
    """
    if name not in _CONSTANTS:
        names = dir(type(node))
        own = (saved for saved in names if saved.startswith("_saved_") and f"_raw{saved}" not in names)
        _CONSTANTS[name] = tuple((saved, _SIZES.search(saved) is not None) for saved in own)
    constants: list[Any] = []
    for saved, is_size in _CONSTANTS[name]:
        value = getattr(node, saved)
        if is_size:
            value = _counted(value, fixed, sizes)
        constants.append(tuple(value) if isinstance(value, list) else value)
    return tuple(constants)


def _counted(value: Any, fixed: Collection[int], sizes: dict[int, int]) -> Any:
    """Return sizes with a number in place of each that is not fixed."""
    if isinstance(value, list | tuple):
        return tuple([_counted(one, fixed, sizes) for one in value])
    free = type(value) is int and value > 0 and value not in fixed
    return ("size", sizes.setdefault(value, len(sizes))) if free else value
