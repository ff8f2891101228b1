"""Control experiment on raw weight norms: rescaled scale-invariant weights, the same function, the same robustness."""

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
from lightning_normgeo.geometry.rows import on_observing_device, stored_like
from lightning_normgeo.normalization.names import by_clean_name, clean_name
from lightning_normgeo.normalization.surgery.preceding_layers import trainable
from lightning_normgeo.robustness.model.folded_model import FoldedModel
from lightning_normgeo.robustness.model.image_copies import on_copies
from lightning_normgeo.robustness.model.parameter_swap import (
    LogitsModule,
    ParameterSlot,
    logit_change,
    swapped_parameters,
)
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.symmetries import Units, scale_invariant_units
from lightning_normgeo.utilities.tf32 import full_float32

_TOLERANCE = 0.05
"""Largest change of a logit, relative to the largest logit, for which the function counts as the same except for ε."""
_LINEAR = 1e-3
"""Largest relative residual of x' = rx + c for a normalization's input: the ε of other normalizations in front of it
causes a small one."""


class RescaledModel:
    r"""Parameters with every scale-invariant unit multiplied by α, so that the function is the same except for ε.

    .. math:: V' = \alpha V, \quad \mu' = r\mu + c, \quad \sigma'^2 = r^2\sigma^2

    for every weight V that is proven scale invariant (with its bias if only both together are), and for the running
    statistics of every batch normalization, whose input x becomes :math:`x' = rx + c` in each channel. r has one factor
    α for each rescaled weight that the input is linear in (α² behind a depthwise and a pointwise convolution). c is
    zero, unless the layer in front has a bias that was not rescaled because the normalization's centering removes it.

    Both r and c are measured, by least squares over one forward pass of the original and one of the rescaled model. In
    these passes every batch normalization returns the same positive noise instead of its output, so that no channel is
    dead and the change of one layer does not reach the next.

    ε is not rescaled, as it would not be if training had made the weights longer. In each channel of a batch
    normalization this changes the output by the factor

    .. math:: \sqrt{\frac{\sigma^2 + \varepsilon}{\sigma^2 + \varepsilon / r^2}}
              \approx 1 + \frac{\varepsilon}{2\sigma^2}\Bigl(1 - \frac{1}{r^2}\Bigr),

    which is at most :math:`1 + \varepsilon/2\sigma^2` for every α > 1; likewise in group and layer normalization.

    The model itself is not changed: its parameters and buffers are replaced only inside :meth:`active`.

    Args:
        module: the model, in any mode; it has to be in evaluation mode inside :meth:`active`.
        logits: maps images to the logits of ``module``.
        images: at least two images, ``(batch, channels, …)``, as ``logits`` takes them.
        factor: α, positive and finite.

    Attributes:
        layers: the norms before and after, for each rescaled weight by the path of its module.
        unscaled: paths of the modules whose weights were not rescaled, since they are not proven scale invariant.
        ratios: the smallest and the largest r of each batch normalization with running statistics, by its path.
        difference: largest change of a logit of ``images``, relative to the largest logit.

    Raises:
        ConfigurationError: for a factor that is not positive and finite; a compiled model, one without scale-invariant
            weights, or one whose autograd graph cannot be read; an input of a batch normalization that does not scale
            by one r per channel; and logits that change by more than 5% of the largest, where ε is not small against
            the variances, so that the function is not the same.

    Cost: four forward passes of ``images``, and the search for scale-invariant units on two of them.
    """

    def __init__(
        self, module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, factor: float = 10.0
    ) -> None:
        if not 0 < factor < math.inf:
            raise ConfigurationError(
                f"factor={factor!r} must be a number, positive and finite, as 10.0: only positive numbers leave the "
                "function unchanged."
            )
        self.factor = factor
        self.layers: dict[str, tuple[float, float]] = {}
        self.unscaled: list[str] = []
        self.ratios: dict[str, tuple[float, float]] = {}
        self._places: list[ParameterSlot] = []
        logits = on_copies(logits)
        with preserved_state(module), torch.no_grad(), full_float32():
            self._scale(module, _units_of_training(module, logits, images[:2]))
            self._follow(module, logits, images)
            self.difference = self._checked_difference(logits, images)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the model has the rescaled weights and the running statistics that go with them."""
        with swapped_parameters(self._places):
            yield

    def _scale(self, module: nn.Module, found: Units) -> None:
        """Rescale every weight that is scale invariant, and list the others."""
        parameters = by_clean_name(module.named_parameters())
        for units in found:
            path, weight = LogitsModule.own_name(units.layer), parameters[LogitsModule.own_name(units.name)]
            if not units.invariant:
                self.unscaled.append(path)
                continue
            rescaled = self._rescale(module, weight)
            if units.bias is not None:
                self._rescale(module, parameters[LogitsModule.own_name(units.bias)])
            self.layers[path] = _norm(weight), _norm(rescaled)
        if not self.layers:
            raise ConfigurationError(
                f"The model has no scale-invariant weight that could be multiplied by {self.factor:g}. Leave out "
                "rescale, or evaluate a model with normalization."
            )

    def _rescale(self, module: nn.Module, parameter: nn.Parameter) -> Tensor:
        """Replace a parameter by α times its value, in every module that shares it."""
        rescaled = nn.Parameter(parameter * self.factor, requires_grad=False)
        for layer in module.modules():
            for name, own in layer._parameters.items():
                if own is parameter:
                    self._places.append((layer._parameters, name, rescaled))
        return rescaled

    def _follow(self, module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor) -> None:
        """Replace the running statistics by those of the rescaled model's inputs."""
        norms = {layer: name for name, layer in module.named_modules() if _has_statistics(layer)}
        before = _inputs_behind_noise(list(norms), logits, images)
        with self.active():
            after = _inputs_behind_noise(list(norms), logits, images)
        for layer, inputs in before.items():
            name = clean_name(norms[layer])
            ratio, offset = _relation(name, inputs, after[layer])
            self.ratios[name] = float(ratio.min()), float(ratio.max())
            mean, variance = (cast("Tensor", layer._buffers[key]) for key in ("running_mean", "running_var"))
            scaled = {
                "running_mean": ratio * on_observing_device(mean).double() + offset,
                "running_var": ratio.square() * on_observing_device(variance).double(),
            }
            for key, values in scaled.items():
                stored = stored_like(cast("Tensor", layer._buffers[key]), values)
                self._places.append((layer._buffers, key, stored))

    def _checked_difference(self, logits: Callable[[Tensor], Tensor], images: Tensor) -> float:
        difference = logit_change(self.active(), logits, images)
        if math.isnan(difference):
            raise ConfigurationError("No image has finite logits, so the control cannot be checked. Check the weights.")
        if not difference <= _TOLERANCE:
            raise ConfigurationError(
                f"With scale-invariant weights multiplied by {self.factor:g} the logits change by {difference:.1e} of "
                f"the largest, more than {_TOLERANCE:g}: eps is not small against the variances of the normalizations, "
                "or the model uses these weights in a way that is not recognized. Such a model does depend on its raw "
                "weight norms, so the control does not apply. If these images are unlike the training data, give "
                "images like those."
            )
        return difference


