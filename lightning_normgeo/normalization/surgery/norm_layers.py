"""Normalization layers found in any model: their kind, parameters and statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.layers import MeanOnlyBatchNorm
from lightning_normgeo.utilities.checked_values import nearest, short_repr, strings

Layers = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, MeanOnlyBatchNorm)
"""Classes of normalization layers that can be replaced."""


@dataclass(frozen=True)
class NormLayer:
    """One normalization layer of a model.

    Attributes:
        names: its module paths; more than one for a shared layer.
        layer: the layer.
        kind: ``bn``, ``in``, ``gn``, ``ln`` or ``mbn``.
        dims: number of spatial dimensions of its input; None if its class does not determine it.
    """

    names: tuple[str, ...]
    layer: nn.Module
    kind: str
    dims: int | None

    @property
    def name(self) -> str:
        """The first of its module paths."""
        return self.names[0]

    @property
    def channels(self) -> int:
        """The number of channels."""
        for attribute in ("num_features", "num_channels"):
            if hasattr(self.layer, attribute):
                return int(getattr(self.layer, attribute))
        return int(cast("nn.LayerNorm", self.layer).normalized_shape[0])

    @property
    def gamma(self) -> nn.Parameter | None:
        """The parameter γ; None if there is none."""
        return self.layer._parameters.get("weight")

    @property
    def beta(self) -> nn.Parameter | None:
        """The parameter β; None if there is none."""
        return self.layer._parameters.get("bias")

    @property
    def statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """The running mean and the running variance; None for one that does not exist."""
        return self.layer._buffers.get("running_mean"), self.layer._buffers.get("running_var")

    @property
    def trained(self) -> bool:
        """Whether its running statistics have been updated with data."""
        batches = self.layer._buffers.get("num_batches_tracked")
        return self.statistics[0] is not None and (batches is None or batches.is_meta or bool(batches > 0))

    @property
    def followers(self) -> dict[str, nn.Module]:
        """The modules that a subclass runs behind the normalization, as timm's BatchNormAct2d runs an activation."""
        return {name: child for name, child in self.layer.named_children() if not isinstance(child, nn.Identity)}

    @property
    def lost(self) -> list[str]:
        """The features of the layer that every replacement loses, in words."""
        layer, lost = self.layer, []
        if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
            lost.append("its hooks dropped")
        # such a layer normalization overrides the forward only to move the channels last and back
        turns = isinstance(layer, nn.LayerNorm) and _channels_first(layer)
        if overrides(layer, "forward") and not self.followers and not turns:
            lost.append(f"the forward of {type(layer).__name__} replaced")
        return lost


