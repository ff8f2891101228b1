"""Search for the layers that feed a normalization, by one forward pass or, as a guess, by the order of registration."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.autograd.nodes import is_leaf
from lightning_normgeo.normalization.autograd.tracing import trace
from lightning_normgeo.normalization.parametrizations import Linear
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer, names_of_modules

_WEIGHTS = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1}  # position of the weight in the inputs


@dataclass(frozen=True)
class PrecedingLayer:
    """A linear or convolutional layer whose output reaches a normalization.

    Attributes:
        name: its module path.
        layer: the layer.
        direct: whether its unchanged output is read by the normalization and by nothing else, so that γ and β can be
            folded into the layer.
        adjacent: the same without regard to the weight, which direct layers read once and a parametrization may read
            several times; False where no forward pass showed it.
    """

    name: str
    layer: nn.Module
    direct: bool
    adjacent: bool = False


@dataclass(frozen=True)
class NormInputs:
    """The inputs of one normalization layer.

    Attributes:
        preceding_layers: the nearest linear or convolutional layers that they are computed from.
        shape: shape of the input with the fewest positions; None if the model was not run.
        traced: whether the preceding layers were found by a forward pass.
        chained: if not, whether a plain Sequential holds the normalization and its preceding layer, so that the result
            is certain and not a guess.
    """

    preceding_layers: tuple[PrecedingLayer, ...] = ()
    shape: tuple[int, ...] | None = None
    traced: bool = False
    chained: bool = False


def inputs_in_order(module: nn.Module, norm_layers: Iterable[NormLayer]) -> dict[nn.Module, NormInputs]:
    """Guess the layer that feeds each normalization: the one registered last before it, if it has as many channels."""
    wanted = {norm_layer.layer: norm_layer for norm_layer in norm_layers}
    names = names_of_modules(module)
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    inside = {part for layer in module.modules() if isinstance(layer, Linear) for part in layer.modules()}
    last: nn.Module | None = None
    before: nn.Module | None = None
    found: dict[nn.Module, PrecedingLayer] = {}
    for child in module.modules():
        if child in wanted and last is not None and outputs_of(last) == wanted[child].channels:
            once = len(names[last]) == len(names[child]) == 1
            direct = once and last is before and parents.get(last) is parents[child]
            found[child] = PrecedingLayer(names[last][0], last, direct)
        if isinstance(child, Linear):
            last = before = child
        elif child in wanted or not (list(child.children()) or child in inside):
            before = child
    # two normalizations of one parent that share a preceding layer, such as one per domain, are used alternately
    readers = Counter((preceding.layer, parents[norm]) for norm, preceding in found.items())
    inputs = {}
    for norm, preceding in found.items():
        direct = preceding.direct and readers[preceding.layer, parents[norm]] == 1
        chained = parents.get(preceding.layer) is parents[norm] and _is_chain(parents[norm], preceding.layer, norm)
        inputs[norm] = NormInputs((replace(preceding, direct=direct),), chained=chained)
    return inputs


def _is_chain(parent: nn.Module, *layers: nn.Module) -> bool:
    """Whether a module runs its parts one after the other, and ``layers`` among them have no hooks."""
    plain = type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent)
    return plain and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def inputs_by_graph(module: nn.Module, norm_layers: Sequence[NormLayer], batch: Any) -> dict[nn.Module, NormInputs]:
    """Find the layers that feed each normalization by one forward pass, through sums, concatenations and activations.

    Args:
        module: the model.
        norm_layers: its normalization layers.
        batch: its input; a tuple holds positional and a dict keyword arguments.

    Returns:
        The inputs by normalization layer.

    Raises:
        ConfigurationError: if the model does not accept the batch.
    """
    reads: dict[nn.Module, list[tuple[Node, tuple[int, ...]]]] = defaultdict(list)

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Insert a node in front of the layer, which counts as one reader however often the layer reads its input."""
        key = None if args else "input"
        value = args[0] if args else kwargs.get("input")
        if not isinstance(value, Tensor):
            return None
        value = value.view_as(value)
        reads[layer].append((value.grad_fn, tuple(value.shape)))
        return ((value, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: value})

    handles = [norm_layer.layer.register_forward_pre_hook(note, with_kwargs=True) for norm_layer in norm_layers]
    try:
        with trainable(module):
            graph = Graph(*trace(module, batch))
    finally:
        for handle in handles:
            handle.remove()
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, child in module.named_modules():
        if isinstance(child, Linear):
            owners.update((id(parameter), (name, child)) for parameter in child.parameters())
    return {norm_layer.layer: _inputs(graph, reads.get(norm_layer.layer, ()), owners) for norm_layer in norm_layers}


@contextmanager
def trainable(module: nn.Module) -> Iterator[None]:
    """Let frozen parameters require a gradient inside the context, so that they appear in the graph."""
    frozen = [p for p in module.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _inputs(
    graph: Graph, calls: Sequence[tuple[Node, tuple[int, ...]]], owners: dict[int, tuple[str, nn.Module]]
) -> NormInputs:
    found: dict[str, PrecedingLayer] = {}
    for node, _ in calls:
        for preceding in [] if node is None else _walk_back(graph, node, owners):
            once = len(calls) == 1
            direct, adjacent = preceding.direct and once, preceding.adjacent and once
            found[preceding.name] = replace(preceding, direct=direct, adjacent=adjacent)
    shape = min((shape for _, shape in calls), key=lambda shape: math.prod(shape[2:]), default=None)
    return NormInputs(tuple(found.values()), shape, traced=True)


def _walk_back(graph: Graph, start: Node, owners: dict[int, tuple[str, nn.Module]]) -> list[PrecedingLayer]:
    """Go back from a node to the nearest layers with a weight; layers further back feed only these."""
    found: dict[str, PrecedingLayer] = {}
    (first, output), *_ = start.next_functions
    alone = graph.readers[first, output] == [(start, 0)] and (first, output) not in graph.results
    seen, stack = {first}, [first]
    while stack:
        node = stack.pop()
        owner, leaf = _owner(node, owners)
        if owner is not None:
            adjacent = alone and node is first
            found[owner[0]] = PrecedingLayer(*owner, adjacent and len(graph.readers[leaf, 0]) == 1, adjacent)
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return list(found.values())


def _owner(node: Node, owners: dict[int, tuple[str, nn.Module]]) -> tuple[tuple[str, nn.Module] | None, Node]:
    """Return the layer whose weight a node reads, directly, transposed or parametrized, and the node of the weight."""
    parents = [parent for parent, _ in node.next_functions]
    if node.name() in _WEIGHTS:
        parents = [parents[_WEIGHTS[node.name()]]]
    for leaf in parents:
        for _ in range(12):  # a transpose or a parametrization puts a few nodes between the weight and its reader
            if leaf is None or leaf.name() in _WEIGHTS:
                break
            if is_leaf(leaf):
                if leaf.variable.ndim >= 2 and id(leaf.variable) in owners:
                    return owners[id(leaf.variable)], leaf
                break
            leaf = next((parent for parent, _ in leaf.next_functions if parent is not None), None)
    return None, None


def outputs_of(layer: nn.Module) -> int:
    """Return the number of output channels of a linear or convolutional layer."""
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))
