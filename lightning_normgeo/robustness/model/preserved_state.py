"""Evaluation mode inside a context that restores a model's state and the random states."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_normgeo.normalization.autograd.side_effects import Attributes, random_states, silence
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import mixed_seed
from lightning_normgeo.robustness.model.parameter_swap import ParameterSlot, swapped_parameters


@contextmanager
def preserved_state(module: nn.Module, fork_rng: bool = True) -> Iterator[None]:
    """Context with a model in evaluation mode, after which its state is restored bit for bit.

    Restored are, for every submodule, the training mode, the buffers and the attributes (with the entries of lists,
    dictionaries and sets, one level deep); the parameters of submodules that override ``train``, which may merge
    weights; and the random states of torch, numpy and Python. A LightningModule's ``log`` and ``log_dict`` do nothing
    inside.

    Works under ``torch.inference_mode``: gradients can be taken inside, since parameters that are inference tensors are
    temporarily replaced by clones.

    Args:
        module: the model, in any mode.
        fork_rng: whether to restore the random states too.

    Cost: a copy of the buffers, and of the attributes' references.
    """
    children = list(module.modules())
    with torch.inference_mode(False), _random_states(module, fork_rng):
        attributes, buffers = [Attributes(child) for child in children], _Tensors(_buffers(children))
        merged = _Tensors(_parameters(child for child in children if _overrides_train(child)))
        try:
            with swapped_parameters(_inference_parameters(children)):
                module.eval()
                for child in children:
                    silence(child)
                yield
        finally:
            for kept in attributes:
                kept.restore()
            buffers.restore()
            merged.restore()


@contextmanager
def seeded(seed: int, index: int) -> Iterator[None]:
    """Context with random numbers of torch, numpy and Python from a seed and an index; restores the random states."""
    mixed = mixed_seed(seed, index)
    with random_states(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):  # type: ignore[no-untyped-call]
        torch.manual_seed(mixed)  # on every device
        np.random.seed(mixed % 2**32)  # noqa: NPY002 - what models and attacks draw from
        random.seed(mixed)
        yield


@contextmanager
def _random_states(module: nn.Module, wanted: bool) -> Iterator[None]:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    with random_states([device] if device.type == "cuda" else []) if wanted else ExitStack():
        yield


def _overrides_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train


def _inference_parameters(modules: Iterable[nn.Module]) -> list[ParameterSlot]:
    """Return clones for parameters that are inference tensors, as callbacks make them that swap weights for a test."""
    return [
        (module._parameters, name, nn.Parameter(value.clone(), requires_grad=value.requires_grad))
        for module in modules
        for name, value in module._parameters.items()
        if value is not None and value.is_inference()
    ]


class _Entry(NamedTuple):
    """A tensor at its place in a module's dictionary of parameters or buffers, with its shape when it was saved."""

    table: Any
    name: str
    value: Tensor
    shape: torch.Size


def _buffers(modules: Iterable[nn.Module]) -> Iterator[_Entry]:
    for module in modules:
        for name, value in module._buffers.items():
            if value is not None and value.layout == torch.strided:
                yield _Entry(module._buffers, name, value, value.shape)


def _parameters(modules: Iterable[nn.Module]) -> Iterator[_Entry]:
    for module in modules:
        for name, value in module._parameters.items():
            if value is not None:
                yield _Entry(module._parameters, name, value, value.shape)


class _Tensors:
    """The saved tensors of a model and their values, with one copy and one comparison per dtype and device."""

    @torch.no_grad()
    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._groups: dict[tuple[torch.device, torch.dtype], list[_Entry]] = {}
        for entry in entries:
            self._groups.setdefault((entry.value.device, entry.value.dtype), []).append(entry)
        self._saved = {kind: _joined(group) for kind, group in self._groups.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore tensors that were replaced or written; unchanged ones are not written to."""
        for kind, group in self._groups.items():
            for entry in group:
                if entry.name not in entry.table or entry.table[entry.name] is not entry.value:
                    entry.table[entry.name] = entry.value
            saved = self._saved[kind]
            if all(entry.value.shape == entry.shape for entry in group) and torch.equal(_joined(group), saved):
                continue
            parts = torch.split(saved, [entry.shape.numel() for entry in group])
            for entry, part in zip(group, parts, strict=True):
                content = part.view(entry.shape)
                if entry.value.shape != entry.shape:
                    entry.value.resize_(entry.shape).copy_(content)
                elif not torch.equal(entry.value, content):
                    entry.value.copy_(content)


def _joined(group: Iterable[_Entry]) -> Tensor:
    return torch.cat([entry.value.detach().flatten() for entry in group])