def effective_norms(
    module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor
) -> dict[str, dict[str, float]]:
    r"""Return the raw and the effective weight norm of each layer that a batch normalization directly follows.

    ``raw`` is ‖W‖ and ``effective`` is :math:`\lVert\gamma W / \sqrt{\sigma^2 + \varepsilon}\rVert`, as in
    :class:`FoldedModel`. Inside :meth:`RescaledModel.active` only the raw norm is multiplied by α.

    Args:
        module: the model, in evaluation mode.
        logits: maps images to the logits of ``module``.
        images: at least one image, ``(batch, channels, …)``, as ``logits`` takes them.

    Returns:
        The two norms by the name of the layer.

    Raises:
        ConfigurationError: if the autograd graph of the model cannot be read.

    Cost: as :class:`FoldedModel`.
    """
    return FoldedModel(module, logits, images, channels_last=False).norms


def _units_of_training(module: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor) -> Units:
    """Return the scale-invariant units of a model while batch normalization uses the statistics of the batch.

    With running statistics, which are constants, no weight would be scale invariant. Only batch normalizations are put
    into training mode: that of dropout and spectral normalization would change the function.
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
    return float(on_observing_device(weight).double().norm())


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None


def _inputs_behind_noise(
    norms: list[nn.Module], logits: Callable[[Tensor], Tensor], images: Tensor
) -> dict[nn.Module, Tensor]:
    """Return the inputs of normalizations, ``(channels, …)``, while all normalizations return the same noise.

    The inputs of several calls of a layer are concatenated.
    """
    reads: dict[nn.Module, list[Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value: Tensor = args[0] if args else kwargs["input"]
        reads[layer].append(value.detach().movedim(1, 0).flatten(1))

    def noise(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Uniform in [0.5, 1.5]: at zero a ReLU has a kink and a square root an infinite slope."""
        return torch.rand(output.shape, generator=generator).add(0.5).to(output)

    with ExitStack() as stack:
        for layer in norms:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(noise).remove)
        logits(images)
    return {layer: torch.cat(values, 1) for layer, values in reads.items()}


def _relation(name: str, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and c of x' = rx + c for each channel, by least squares.

    For a channel that is constant r is not determined: it gets the median of the other channels, and c fits the rest.
    Positions where the input is not finite, as in images with NaN in a pixel, are left out.
    """
    finite = before.isfinite().all(0)
    if not finite.all():
        before, after = before[:, finite], after[:, finite]
    if not before.shape[1]:
        raise ConfigurationError(
            f"The input of batch normalization {name!r} is finite nowhere in these images, so its change by the "
            "control cannot be measured. Check the weights, and give images with finite values."
        )
    rounding = math.sqrt(torch.finfo(before.dtype).eps)
    x, y = (on_observing_device(inputs).double() for inputs in (before, after))
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
