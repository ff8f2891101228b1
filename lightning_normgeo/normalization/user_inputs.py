"""Checks and conversions of the models and batches that users pass in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.parametrizations import Linear
from lightning_normgeo.utilities.checked_values import short_repr


def check_module(call: str, module: Any) -> None:
    """Check that a model was given.

    Args:
        call: the signature of the called function, as the error message shows it.
        module: the value that was given as the model.

    Raises:
        ConfigurationError: for anything but a module, such as a class, a name, a state dict or a batch.
    """
    if isinstance(module, nn.Module):
        return
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise ConfigurationError(f"{call} got the class {module.__name__}. Give a model of it, as {module.__name__}().")
    raise ConfigurationError(
        f"{call} got {short_repr(module)} as its model. Give a torch.nn.Module first, then the rest."
    )


def as_tensor(value: Any) -> Any:
    """Return a copy of an array of numbers (numpy, TensorFlow, JAX) as a tensor; return any other value unchanged."""
    if isinstance(value, Tensor) or not (hasattr(value, "__array__") and hasattr(value, "dtype")):
        return value
    try:
        array = value.__array__()
        return torch.tensor(array.astype(array.dtype.newbyteorder("=")))
    except (TypeError, ValueError):  # an array of strings or objects, which no tensor can hold
        return value


def as_example(module: nn.Module, example: Any) -> Any:
    """Return an example batch with its arrays and lists of numbers converted to tensors.

    Arrays and lists have no device, and double precision only because that is the default of numpy and Python, so the
    converted tensors get the device and the precision of the model. Tensors in the batch are left unchanged.
    """
    if isinstance(example, list) and _is_of_numbers(example):
        example = torch.tensor(example)
        return _like_weights(module, example)
    return pytree.tree_map(
        lambda leaf: leaf if isinstance(leaf, Tensor) else _like_weights(module, as_tensor(leaf)), example
    )


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of an example batch: a tuple is positional, a dict keyword.

    Their tensors are copies, made as part of the graph, so that the model may normalize its inputs in place: neither
    the caller's batch nor the next forward pass sees that.
    """
    copied = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)
    if isinstance(copied, dict):
        return (), copied
    if isinstance(copied, PackedSequence):  # a tuple by its class, but one input
        return (copied,), {}
    return (copied if isinstance(copied, tuple) else (copied,)), {}


def _is_of_numbers(entries: list[Any]) -> bool:
    """Whether nested lists contain only numbers and are not ragged."""
    if not all(isinstance(leaf, (int, float)) for leaf in pytree.tree_leaves(entries)):
        return False
    try:
        return torch.tensor(entries).numel() > 0
    except (TypeError, ValueError):
        return False


def _like_weights(module: nn.Module, value: Any) -> Any:
    weight = weight_of(module)
    if not isinstance(value, Tensor) or weight is None or weight.is_meta:
        return value
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)


def weight_of(module: nn.Module) -> Tensor | None:
    """Return the first floating-point parameter, whose device and precision are taken as the model's; None if none."""
    return next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)


def misfit(module: nn.Module, example: Any) -> str:
    """Return advice on why a model may have failed on a batch and what to do; empty where no cause is known."""
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    weight = weight_of(module)
    if not tensors or (isinstance(example, list) and isinstance(example[0], (list, tuple))):
        return "Give one batch of tensors, as next(iter(loader))[0]."
    if isinstance(example, (tuple, list)) and len(example) > 1 and _are_labels(example[1]):
        return "Give the images alone, as batch[0]: the second entry looks like labels."
    if isinstance(example, list):
        return "Give the tensor itself, or a tuple of positional arguments, in place of a list."
    if weight is None:
        return ""
    for tensor in tensors:
        if tensor.device != weight.device:
            return f"The batch is on {tensor.device}, the model on {weight.device}: give batch.to('{weight.device}')."
    # a wrong shape is reported before a wrong dtype: it is the likelier reason why the forward pass failed
    shape_problems = (text for tensor in tensors if (text := _shape_misfit(module, tensor)))
    dtype_problems = (text for tensor in tensors if (text := _dtype_misfit(weight, tensor)))
    return next(shape_problems, "") or next(dtype_problems, "")


def _are_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point()


def _dtype_misfit(weight: Tensor, tensor: Tensor) -> str:
    names = [str(one.dtype).removeprefix("torch.") for one in (tensor, weight)]
    if tensor.dtype == torch.uint8 and tensor.ndim > 2:
        return "The images are bytes: give images / 255, or what the model is trained on."
    if tensor.is_floating_point() and tensor.dtype != weight.dtype:
        return f"The batch is {names[0]}, the model {names[1]}: give batch.to(torch.{names[1]})."
    return ""


def _shape_misfit(module: nn.Module, tensor: Tensor) -> str:
    first = next((child for child in module.modules() if isinstance(child, Linear)), None)
    if not isinstance(first, nn.modules.conv._ConvNd):
        return ""
    dims, channels = len(first.kernel_size), first.in_channels
    if tensor.ndim == dims + 1 and tensor.shape[0] == channels:
        return "It is a single sample: give a batch, as images[None]."
    if tensor.ndim != dims + 2 or tensor.shape[1] == channels:
        return ""
    if tensor.shape[-1] == channels:
        order = ", ".join(map(str, [0, dims + 1, *range(1, dims + 1)]))
        return f"Channels are the last dimension of {tuple(tensor.shape)}: give images.permute({order})."
    return f"The model takes {channels} channels, and images {tuple(tensor.shape)} have {tensor.shape[1]}."
