"""The control experiment on raw norms: longer scale-invariant weights, the same function, the same robustness."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.normalization import Units, scale_invariant_units
from lightning_normgeo.normalization.names import by_clean_name, clean_name
from lightning_normgeo.normalization.surgery.preceding_layers import trainable
from lightning_normgeo.robustness.model.folded_model import FoldedModel
from lightning_normgeo.robustness.model.parameter_swap import (
    LogitsModule,
    ParameterSlot,
    logit_change,
    swapped_parameters,
)
from lightning_normgeo.robustness.model.precision import full_float32
from lightning_normgeo.robustness.model.preserved_state import preserved_state

_TOLERANCE = 0.05
"""Largest change of a logit, relative to the largest logit, for which the function counts as the same but for ε."""
_LINEAR = 1e-3
"""Largest part of a normalization's input that may not be linear in what it was: that is the ε of other kinds."""


class RescaledModel:
    r"""Stand-ins with which every scale-invariant unit is α times as long, and the function the same but for ε.

    .. math:: V' = \alpha V, \quad \mu' = r\mu + c, \quad \sigma'^2 = r^2\sigma^2

    for every weight V with an established invariance, with its bias where only both jointly are invariant, and the
    running statistics of every batch normalization, whose input x becomes :math:`x' = rx + c`, channel by channel. r
    is α for each scaled weight that the input is linear in (α² behind a depthwise and a pointwise convolution); c is
    zero, unless a bias that the normalization centers away stayed what it was. Both are measured, by least squares over
    one forward pass of each network in which every batch normalization returns the same positive noise: no channel is
    dead, and what is done to one layer does not reach the next.

    ε stays what it is, as it would in a longer training. In each channel of a batch normalization that changes the
    output by the factor

    .. math:: \sqrt{\frac{\sigma^2 + \varepsilon}{\sigma^2 + \varepsilon / r^2}}
              \approx 1 + \frac{\varepsilon}{2\sigma^2}\Bigl(1 - \frac{1}{r^2}\Bigr),

    which no α > 1 makes larger than :math:`1 + \varepsilon/2\sigma^2`; likewise in group and layer normalization.

    The model itself is not changed: parameters and buffers are exchanged while :meth:`active` lasts, and put back.

    Args:
        module: its modes do not matter here; in evaluation mode while :meth:`active` lasts.
        logits: calls it.
        images: a few, two at least, as ``logits`` takes them.
        factor: α.

    Attributes:
        layers: module paths of the scaled weights, with their norms before and after.
        unscaled: module paths of the weights left alone, since no invariance was established.
        ratios: module paths of the batch normalizations with statistics of their own, with the smallest and the
            largest r.
        difference: largest change of a logit of ``images``, relative to the largest logit.

    Raises:
        ConfigurationError: for a factor that is no symmetry, a compiled model, one whose graph cannot be seen, an
            input of a batch normalization that does not scale by one r per channel, and logits that change by more
            than 5% of the largest, where ε is of the size of the variances and the control would be none.
    """

    def __init__(
        self, module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, factor: float = 10.0
    ) -> None:
        if not 0 < factor < math.inf:
            raise ConfigurationError(f"factor={factor!r}: only positive numbers are symmetries. Choose one, as 10.0.")
        self.factor = factor
        self.layers: dict[str, tuple[float, float]] = {}
        self.unscaled: list[str] = []
        self.ratios: dict[str, tuple[float, float]] = {}
        self._places: list[ParameterSlot] = []
        with preserved_state(module), torch.no_grad(), full_float32():
            self._scale(module, _units_of_training(module, logits, images[:2]))
            self._follow(module, logits, images)
            self.difference = self._checked_difference(logits, images)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with the stand-ins meanwhile."""
        with swapped_parameters(self._places):
            yield

    def _scale(self, module: nn.Module, found: Units) -> None:
        parameters = by_clean_name(module.named_parameters())
        for units in found:
            path, weight = LogitsModule.own_name(units.layer), parameters[LogitsModule.own_name(units.name)]
            if not units.invariant:
                self.unscaled.append(path)
                continue
            longer = self._stand_in(module, weight)
            if units.bias is not None:
                self._stand_in(module, parameters[LogitsModule.own_name(units.bias)])
            self.layers[path] = _norm(weight), _norm(longer)

    def _stand_in(self, module: nn.Module, parameter: nn.Parameter) -> Tensor:
        """Let a longer parameter stand in, wherever it is."""
        longer = nn.Parameter(parameter * self.factor, requires_grad=False)
        for layer in module.modules():
            for name, own in layer._parameters.items():
                if own is parameter:
                    self._places.append((layer._parameters, name, longer))
        return longer

    def _follow(self, module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor) -> None:
        """Let running statistics follow the inputs that they are of."""
        norms = {layer: name for name, layer in module.named_modules() if _has_statistics(layer)}
        before = _inputs_behind_noise(list(norms), logits, images)
        with self.active():
            after = _inputs_behind_noise(list(norms), logits, images)
        for layer, inputs in before.items():
            name = clean_name(norms[layer])
            ratio, offset = _relation(name, inputs, after[layer])
            self.ratios[name] = float(ratio.min()), float(ratio.max())
            mean, variance = (cast("Tensor", layer._buffers[key]) for key in ("running_mean", "running_var"))
            wide = wide_dtype(mean.device)
            self._places.append((layer._buffers, "running_mean", (ratio * mean.to(wide) + offset).to(mean.dtype)))
            self._places.append(
                (layer._buffers, "running_var", (ratio.square() * variance.to(wide)).to(variance.dtype))
            )

    def _checked_difference(self, logits: Callable[[Tensor], Tensor], images: Tensor) -> float:
        difference = logit_change(self.active(), logits, images)
        if not difference <= _TOLERANCE:
            raise ConfigurationError(
                f"With weights {self.factor:g} times as long the logits change by {difference:.1e} of the largest, "
                f"more than {_TOLERANCE:g}: eps is not small against the variances that are normalized by, or a "
                "function of these weights is none that is known. The raw norms of such a model do have an effect "
                "on what it computes, and there is nothing to control for; give images like those it was trained on "
                "if these are not."
            )
        return difference


def effective_norms(
    module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor
) -> dict[str, dict[str, float]]:
    r"""Return for each layer with a batch normalization right behind it what its weight is, and what its function sees.

    ``raw`` is ‖W‖ and ``effective`` is :math:`\lVert\gamma W / \sqrt{\sigma^2 + \varepsilon}\rVert`, as in
    :class:`FoldedModel`. While :meth:`RescaledModel.active` lasts only the first is α times as large.

    Args:
        module: in evaluation mode.
        logits: calls it.
        images: a few, as ``logits`` takes them.
    """
    return FoldedModel(module, logits, images, channels_last=False).norms


def _units_of_training(module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor) -> Units:
    """Return the units that a model has where batch normalization takes its statistics from the batch.

    Nothing else goes into training mode: dropout and spectral normalization have no part in what is invariant.
    """
    norms = [layer for layer in module.modules() if _has_statistics(layer)]
    try:
        for layer in norms:
            layer.training = True
        with trainable(module):
            return scale_invariant_units(LogitsModule(module, logits), images)
    finally:
        for layer in norms:
            layer.training = False


def _norm(weight: Tensor) -> float:
    return float(weight.to(wide_dtype(weight.device)).norm())


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None


def _inputs_behind_noise(
    norms: list[nn.Module], logits: Callable[[Tensor], Tensor], images: Tensor
) -> dict[nn.Module, Tensor]:
    """Return what each layer reads, ``(channels, …)``, all calls in one, where all of them return noise."""
    reads: dict[nn.Module, list[Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value: Tensor = args[0] if args else kwargs["input"]
        reads[layer].append(value.detach().movedim(1, 0).flatten(1))

    def noise(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Away from zero, where an activation may have a kink and a root no slope."""
        return torch.rand(output.shape, generator=generator).add(0.5).to(output)

    with ExitStack() as stack:
        for layer in norms:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(noise).remove)
        logits(images)
    return {layer: torch.cat(values, 1) for layer, values in reads.items()}


def _relation(name: str, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and c of x' = rx + c for each channel, by least squares.

    Of a channel that is constant r cannot be told and c says it all: it takes the median of the others.
    """
    rounding = math.sqrt(torch.finfo(before.dtype).eps)
    x, y = (inputs.to(wide_dtype(inputs.device)) for inputs in (before, after))
    centered = x - x.mean(1, keepdim=True)
    varies = centered.norm(dim=1) > rounding * x.norm(dim=1)
    ratio = (centered * y).sum(1) / centered.square().sum(1)
    ratio = ratio.where(varies, ratio[varies].median() if varies.any() else ratio.new_ones(()))
    offset = y.mean(1) - ratio * x.mean(1)
    left = (y - ratio[:, None] * x - offset[:, None]).norm(dim=1)
    if not bool((left <= max(_LINEAR, rounding) * y.norm(dim=1)).all()):
        raise ConfigurationError(
            f"The input of batch normalization {name!r} does not scale by one number per channel where the "
            "scale-invariant weights are scaled, so no running statistics leave the function the same. Is it called "
            "at several places of different scale, or does anything in front of it compute with random numbers?"
        )
    return ratio, offset
