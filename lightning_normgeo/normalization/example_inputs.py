"""Example inputs for models: those given, and those made up from what a model says of itself."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_normgeo.normalization.parametrizations import Linear
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer
from lightning_normgeo.normalization.surgery.preceding_layers import NormInputs, inputs_by_graph

_SIZES = {1: (64, 256), 2: (32, 64, 224, 28), 3: (16, 32)}  # positions along each dimension, by their number
_LARGEST = 2**22  # values of a sample
_SAMPLES = 2  # a batch normalization in training mode takes no single one


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return an example batch as positional and keyword arguments: a tuple holds the first, a dict the second."""
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def shapes(example: Any) -> str:
    """Return the shapes of the tensors in an example as text."""
    return ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor))


def few(example: Any, samples: int = _SAMPLES) -> Any:
    """Return the first samples of a batch whose tensors all have the same first dimension, else the batch."""
    leaves = pytree.tree_leaves(example)
    lengths = {leaf.shape[:1] if isinstance(leaf, Tensor) else None for leaf in leaves}
    if len(lengths) != 1 or not next(iter(lengths)):
        return example
    return pytree.tree_map(lambda leaf: leaf[:samples], example)


def inputs_by_trial(
    module: nn.Module, norm_layers: Sequence[NormLayer], large: bool = False
) -> tuple[dict[nn.Module, NormInputs], Any] | tuple[None, None]:
    """Find what feeds each normalization with the first made-up example that the model takes.

    Args:
        module: the model.
        norm_layers: its normalizations.
        large: whether 64 pixels are tried before 32, as maps are to be no smaller than they will be.

    Returns:
        What :func:`inputs_by_graph` finds, and the example; None twice where the model took none.
    """
    for example in _made_up(module, large):
        with attributes_kept(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return inputs_by_graph(module, norm_layers, example), example
            except Exception:  # noqa: S112 - whatever a forward makes of an input that is not its own
                continue
    return None, None


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a forward pass assigns to modules: attributes such as counters and caches, tensors."""
    before = [(child, dict(vars(child)), _tensors(child)) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes, tensors in before:
            vars(child).clear()
            vars(child).update(attributes)
            for registered, entries in tensors:
                registered.clear()
                registered.update(entries)


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return what holds a module's parameters and buffers, and its entries.

    torch's ``functional_call`` does not put those of a module with two names back.
    """
    return [(registered, dict(registered)) for registered in (module._parameters, module._buffers)]


def _made_up(module: nn.Module, large: bool) -> Iterator[Any]:
    """Yield inputs that a model may take, on its device: its own examples, timm's image size, for its first layer."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    for example in itertools.chain(_own_examples(module), _images(module), _for_first_layer(module, large)):
        yield pytree.tree_map(
            lambda leaf: (
                leaf.to(like.device, like.dtype if leaf.is_floating_point() else None)
                if isinstance(leaf, Tensor)
                else leaf
            ),
            example,
        )


def _own_examples(module: nn.Module) -> Iterator[Any]:
    """Yield the examples of LightningModules and of Hugging Face's models."""
    for attribute in ("example_input_array", "dummy_inputs"):
        example = _attribute(module, attribute)
        if isinstance(example, (Tensor, tuple, dict)):
            yield example


def _images(module: nn.Module) -> Iterator[Tensor]:
    """Yield an image batch of the size that a timm model inside says."""
    for child in module.modules():
        configured = _attribute(child, "default_cfg")
        size = configured.get("input_size") if isinstance(configured, dict) else None
        if isinstance(size, (tuple, list)) and all(isinstance(length, int) for length in size):
            yield _noise(*size)
            return


def _attribute(module: nn.Module, name: str) -> Any:
    """Return an attribute, or None where there is none or a property fails."""
    try:
        return getattr(module, name, None)
    except Exception:
        return None


def _for_first_layer(module: nn.Module, large: bool) -> Iterator[Tensor]:
    """Yield inputs of several sizes with the channels of the layer that is registered first."""
    first = next((child for child in module.modules() if isinstance(child, (*Linear, nn.Embedding))), None)
    if isinstance(first, nn.Embedding):
        yield torch.arange(_SAMPLES * 16).reshape(_SAMPLES, 16) % first.num_embeddings
    elif isinstance(first, nn.Linear):
        yield _noise(first.in_features)
        yield _noise(8, first.in_features)
    elif first is not None:
        dims = len(first.kernel_size)
        sizes = sorted(_SIZES[dims], key=lambda size: size != 64) if large else _SIZES[dims]
        fitting = [size for size in sizes if first.in_channels * size**dims <= _LARGEST]
        for size in fitting:
            yield _noise(first.in_channels, *[size] * dims)


def _noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the same for every process, and no number of the global generator
    return torch.randn(_SAMPLES, *shape, generator=generator)