def names_of_modules(module: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the modules inside ``module``, each with all its module paths."""
    names: dict[nn.Module, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        names.setdefault(child, []).append(name)
    return names


def normalization_layers(module: nn.Module) -> list[NormLayer]:
    """Return all normalization layers of ``module``, a shared one once.

    Raises:
        ConfigurationError: if there is none, if the module itself is one, or if any layer is lazy.
    """
    lazy = next((name for name, child in module.named_modules() if _is_lazy(child)), None)
    if lazy is not None:
        raise ConfigurationError(
            f"{lazy or 'The module'} is a lazy layer without shape yet. Run one forward pass before swap_norm."
        )
    names = names_of_modules(module)
    found = [NormLayer(tuple(names[m]), m, _kind(m), _dims(m)) for m in names if isinstance(m, Layers)]
    if not found:
        raise ConfigurationError(
            f"{type(module).__name__} has no normalization layers that swap_norm could replace (batch, instance, group "
            "and layer normalization)."
        )
    if isinstance(module, Layers):
        raise ConfigurationError(
            f"The module given to swap_norm is itself a normalization ({type(module).__name__}) and cannot be replaced "
            "in place. Give the model that holds it."
        )
    return found


def matching(found: Sequence[NormLayer], layers: str | Sequence[str]) -> list[NormLayer]:
    """Return the layers with a module path that matches one of the globs.

    Args:
        found: all normalization layers.
        layers: one glob or several.

    Raises:
        ConfigurationError: for a glob that matches no layer.
    """
    globs = strings("layers", layers, "a glob for module paths, as '*.bn1'")
    names = [name for norm_layer in found for name in norm_layer.names]
    idle = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]
    if idle or not globs:
        raise ConfigurationError(
            f"layers={short_repr(layers)}: {idle[0] if idle else 'an empty list'!r} matches none of the {len(names)} "
            f"normalization layers; {nearest(idle[0] if idle else '', names)}."
        )
    return [
        norm_layer
        for norm_layer in found
        if any(fnmatchcase(name, glob) for name in norm_layer.names for glob in globs)
    ]


def why_not_replaced(norm_layer: NormLayer, shape: tuple[int, ...] | None = None) -> str | None:
    """Return the reason why a layer cannot be replaced by any normalization, in words; None if it can.

    Args:
        norm_layer: the layer.
        shape: shape of its input; None if unknown.
    """
    layer = norm_layer.layer
    if isinstance(layer, nn.LayerNorm) and not _channels_first(layer) and (shape is None or len(shape) != 2):
        return "it normalizes the last dimension of its input, not channels (N, C, ...)"
    if is_parametrized(layer):
        return "its own parameters are parametrized"
    own = {name for name, _ in layer.named_parameters(recurse=False)} - {"weight", "bias"}
    if own:
        return f"a subclass with parameters of its own: {', '.join(sorted(own))}"
    odd = [name for name, child in norm_layer.followers.items() if not _is_activation(child)]
    if odd:
        return f"a subclass that holds more than an activation: {', '.join(odd)}"
    return None


def overrides(layer: nn.Module, *methods: str) -> bool:
    """Whether a layer or its class overrides methods of its nearest base class from torch or this package."""
    base = next(base for base in type(layer).__mro__ if base.__module__.startswith(("torch.", __package__)))
    own = [getattr(type(layer), method, None) is not getattr(base, method, None) for method in methods]
    return any(own) or any(method in vars(layer) for method in methods)


def spatial_dims(layer: nn.Module) -> int | None:
    """Return the number of spatial dimensions of a layer's output: 0 for a linear layer, None if unknown."""
    if isinstance(layer, nn.Linear):
        return 0
    return len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else None


def _is_lazy(layer: nn.Module) -> bool:
    tensors = itertools.chain(layer.parameters(recurse=False), layer.buffers(recurse=False))
    return isinstance(layer, _LazyNormBase) or any(is_lazy(tensor) for tensor in tensors)


def _is_activation(layer: nn.Module) -> bool:
    """Whether a module can be run on its own as an activation: with a forward, without weights or normalizations."""
    parts = not any(isinstance(child, Layers) for child in layer.modules())
    return parts and type(layer).forward is not nn.Module.forward and all(p.ndim < 2 for p in layer.parameters())


def _channels_first(layer: nn.LayerNorm) -> bool:
    return len(layer.normalized_shape) > 1 or type(layer).__name__.endswith(("2d", "3d", "1d"))


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, MeanOnlyBatchNorm):
        return "mbn"
    if isinstance(layer, _InstanceNorm):
        return "in"
    if isinstance(layer, _BatchNorm):
        return "bn"
    return "ln" if isinstance(layer, nn.LayerNorm) or cast("nn.GroupNorm", layer).num_groups == 1 else "gn"


def _dims(layer: nn.Module) -> int | None:
    for dims in (1, 2, 3):
        bases = (getattr(nn, f"BatchNorm{dims}d"), getattr(nn, f"InstanceNorm{dims}d"))
        if isinstance(layer, bases) or type(layer).__name__.endswith(f"LayerNorm{dims}d"):
            return dims
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return len(layer.normalized_shape) - 1
    return None
