"""The linear layers and normalizations that one forward pass runs, in order, and which normalization follows which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.autograd.tracing import trace
from lightning_normgeo.normalization.folding import tied_parameters
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.normalization.parametrizations import Linear
from lightning_normgeo.normalization.registry import NORMS
from lightning_normgeo.normalization.surgery.norm_layers import Layers, NormLayer, normalization_layers, overrides
from lightning_normgeo.normalization.surgery.preceding_layers import (
    NormInputs,
    inputs_by_graph,
    outputs_of,
    trainable,
)
from lightning_normgeo.symmetries import scale_invariant_units


@dataclass(frozen=True)
class Wiring:
    """The layers of a network as one forward pass in evaluation mode runs them.

    Attributes:
        shapes: shapes of the inputs in each call of a linear layer or normalization, in the order of first calls.
        names: module paths of these layers.
        folded: for a linear layer, the normalization with fixed statistics that can be folded into it.
        unfolded: for each other normalization with fixed statistics, the reason in words.
        varying: for a linear layer, the normalization behind it whose statistics depend on the sample, in words.
        outside: names of the parameters that the outputs depend on and that are in none of these layers.
    """

    shapes: Mapping[nn.Module, list[tuple[int, ...]]]
    names: Mapping[nn.Module, str]
    folded: Mapping[nn.Module, NormLayer]
    unfolded: Mapping[NormLayer, str]
    varying: Mapping[nn.Module, str]
    outside: tuple[str, ...]


def wiring_of(module: nn.Module, example: Any) -> Wiring:
    """Return the wiring of a model in evaluation mode.

    Args:
        module: the model.
        example: its input; a tuple holds positional and a dict keyword arguments.

    Raises:
        ConfigurationError: if the model does not accept the input.

    Cost: three forward passes, and the search for scale-invariant units.
    """
    names: dict[nn.Module, str] = {
        child: name for name, child in module.named_modules() if isinstance(child, (*Linear, *Layers))
    }
    with trainable(module):
        with _calls(names) as shapes:
            used = {id(leaf.variable) for leaf in Graph(*trace(module, example)).leaves}
        norms = normalization_layers(module) if any(isinstance(child, Layers) for child in names) else []
        norms = [norm for norm in norms if norm.layer in shapes]
        inputs = inputs_by_graph(module, norms, example) if norms else {}
        invariant = _invariant_in_evaluation(module, example)
    inside = {id(parameter) for layer in shapes for parameter in layer.parameters()}
    outside = [name for name, p in by_clean_name(module.named_parameters()).items() if id(p) in used - inside]
    folded, unfolded = _folds([norm for norm in norms if is_fixed(norm)], inputs, shapes, tied_parameters(module))
    varying: dict[nn.Module, str] = {}
    for norm in norms:
        if not is_fixed(norm):
            for one in inputs[norm.layer].preceding_layers:
                varying.setdefault(one.layer, title_of(norm))
    varying = invariant | varying
    return Wiring(shapes, names, folded, unfolded, varying, tuple(outside))


def is_fixed(norm: NormLayer) -> bool:
    """Whether a normalization is an affine map with running statistics in evaluation mode."""
    return norm.statistics[0] is not None


def title_of(norm: NormLayer) -> str:
    """Return a normalization in words, such as "batch normalization layer1.0.bn1"."""
    title = NORMS[norm.kind].title if norm.kind in NORMS else "mean-only batch normalization"
    return f"{title} {norm.name}"


@contextmanager
def _calls(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[tuple[int, ...]]]]:
    """Context that collects the shapes of the inputs of each layer, in the order of first calls."""
    shapes: dict[nn.Module, list[tuple[int, ...]]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs.get("input")
        shapes.setdefault(layer, []).append(tuple(value.shape) if isinstance(value, Tensor) else ())

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def _invariant_in_evaluation(module: nn.Module, example: Any) -> dict[nn.Module, str]:
    """Return the plain layers whose weight is scale invariant in evaluation mode, and the normalization in words.

    Only the statistics of the sample make it so. The search also finds normalizations that are no module of torch's.
    """
    modules, found = dict(module.named_modules()), dict[nn.Module, str]()
    for units in scale_invariant_units(module, example):
        layer = modules.get(units.layer)
        if units.invariant and isinstance(layer, Linear) and "weight" in layer._parameters:
            found[layer] = units.normalization or "a normalization"
    return found


def _folds(
    norms: list[NormLayer],
    inputs: Mapping[nn.Module, NormInputs],
    shapes: Mapping[nn.Module, list[tuple[int, ...]]],
    tied: set[int],
) -> tuple[dict[nn.Module, NormLayer], dict[NormLayer, str]]:
    """Return the linear layer in front of each normalization, or the reason why there is no such layer."""
    folded: dict[nn.Module, NormLayer] = {}
    unfolded: dict[NormLayer, str] = {}
    for norm in norms:
        found = inputs[norm.layer].preceding_layers
        if len(found) != 1:
            unfolded[norm] = "more than one weight in front" if found else "no weight in front"
            continue
        (preceding,) = found
        own_forward = norm.kind != "mbn" and overrides(norm.layer, "forward") and not norm.followers
        if not preceding.adjacent or outputs_of(preceding.layer) != norm.channels or own_forward:
            unfolded[norm] = f"{preceding.name} is not directly in front of it alone"
        elif len(shapes.get(preceding.layer, ())) != 1 or any(id(p) in tied for p in preceding.layer.parameters()):
            unfolded[norm] = f"{preceding.name} is used elsewhere too"
        else:
            folded[preceding.layer] = norm
    return folded, unfolded
