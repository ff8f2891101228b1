"""A classifier for images in the threat model's space, with folded or rescaled weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.robustness.attacks.search.ball import inward
from lightning_normgeo.robustness.attacks.search.losses import at_least_float32
from lightning_normgeo.robustness.attacks.search.projected_gradient import Logits
from lightning_normgeo.robustness.inputs.input_space import InputSpace
from lightning_normgeo.robustness.model.folded_model import FoldedModel, folded_model
from lightning_normgeo.robustness.model.image_copies import on_copies
from lightning_normgeo.robustness.model.precision import HALF, precision_of
from lightning_normgeo.robustness.model.rescaled_model import RescaledModel
from lightning_normgeo.robustness.settings import RobustnessSettings


class EvaluatedModel:
    """Calls a model with images in the threat model's space, with the precision and the weights of an evaluation.

    Args:
        logits: maps images, as the loader yields them, to class logits; in evaluation mode.
        inputs: how those images relate to pixels.
        settings: the settings of the evaluation.
        module: holds the weights that ``logits`` uses. Default: none, and batch normalization is not folded.
        surrogate: the same for another model, of which attacks are transferred; None if there is none.

    Attributes:
        folded: the model with folded batch normalization; None before :meth:`prepare` and without folding.
        rescaled: the model with rescaled weights, for the control; None if there is no control.
        precision: the precision of the model without autocast (``fp32``, ``tf32``, ``bf16``, …).
    """

    def __init__(
        self,
        logits: Logits,
        inputs: InputSpace,
        settings: RobustnessSettings,
        module: nn.Module | None = None,
        surrogate: Logits | None = None,
    ) -> None:
        self.inputs = inputs
        self.settings = settings
        self.folded: FoldedModel | None = None
        self.rescaled: RescaledModel | None = None
        self.precision = "fp32"
        self.call = on_copies(logits)
        self._module, self._other = module, None if surrogate is None else on_copies(surrogate)
        self._compiled = torch.compile(self.call) if settings.compile else self.call
        self._device = "cpu"
        self._narrow: torch.dtype | None = None

    def prepare(self, images: Tensor, deterministic: bool = True) -> None:
        """Make the folded and the rescaled weights.

        Args:
            images: the first batch, as the loader yields it.
            deterministic: whether the model is deterministic. If not, nothing is folded: whether folding leaves the
                function unchanged is checked by comparing logits, and random ones differ anyway.
        """
        self._device = images.device.type
        self._narrow = images.dtype if images.dtype in HALF else None
        self.precision = precision_of(images, self._module)
        if self._module is None:
            return
        if self.settings.fold and deterministic and self._narrow is None:
            # the layout in which convolutions are fastest: on a GPU that is channels last for half precision only
            channels_last = self._device == "cpu" or self.settings.autocast is not None
            self.folded = folded_model(self._module, self.call, images, channels_last=channels_last)
        if self.settings.rescale is not None:
            self.rescaled = RescaledModel(self._module, self.call, images, self.settings.rescale)

    @contextmanager
    def active(self, control: bool = False) -> Iterator[None]:
        """Context in which the model has the precision and the weights of the evaluation, or of the control."""
        replacement = self.rescaled if control else self.folded
        with ExitStack() as stack:
            if replacement is not None:
                stack.enter_context(replacement.active())
            if self.settings.verified:
                stack.enter_context(torch.autocast(self._device, enabled=False))
            elif self.settings.autocast_dtype is not None:
                stack.enter_context(torch.autocast(self._device, self.settings.autocast_dtype))
            yield

    def weights(self) -> dict[str, Any]:
        """Return weight norms as plain values: raw and effective ones, and those of the control."""
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
        """Convert images of the loader to the threat model's space, in at least float32, the precision of attacks."""
        return self.inputs.to_space(at_least_float32(images), self.settings.threat.space)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images in the threat model's space."""
        loaded = self._loaded(images)
        if self.folded is not None:
            loaded = self.folded.arranged(loaded)
        return at_least_float32(self._compiled(loaded))

    @property
    def search(self) -> Logits:
        """The logits that attacks follow: in half precision if decisions are verified, else those of the model."""
        return self._halved(self) if self.settings.verified else self

    @property
    def search_surrogate(self) -> Logits | None:
        """The surrogate's logits that attacks follow; None if there is no surrogate."""
        found = self.surrogate
        return self._halved(found) if found is not None and self.settings.verified else found

    def _halved(self, logits: Logits) -> Logits:
        def halved(images: Tensor) -> Tensor:
            with torch.autocast(self._device, self.settings.autocast_dtype):
                return logits(images)

        return halved

    @property
    def surrogate(self) -> Logits | None:
        """The logits of the surrogate for images in the threat model's space; None if there is no surrogate."""
        return None if self._other is None else self._of_surrogate

    def _of_surrogate(self, images: Tensor) -> Tensor:
        assert self._other is not None  # noqa: S101
        return at_least_float32(self._other(self._loaded(images)))

    def _loaded(self, images: Tensor) -> Tensor:
        """Return images of the threat model's space as the loader yields them, in the model's precision."""
        loaded = self.inputs.from_space(images, self.settings.threat.space)
        return loaded if self._narrow is None else loaded.to(self._narrow)

    @property
    def representable(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Rounds attacked images to the model's half precision, given the originals; None for other precisions."""
        return None if self._narrow is None else self._rounded_inward

    def _rounded_inward(self, attacked: Tensor, images: Tensor) -> Tensor:
        """Round attacked images toward the originals, so that rounding takes no image out of its ball."""
        assert self._narrow is not None  # noqa: S101
        space = self.settings.threat.space
        inside, origin = (self.inputs.from_space(x, space) for x in (attacked, images))
        rounded = inward(inside, origin.to(self._narrow).to(inside.dtype), self._narrow)
        return self.inputs.to_space(rounded.to(inside.dtype), space)
