"""Probe of the inputs of layers: references taken in the forward pass, read before the backward pass frees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from lightning_normgeo.errors import skipped_on_error, warn_once
from lightning_normgeo.geometry.batches.batch_outputs import orthogonality_gap
from lightning_normgeo.geometry.input_covariance.input_geometry import (
    EXACT_UP_TO,
    PROBES,
    InputGeometry,
    input_geometry,
)
from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.normalization.autograd.reentrant_checkpoints import runs_again
from lightning_normgeo.probes.batch_norm.autograd_node import is_inside_backward
from lightning_normgeo.probes.layer_inputs.layers import batched, count_vectors, patch_map_of
from lightning_normgeo.utilities.tf32 import full_float32

GAP_SAMPLES = 256
"""The largest number of samples in the orthogonality gap, whose cost is quadratic in it."""
_CHANGED = "its input was changed in place after it was read"
_NOT_FINITE = "its input is not finite"
_TOO_FEW = "its input has a single vector"
_EVALUATES = "none of the chosen layers ran in training mode"
_NOT_CALLED = "none of the chosen layers was called; another module may compute with their weights, as an adapter does"
_VMAPPED = "it ran under torch.func.vmap, which gives it one sample of a batch"


@dataclass(frozen=True)
class InputSettings:
    """Settings of the measurement of Σ_X, as :func:`.input_geometry` takes them."""

    probes: int = PROBES
    exact_up_to: int = EXACT_UP_TO
    seed: int = 0


@dataclass(frozen=True)
class LayerGeometry:
    """Geometry of the inputs of one layer in one batch.

    Attributes:
        inputs: rank, kernel and spectrum of Σ_X. Kernel shares are NaN where the weight is parametrized.
        gap: orthogonality gap of the input, over its first 256 samples.
    """

    inputs: InputGeometry
    gap: Tensor


class _Noted(NamedTuple):
    """Input of a layer, and its version when the layer read it."""

    x: Tensor
    version: int


class InputProbe:
    """Reads the input of each layer in its first forward pass in training mode between :meth:`arm` and :meth:`collect`.

    Hooks are on the layers only until they have run. The probe keeps references, which autograd keeps until the
    backward pass anyway; inside activation checkpoints and under ``no_grad`` it is the probe that keeps them until
    then. The training's random numbers are not used.

    Args:
        layers: readable layers by module path.
        settings: of the measurement. Default: those of :class:`InputSettings`.

    Attributes:
        skipped: number of inputs that were left out, by reason.
    """

    def __init__(self, layers: Mapping[str, nn.Module], settings: InputSettings | None = None) -> None:
        self.layers = dict(layers)
        self.settings = settings or InputSettings()
        self.skipped: Counter[str] = Counter()
        self._handles: dict[str, RemovableHandle] = {}
        self._noted: dict[str, _Noted] = {}
        self._found: dict[str, LayerGeometry] = {}
        self._armed = self._called = False

    def arm(self) -> None:
        """Begin to observe the forward passes of a step."""
        self.disarm()
        self._armed = True
        self.resume()

    def resume(self) -> None:
        """Observe the layers that have not run yet."""
        self.pause()
        for name, layer in self.layers.items():
            if name not in self._noted and name not in self._found:
                self._handles[name] = layer.register_forward_hook(partial(self._note, name), with_kwargs=True)

    def pause(self) -> None:
        """Remove the hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def disarm(self) -> None:
        """Remove the hooks and forget everything."""
        self.pause()
        self._noted, self._found = {}, {}
        self._armed = self._called = False

    def close(self) -> None:
        """Measure the inputs read since the last call, before a backward pass or an update."""
        noted, self._noted = self._noted, {}
        for name, one in noted.items():
            found = self._measured(name, one)
            if found is not None:
                self._found[name] = found

    def collect(self) -> dict[str, LayerGeometry]:
        """Return the geometry measured since :meth:`arm`, by module path in the order of the layers, and disarm."""
        found = {name: self._found[name] for name in self.layers if name in self._found}
        if self._armed and self.layers and not found:
            why = ", ".join(self.skipped) or (_EVALUATES if self._called else _NOT_CALLED)
            warn_once(f"No inputs of layers could be read, so that nothing is known about Σ_X: {why}.")
        self.disarm()
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @skipped_on_error
    def _note(self, name: str, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        """Forward hook of a layer."""
        self._called = True
        x = args[0] if args else keywords.get("input")
        if not layer.training or name in self._noted or name in self._found or is_inside_backward() or runs_again():
            return
        if isinstance(x, Tensor) and _is_vmapped(x):  # which cannot be read once vmap has returned
            self.skipped[_VMAPPED] += 1
        elif isinstance(x, Tensor) and x.is_floating_point() and x.numel():
            self._noted[name] = _Noted(x.detach(), x._version)

    @skipped_on_error
    def _measured(self, name: str, noted: _Noted) -> LayerGeometry | None:
        layer, x = self.layers[name], noted.x
        if x._version != noted.version:
            self.skipped[_CHANGED] += 1
            return None
        x = on_observing_device(x)
        # TF32, the default of convolutions on a GPU, is coarser than the bounds on rounding that ranks are found by
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), full_float32():
            if not x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite():
                self.skipped[_NOT_FINITE] += 1
                return None
            return self._geometry(layer, x)

    def _geometry(self, layer: nn.Module, x: Tensor) -> LayerGeometry | None:
        vectors, settings = batched(layer, x), self.settings
        if count_vectors(layer, vectors) < 2:
            self.skipped[_TOO_FEW] += 1
            return None
        samples = (vectors if x.ndim < 2 or vectors.ndim > 2 else x)[:GAP_SAMPLES]
        return LayerGeometry(
            input_geometry(
                vectors, patch_map_of(layer), _weight(layer), settings.probes, settings.exact_up_to, settings.seed
            ),
            orthogonality_gap(samples.to(torch.promote_types(x.dtype, torch.float32))),
        )


def _is_vmapped(x: Tensor) -> bool:
    """Whether a tensor stands for one sample of a batch, inside any function transforms."""
    transforms = torch._C._functorch
    while transforms.is_functorch_wrapped_tensor(x):
        if transforms.is_batchedtensor(x):
            return True
        x = transforms.get_unwrapped(x)
    return False


def _weight(layer: nn.Module) -> Tensor | None:
    """Return the filters of a layer; None for a parametrized weight, since computing it may change buffers."""
    if is_parametrized(layer, "weight"):
        return None
    weight = layer.weight
    return on_observing_device(weight.detach()) if isinstance(weight, Tensor) else None
