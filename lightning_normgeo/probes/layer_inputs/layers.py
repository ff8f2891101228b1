"""Linear and convolution layers whose inputs can be read, and the map that each of them applies."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.geometry.input_covariance.patch_map import PatchMap
from lightning_normgeo.normalization.names import clean_name

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def readable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of a model by module path, without subclasses that compute otherwise."""
    return {clean_name(name): layer for name, layer in module.named_modules() if _is_readable(layer)}


def _is_readable(layer: nn.Module) -> bool:
    kind = next((kind for kind in _KINDS if isinstance(layer, kind)), None)
    if kind is None or type(layer).forward is not kind.forward:
        return False
    return getattr(type(layer), "_conv_forward", None) is getattr(kind, "_conv_forward", None)


def before_batch_norms(module: nn.Module) -> list[str]:
    """Return the readable layers that a batch normalization of their width directly follows in the order of modules.

    The order is a guess at the order of execution, good enough for a default.
    """
    found: list[str] = []
    before, width = "", None  # the readable layer that ran last, until another one follows
    for name, layer in ((clean_name(name), layer) for name, layer in module.named_modules()):
        if before and name.startswith(f"{before}."):  # parametrizations of its weight
            continue
        if before and isinstance(layer, _BatchNorm) and layer.num_features == width:
            found.append(before)
        if _is_readable(layer):
            before, width = name, _outputs(layer)
        elif not any(layer.children()):
            before = ""
    return found


def _outputs(layer: nn.Module) -> int | None:
    return getattr(layer, "out_channels", getattr(layer, "out_features", None))


def patch_map_of(layer: nn.Module) -> PatchMap:
    """Return the linear map of a readable layer."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padding = tuple(layer._reversed_padding_repeated_twice)
        return PatchMap(layer.kernel_size, layer.stride, layer.dilation, padding, mode, layer.groups)
    return PatchMap()


def batched(layer: nn.Module, x: Tensor) -> Tensor:
    """Return an input of a readable layer as :class:`PatchMap` takes it: ``(N, n)``, or ``(B, C, …)``."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return x if x.ndim == 2 + len(layer.kernel_size) else x[None]
    return x.reshape(-1, x.shape[-1])


def count_vectors(layer: nn.Module, x: Tensor) -> int:
    """Return N, the number of input vectors of a readable layer in an input from :func:`batched`."""
    layer_map = patch_map_of(layer)
    return len(x) * layer_map.samples(layer_map.padded(x[:1]))
