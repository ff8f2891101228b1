"""A classifier as an evaluation calls it: for images of the threat model's space, with stand-ins for its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.robustness.attacks.projected_gradient import Logits, at_least_float32, inward
from lightning_normgeo.robustness.inputs.input_space import InputSpace
from lightning_normgeo.robustness.model.folded_model import FoldedModel, folded_model
from lightning_normgeo.robustness.model.precision import HALF, precision_of
from lightning_normgeo.robustness.model.rescaled_model import RescaledModel
from lightning_normgeo.robustness.settings import RobustnessSettings


class EvaluatedModel:
    """Calls a model in the precision, the memory format and with the weights of an evaluation.

    Args:
        logits: maps images, as the loader yields them, to class logits; in evaluation mode.
        inputs: how those images relate to pixels.
        settings: of the evaluation.
        module: holds the weights that ``logits`` uses; without it nothing is folded.

    Attributes:
        folded: what stands in for the model's weights; None before :meth:`prepare` and where nothing does.
        rescaled: what stands in for them in the control with longer weights, if asked for.
        precision: in which the model computes, without autocast.
    """

    def __init__(
        self, logits: Logits, inputs: InputSpace, settings: RobustnessSettings, module: nn.Module | None = None
    ) -> None:
        self.inputs = inputs
        self.settings = settings
        self.folded: FoldedModel | None = None
        self.rescaled: RescaledModel | None = None
        self.precision = "fp32"
        self.call = logits
        self._module = module
        self._compiled = torch.compile(logits) if settings.compile else logits
        self._device = "cpu"
        self._narrow: torch.dtype | None = None

    def prepare(self, images: Tensor, deterministic: bool = True) -> None:
        """Make the stand-ins of the weights, from a first batch as the loader yields it.

        Folding is checked by comparing logits, which a random model does not allow for.
        """
        self._device = images.device.type
        self._narrow = images.dtype if images.dtype in HALF else None
        self.precision = precision_of(images, self._module)
        if self._module is None:
            return
        if self.settings.fold and deterministic and self._narrow is None:
            last = self._device == "cpu" or self.settings.autocast is not None
            self.folded = folded_model(self._module, self.call, images, channels_last=last)
        if self.settings.rescale is not None:
            self.rescaled = RescaledModel(self._module, self.call, images, self.settings.rescale)

    @contextmanager
    def active(self, control: bool = False) -> Iterator[None]:
        """Compute in the precision and with the weights of the evaluation, or of the control, meanwhile."""
        stand_ins = self.rescaled if control else self.folded
        with ExitStack() as stack:
            if stand_ins is not None:
                stack.enter_context(stand_ins.active())
            if self.settings.autocast_dtype is not None:
                stack.enter_context(torch.autocast(self._device, self.settings.autocast_dtype))
            yield

    def weights(self) -> dict[str, Any]:
        """Return norms of weights as plain values: raw, effective, and in the control."""
        found: dict[str, Any] = {"effective_norms": {} if self.folded is None else self.folded.norms}
        if self.rescaled is not None:
            norms = {name: {"before": before, "after": after} for name, (before, after) in self.rescaled.layers.items()}
            found["rescaled"] = {
                "factor": self.rescaled.factor,
                "largest_logit_change": self.rescaled.difference,
                "norms": norms,
                "left_alone": list(self.rescaled.unscaled),
            }
        return found

    def to_space(self, images: Tensor) -> Tensor:
        """Bring images of the loader into the threat model's space, where attacks compute in float32 at least."""
        return self.inputs.to_space(at_least_float32(images), self.settings.threat.space)

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits of images of the threat model's space."""
        loaded = self.inputs.from_space(images, self.settings.threat.space)
        if self._narrow is not None:
            loaded = loaded.to(self._narrow)
        if self.folded is not None:
            loaded = self.folded.arranged(loaded)
        return at_least_float32(self._compiled(loaded))

    @property
    def representable(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What brings attacked images to values that the model's precision has; None where it has all."""
        return None if self._narrow is None else self._rounded_inward

    def _rounded_inward(self, attacked: Tensor, images: Tensor) -> Tensor:
        """Round toward the original, so that no image leaves its ball by rounding."""
        assert self._narrow is not None  # noqa: S101
        space = self.settings.threat.space
        inside, origin = (self.inputs.from_space(x, space) for x in (attacked, images))
        rounded = inward(inside, origin.to(self._narrow).to(inside.dtype), self._narrow)
        return self.inputs.to_space(rounded.to(inside.dtype), space)
