"""Scale-invariant units: which slices of which weights the loss does not feel the length of.

Found from the autograd graph of one real loss, so any Python control flow and functional normalization are seen as
they ran, and nothing is run twice. A weight whose output is normalized directly, or through positively homogeneous
functions (ReLU, pooling), before anything else reads it, is scale invariant:

- batch and instance normalization with batch statistics: each output filter is a unit;
- group normalization: the filters of one group jointly; layer normalization: the whole layer jointly.

The paper's "every row" (Lemma 3) is right for the first and wrong for the second.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_normgeo.geometry.rows import as_rows

Kind = Literal["filter", "group", "layer", "none"]
Node = Any
"""An autograd node; torch has no public type for the C++ ones."""

_LINEAR_MAPS = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1, "LinearBackward0": 1}
"""Linear maps and the position of their weight among the inputs."""
_BIAS_INPUT = {"ConvolutionBackward0": 2, "AddmmBackward0": 0, "LinearBackward0": 2}
_COPIES = {"ToCopyBackward0", "CloneBackward0"}
_VIEWS = {"ViewBackward0", "ReshapeAliasBackward0"}
_HOMOGENEOUS = {
    "ReluBackward0",
    "LeakyReluBackward0",
    "MaxPool2DWithIndicesBackward0",
    "AvgPool2DBackward0",
    "AdaptiveAvgPool2DBackward0",
}
_BATCH_NORMS = {
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    "SyncBatchNormBackward",
}
_GROUP_NORMS = {"NativeGroupNormBackward0", "NativeLayerNormBackward0"}
_CONSTRUCTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class WeightUnits:
    """The units of one weight.

    Attributes:
        name: the parameter's name in the module it was found in.
        kind: what a unit is; ``none`` where no invariance was established.
        count: number of units (for ``none`` each output row is looked at by itself).
        dim: the weight's dimension that enumerates output channels.
        scale: name of the γ of the batch normalization that makes it invariant, where there is one directly behind.
        reason: why, in words.
    """

    name: str
    kind: Kind
    count: int
    dim: int
    scale: str | None
    reason: str

    @property
    def site(self) -> str:
        """The module path, which names the weight in metric keys."""
        return site_of(self.name)

    @property
    def invariant(self) -> bool:
        """Whether the loss is invariant to the scale of each unit."""
        return self.kind != "none"

    def without_invariance(self, reason: str) -> WeightUnits:
        """Return the same weight as one without an established invariance."""
        return WeightUnits(self.name, "none", self.count, self.dim, None, reason)

    def rows(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape with one unit per row."""
        return as_rows(tensor, self.count, self.dim)


