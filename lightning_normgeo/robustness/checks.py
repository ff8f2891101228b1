"""What an evaluation asks of images and labels, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.inputs.ranges import check_range
from lightning_normgeo.robustness.inputs.space import InputSpace, Space


def check_images(images: Tensor, inputs: InputSpace, space: Space = "pixel") -> None:
    """Check that images are floating point and, where the threat model is about pixels, within [0, 1] as such.

    Raises:
        UnsuitableError: otherwise.
    """
    if not images.is_floating_point():
        raise UnsuitableError(f"Images have dtype {images.dtype}; expected floating point in [0, 1].")
    if space != "input":
        check_range(images, inputs)


def check_labels(labels: Tensor, scores: Tensor) -> None:
    """Check that labels are class indices of the model's logits.

    Raises:
        UnsuitableError: otherwise.
    """
    if not isinstance(scores, Tensor):
        raise UnsuitableError(
            f"Expected logits (batch, classes), got {type(scores).__name__}. Override RobustnessEvaluation.logits to "
            "return the logits of a model with several outputs."
        )
    if scores.ndim != 2 or labels.ndim != 1 or scores.shape[0] != labels.shape[0]:
        raise UnsuitableError(
            f"Expected logits (batch, classes) and labels (batch,), got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}. Override RobustnessEvaluation.logits or .unpack for other models."
        )
    low, high = labels.amin().item(), labels.amax().item()
    if low < 0 or high >= scores.shape[1]:
        raise UnsuitableError(
            f"Labels span {low}…{high}, but the model has {scores.shape[1]} classes (0…{scores.shape[1] - 1}). "
            "Set num_classes to the number of classes in the data."
        )


@contextmanager
def undisturbed(module: nn.Module, fork_rng: bool = True) -> Iterator[None]:
    """Evaluation mode inside; outside everything is bit for bit what it was: modes, buffers, torch's random state.

    Buffers are what some layers write in evaluation mode too: observers of quantization, batch normalization that a
    project keeps in training mode.

    Works under ``torch.inference_mode``: gradients can be taken inside.

    Args:
        module: in whatever mode.
        fork_rng: whether random numbers are to be put back too.

    Cost: a copy of the buffers.
    """
    modes = {child: child.training for child in module.modules()}
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices, enabled=fork_rng):
        buffers = _Buffers(modes)
        try:
            module.eval()
            yield
        finally:
            for child, training in modes.items():
                child.training = training
            buffers.restore()


class _Buffers:
    """The buffers of modules and what is in them: one copy and one comparison for each dtype and device."""

    @torch.no_grad()
    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._groups: dict[tuple[torch.device, torch.dtype], list[_Buffer]] = {}
        for module in modules:
            for name, value in module._buffers.items():
                if value is not None:
                    kind = value.device, value.dtype
                    self._groups.setdefault(kind, []).append(_Buffer(module._buffers, name, value, value.shape))
        self._saved = {kind: _joined(group) for kind, group in self._groups.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was exchanged or written; nothing else is touched."""
        for kind, group in self._groups.items():
            for buffer in group:
                if buffer.table.get(buffer.name) is not buffer.value:
                    buffer.table[buffer.name] = buffer.value
            saved = self._saved[kind]
            if all(buffer.value.shape == buffer.shape for buffer in group) and torch.equal(_joined(group), saved):
                continue
            parts = torch.split(saved, [buffer.shape.numel() for buffer in group])
            for buffer, part in zip(group, parts, strict=True):
                content = part.view(buffer.shape)
                if buffer.value.shape != buffer.shape:
                    buffer.value.resize_(buffer.shape).copy_(content)
                elif not torch.equal(buffer.value, content):
                    buffer.value.copy_(content)


class _Buffer(NamedTuple):
    table: dict[str, Tensor | None]
    name: str
    value: Tensor
    shape: torch.Size


def _joined(group: Iterable[_Buffer]) -> Tensor:
    return torch.cat([buffer.value.detach().flatten() for buffer in group])
