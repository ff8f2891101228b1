"""Example inputs for models: those that users give, and those guessed from the attributes and layers of a model."""

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

_SIZES = {1: (64, 256), 2: (32, 64, 224, 28), 3: (16, 32)}  # positions per dimension, by the number of dimensions
_LARGEST = 2**22  # values per sample
_SAMPLES = 2  # batch normalization in training mode fails on a single sample with one position


def shapes(example: Any) -> str:
    """Return the shapes of the tensors in an example as text."""
    return ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor))


def few(example: Any, samples: int = _SAMPLES) -> Any:
    """Return the first samples of a batch; the whole batch where its tensors differ in their first dimension."""
    leaves = pytree.tree_leaves(example)
    lengths = {leaf.shape[:1] if isinstance(leaf, Tensor) else None for leaf in leaves}
    if len(lengths) != 1 or not next(iter(lengths)):
        return example
    return pytree.tree_map(lambda leaf: leaf[:samples], example)


def inputs_by_trial(
    module: nn.Module, norm_layers: Sequence[NormLayer], large: bool = False
) -> tuple[dict[nn.Module, NormInputs], Any] | tuple[None, None]:
    """Find the layers that feed each normalization, using the first generated example that the model accepts.

    Args:
        module: the model.
        norm_layers: its normalization layers.
        large: whether images of 64 pixels are tried before 32, so that feature maps are not smaller than in real use.

    Returns:
        The result of :func:`inputs_by_graph` and the example; (None, None) if the model accepted no example.
    """
    for example in _made_up(module, large):
        with attributes_kept(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return inputs_by_graph(module, norm_layers, example), example
            except Exception:  # noqa: S112 - a forward may fail in any way on an input that is not meant for it
                continue
    return None, None


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """On exit, restore all attributes, parameters and buffers that a forward pass assigned to the modules."""
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
    """Return the dictionaries of a module's parameters and buffers, each with a copy of its entries.

    They are restored here since torch's ``functional_call`` does not restore those of a module with two names.
    """
    return [(registered, dict(registered)) for registered in (module._parameters, module._buffers)]


def _made_up(module: nn.Module, large: bool) -> Iterator[Any]:
    """Yield inputs that a model may accept, with its device and dtype, the most specific first."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(like.device, like.dtype if leaf.is_floating_point() else None)

    for example in itertools.chain(_own_examples(module), _images(module), _for_first_layer(module, large)):
        yield pytree.tree_map(placed, example)


def _own_examples(module: nn.Module) -> Iterator[Any]:
    """Yield the example inputs that LightningModules and Hugging Face models carry as attributes."""
    for attribute in ("example_input_array", "dummy_inputs"):
        example = _attribute(module, attribute)
        if isinstance(example, (Tensor, tuple, dict)):
            yield example


def _images(module: nn.Module) -> Iterator[Tensor]:
    """Yield one batch of images of the input size stated by the first timm model inside."""
    for child in module.modules():
        configured = _attribute(child, "default_cfg")
        size = configured.get("input_size") if isinstance(configured, dict) else None
        if isinstance(size, (tuple, list)) and all(isinstance(length, int) for length in size):
            yield _noise(*size)
            return


def _attribute(module: nn.Module, name: str) -> Any:
    """Return an attribute; None if it does not exist or its property raises."""
    try:
        return getattr(module, name, None)
    except Exception:
        return None


def _for_first_layer(module: nn.Module, large: bool) -> Iterator[Tensor]:
    """Yield inputs of several sizes that fit the layer registered first."""
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
    # own generator: the same noise on every process, and the random state of the training stays untouched
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_SAMPLES, *shape, generator=generator)