def clean_name(name: str) -> str:
    """Return a parameter or module name without the infix that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def site_of(name: str) -> str:
    """Return the module path for ``….weight``, the whole name for any other parameter."""
    return clean_name(name).removesuffix(".weight")


def named_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters with at least two dimensions, under clean names."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.ndim >= 2:
            yield clean_name(name), parameter


def units_from_graph(module: nn.Module, loss: Tensor) -> tuple[WeightUnits, ...]:
    """Find the units of every weight of ``module`` that ``loss`` depends on.

    Args:
        module: owner of the weights.
        loss: a scalar whose autograd graph is still alive.

    Returns:
        One entry per weight, in the order of ``module.named_parameters()``.

    Cost: one walk over the graph in Python, a few milliseconds for ResNet-101; no tensor is touched.
    """
    return _units_in(_Graph(loss), module)


def find_units(module: nn.Module, loss: Tensor) -> tuple[tuple[WeightUnits, ...], bool]:
    """Return the units behind ``loss``, and whether they are a guess.

    Read from the graph as by :func:`units_from_graph`, or guessed by :func:`units_from_modules` where torch.compile
    made part of the graph opaque.
    """
    graph = _Graph(loss)
    return (units_from_modules(module), True) if graph.compiled else (_units_in(graph, module), False)


def _units_in(graph: _Graph, module: nn.Module) -> tuple[WeightUnits, ...]:
    names = {id(parameter): clean_name(name) for name, parameter in module.named_parameters()}
    found = {}
    for node in graph.leaves:
        name = names.get(id(node.variable))
        if name is not None and node.variable.ndim >= 2:
            found[name] = _units_of(graph, node, name, names)
    return tuple(found[name] for name, _ in named_weights(module) if name in found)


def units_from_modules(module: nn.Module) -> tuple[WeightUnits, ...]:
    """Guess the units from the order in which layers were registered: a convolution followed by a batch normalization.

    Only for compiled models, whose autograd graph is opaque. A guess: the numbers have to confirm it.
    """
    parameters = {id(parameter): clean_name(name) for name, parameter in module.named_parameters()}
    scales: dict[int, nn.modules.batchnorm._BatchNorm] = {}
    for parent in module.modules():
        for layer, behind in itertools.pairwise(parent.children()):
            if not isinstance(layer, _CONSTRUCTED) or not isinstance(behind, nn.modules.batchnorm._BatchNorm):
                continue
            if behind.training and behind.num_features == layer.weight.shape[0]:
                scales[id(layer.weight)] = behind
    found = []
    for name, weight in named_weights(module):
        norm = scales.get(id(weight))
        scale = None if norm is None or norm.weight is None else parameters[id(norm.weight)]
        reason = (
            "no batch normalization registered behind it" if norm is None else "registered before a batch normalization"
        )
        found.append(WeightUnits(name, "none" if norm is None else "filter", weight.shape[0], 0, scale, reason))
    return tuple(found)


class _Graph:
    """The autograd graph below a loss, with the edges turned round: who reads what a node produced."""

    def __init__(self, loss: Tensor) -> None:
        self.readers: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
        self.leaves: list[Node] = []
        seen, stack = {loss.grad_fn}, [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None:
                continue
            if hasattr(node, "variable"):
                self.leaves.append(node)
            for position, (source, _) in enumerate(node.next_functions):
                if source is not None:
                    self.readers[source].append((node, position))
                    if source not in seen:
                        seen.add(source)
                        stack.append(source)

    @property
    def compiled(self) -> bool:
        """Whether part of the graph is one opaque node made by torch.compile."""
        return any("CompiledFunction" in node.name() for readers in self.readers.values() for node, _ in readers)

    def follow(self, node: Node, through: set[str]) -> tuple[Node | None, int, set[str]]:
        """Go from ``node`` to its only reader that is not in ``through``; return it, its input, and what was passed.

        Without exactly one reader the first is None and the last says how many there are.
        """
        passed: set[str] = set()
        while True:
            readers = self.readers[node]
            if len(readers) != 1:
                return None, 0, {f"{len(readers)} consumers"}
            reader, position = readers[0]
            if reader.name() not in through:
                return reader, position, passed
            passed.add(reader.name())
            node = reader


def _units_of(graph: _Graph, leaf: Node, name: str, names: dict[int, str]) -> WeightUnits:
    weight = leaf.variable
    plain = WeightUnits(name, "none", weight.shape[0], 0, None, "")
    layer, position, passed = graph.follow(leaf, _COPIES | {"TBackward0"})
    if layer is None:
        return plain.without_invariance(f"used more than once: {passed.pop()}")
    kind = layer.name()
    if _LINEAR_MAPS.get(kind) != position:
        return plain.without_invariance(f"read by {kind}, not as the weight of a linear map")
    transposed = kind == "ConvolutionBackward0" and layer._saved_transposed
    if transposed and layer._saved_groups > 1:
        return plain.without_invariance("grouped transposed convolution")
    plain = WeightUnits(name, "none", weight.shape[int(transposed)], int(transposed), None, "")
    norm, position, passed = graph.follow(layer, _COPIES | _VIEWS | _HOMOGENEOUS)
    if norm is None:
        return plain.without_invariance(f"its output has {passed.pop()}")
    if position != 0 or norm.name() not in _BATCH_NORMS | _GROUP_NORMS:
        return plain.without_invariance(
            f"its output is read by {norm.name().removesuffix('Backward0')}, which is no normalization"
        )
    bias = _has_input(layer, _BIAS_INPUT.get(kind))
    shapes = (tuple(layer._input_metadata[0].shape), tuple(norm._input_metadata[0].shape))
    if norm.name() not in _GROUP_NORMS:
        return _before_batch_norm(graph, plain, norm, passed, shapes, bias, names)
    if bias:
        return plain.without_invariance("only weight and bias jointly: a bias is added before the normalization")
    whole = norm.name() == "NativeLayerNormBackward0"
    if passed & _VIEWS and shapes[0][: 2 - whole] != shapes[1][: 2 - whole]:
        return plain.without_invariance("reshaped before the normalization")
    count = 1 if whole else norm._saved_group
    unit: Kind = "layer" if count == 1 else "group"
    return WeightUnits(name, unit, count, plain.dim, None, f"{unit} normalization")


def _before_batch_norm(
    graph: _Graph,
    plain: WeightUnits,
    norm: Node,
    passed: set[str],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    bias: bool,
    names: dict[int, str],
) -> WeightUnits:
    """Classify a weight whose output is read by a batch (or instance) normalization."""
    if not getattr(norm, "_saved_training", True):  # SyncBatchNorm's node exists in training only
        return plain.without_invariance("batch normalization with frozen statistics")
    through = passed & _HOMOGENEOUS
    (batch, channels, *space), (new_batch, new_channels, *_) = shapes
    kept = new_batch == batch and new_channels == channels
    flat = new_batch == batch and new_channels % channels == 0  # statistics within a filter, if at each position
    instances = new_batch == 1 and new_channels == batch * channels
    split = new_batch == batch and not space and channels % new_channels == 0  # rows share their statistics
    if passed & _VIEWS and not (kept or flat or instances or split):
        return plain.without_invariance(f"reshaped from {shapes[0]} to {shapes[1]} before the normalization")
    if bias and (through or (split and not kept)):
        return plain.without_invariance("only weight and bias jointly: a bias is added before the normalization")
    reason = " after ".join(["batch normalization", *(node.removesuffix("Backward0") for node in sorted(through))])
    if split and not kept:
        return WeightUnits(plain.name, "group", new_channels, plain.dim, None, reason)
    scale = norm.next_functions[1][0] if kept and not through and _has_input(norm, 1) else None
    alone = scale is not None and len(graph.readers[scale]) == 1  # else γ.grad holds more than this layer's part
    return WeightUnits(
        plain.name, "filter", plain.count, plain.dim, _variable_name(scale, names) if alone else None, reason
    )


def _has_input(node: Node, position: int | None) -> bool:
    if position is None or position >= len(node.next_functions):
        return False
    return node.next_functions[position][0] is not None


def _variable_name(node: Node, names: dict[int, str]) -> str | None:
    return names.get(id(node.variable)) if hasattr(node, "variable") else None
