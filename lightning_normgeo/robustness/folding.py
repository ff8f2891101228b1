"""The same function, faster: batch normalization folded into the layer in front, weights in channels-last order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.normalization.feeders import Feeder, inputs_by_graph
from lightning_normgeo.normalization.folding import foldable
from lightning_normgeo.normalization.graph import is_compiled
from lightning_normgeo.normalization.sources import Source, normalization_layers, overrides

_TOLERANCE = 1e-4
"""Largest change of a logit, relative to the largest logit, that rounding explains in float32."""


class FoldedModel:
    r"""Stand-ins for a model's parameters with which evaluation mode computes the same in less time.

    .. math:: W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}, \quad b' = \beta + \gamma(b - \mu) / \sqrt{\sigma^2 +
              \varepsilon}

    for every batch normalization whose input is the output of one convolution or linear layer and of nothing else, as
    the autograd graph says. W' is the effective weight: its norm is what the function sees, whatever ‖W‖ is.

    The model itself is not changed: parameters are exchanged while :meth:`active` lasts, and put back.

    Args:
        module: in evaluation mode.
        logits: calls it.
        images: a few, as ``logits`` takes them.
        channels_last: whether to store the weights of convolutions in that order.

    Attributes:
        folded: names of the layers that a normalization was folded into, with the norms of W and W'.
    """

    def __init__(
        self, module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, channels_last: bool = True
    ) -> None:
        self.folded: dict[str, tuple[float, float]] = {}
        self._parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._skipped: list[nn.Module] = []
        self.channels_last = channels_last and images.ndim == 4
        self._parametrized = any(parametrize.is_parametrized(child) for child in module.modules())
        if not is_compiled(module):
            for source, feeder in _pairs(module, logits, images[:2]):
                self._fold(source, feeder)
        if self.channels_last:
            self._turn(module)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with the stand-ins meanwhile."""
        with ExitStack() as stack:
            for layer, name, parameter in self._parameters:
                stack.callback(layer._parameters.__setitem__, name, layer._parameters[name])
                layer._parameters[name] = parameter
            for layer in self._skipped:
                stack.callback(layer.__dict__.pop, "forward")
                layer.__dict__["forward"] = _identity
            if self._parametrized:
                stack.enter_context(parametrize.cached())
            yield

    @torch.no_grad()
    def _fold(self, source: Source, feeder: Feeder) -> None:
        layer, norm = feeder.layer, cast("Any", source.layer)
        mean, variance = (cast("Tensor", statistic).double() for statistic in source.statistics)
        factors = torch.rsqrt(variance + norm.eps)
        factors = factors if source.gamma is None else factors * source.gamma.double()
        shift = torch.zeros_like(factors) if source.beta is None else source.beta.double()
        weight, bias = cast("Tensor", layer.weight), layer._parameters.get("bias")
        folded = weight.double() * factors.view(-1, *[1] * (weight.ndim - 1))
        offset = shift - factors * mean if bias is None else shift + factors * (bias.double() - mean)
        self._stand_in(layer, "weight", folded.to(weight.dtype))
        self._stand_in(layer, "bias", offset.to(weight.dtype))
        self._skipped.append(source.layer)
        self.folded[feeder.name] = float(weight.double().norm()), float(folded.norm())

    def _turn(self, module: nn.Module) -> None:
        """Store the weights of two-dimensional convolutions with channels last."""
        done = {(layer, name): k for k, (layer, name, _) in enumerate(self._parameters)}
        for layer in module.modules():
            weight = layer._parameters.get("weight") if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else None
            if weight is None:
                continue
            at = done.get((layer, "weight"))
            source = weight if at is None else self._parameters[at][2]
            turned = _frozen(source.detach().contiguous(memory_format=torch.channels_last))
            if at is None:
                self._parameters.append((layer, "weight", turned))
            else:
                self._parameters[at] = (layer, "weight", turned)

    def _stand_in(self, layer: nn.Module, name: str, value: Tensor) -> None:
        self._parameters.append((layer, name, _frozen(value)))


def folded_model(
    module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, channels_last: bool = True
) -> FoldedModel | None:
    """Return a model's stand-ins, or None where they would not compute the same.

    Warns where folding changes logits by more than rounding.
    """
    try:
        folded = FoldedModel(module, logits, images, channels_last)
    except ConfigurationError:
        return None  # no graph to be had
    with torch.no_grad():
        expected = logits(images)
        with folded.active():
            found = logits(images)
    scale = expected.abs().amax().clamp_min(1e-30)
    if bool(((found - expected).abs() <= _TOLERANCE * scale).all()):
        return folded
    warn_once(
        "Folding batch normalization into the layers in front of it changes the logits by up to "
        f"{float((found - expected).abs().amax() / scale):.1e} of the largest, more than rounding; the model is "
        "evaluated as it is, which takes longer."
    )
    return None


def _pairs(module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor) -> Iterator[tuple[Source, Feeder]]:
    """Yield the batch normalizations that can be folded, and the layer in front of each."""
    wanted = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not any(isinstance(child, wanted) for child in module.modules()):
        return
    calls = Calls(module, logits)
    sources = [s for s in normalization_layers(calls) if isinstance(s.layer, wanted) and _plain(s)]
    seen: dict[int, int] = {}
    for child in module.modules():
        for parameter in child._parameters.values():
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    tied = {key for key, count in seen.items() if count > 1}
    inputs = inputs_by_graph(calls, sources, images)
    for source in sources:
        feeder = foldable(source, nn.Identity(), inputs[source.layer].feeders, tied)
        if isinstance(feeder, Feeder) and _foldable(feeder.layer):
            yield source, Feeder(feeder.name.removeprefix("module."), feeder.layer, feeder.direct)


def _plain(source: Source) -> bool:
    """Whether a layer computes what the formula says, and with running statistics."""
    return (
        len(source.names) == 1
        and source.statistics[1] is not None
        and not source.layer.training
        and not source.followers
        and not overrides(source.layer, "forward")
        and not parametrize.is_parametrized(source.layer)
        and not _hooked(source.layer)
    )


def _foldable(layer: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain = "weight" in layer._parameters and not parametrize.is_parametrized(layer)
    return isinstance(layer, kinds) and plain and not _hooked(layer)


def _hooked(layer: nn.Module) -> bool:
    """Whether somebody looks at what goes in or comes out."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


class Calls(nn.Module):
    """A model that is called in somebody's own way."""

    def __init__(self, module: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._logits = (logits,)  # a module would be registered

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self._logits[0](images)


def _identity(values: Tensor) -> Tensor:
    return values


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
