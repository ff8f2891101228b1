"""Raw and effective weight of each layer: norms, and spectral norms of the linear maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.geometry.spectral_norms import SpectralNorm, largest_singular_value
from lightning_normgeo.normalization.folding import scale_and_shift
from lightning_normgeo.normalization.parametrizations import Linear, parametrization_title, parametrizations_of
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer, overrides
from lightning_normgeo.robustness.effective.linear_maps import (
    along_channels,
    linear_map,
    smallest_input,
    unit_norms,
)
from lightning_normgeo.robustness.effective.wiring import Wiring, title_of

OWN_FORWARD = "its forward is its own"
"""Note on a layer that may compute with its weight in another way than torch's layers."""


@dataclass(frozen=True)
class LayerWeight:
    r"""Raw and effective weight of one layer, or the factor of a normalization that no layer takes in.

    Attributes:
        layer: module path.
        kind: name of its class.
        normalization: normalization that decides about the effective weight, in words; ``none`` without one.
        input_size: channels and positions of its input, without the batch; features of a linear layer.
        calls: number of times that a forward pass runs the layer.
        weight_norm: ‖W‖ (Frobenius) of the weight that the layer computes with, which a parametrization computes; None
            for a normalization.
        spectral_norm: spectral norm of the linear map of W.
        effective_norm: ‖W'‖ of the effective weight :math:`W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}` with the
            running variance; ‖W‖ where no normalization changes it; None where there is none.
        effective_spectral_norm: spectral norm of the linear map of W'; of a normalization its largest factor.
        epsilon_ratio: median of ε/σ² over the channels of its batch normalization; None without one.
        note: why there is no effective weight, or what else limits the row; empty for others.
        unit_norms: ‖W'_i‖ of each output channel, ``(channels,)`` in float64; ‖W_i‖ where there is no W'.
    """

    layer: str
    kind: str
    normalization: str
    input_size: tuple[int, ...]
    calls: int = 1
    weight_norm: float | None = None
    spectral_norm: SpectralNorm | None = None
    effective_norm: float | None = None
    effective_spectral_norm: SpectralNorm | None = None
    epsilon_ratio: float | None = None
    note: str = ""
    unit_norms: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def is_normalization(self) -> bool:
        """Whether the row is a normalization of its own, without a weight."""
        return self.weight_norm is None and self.note != OWN_FORWARD

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain values, without the norms of single units."""
        found = {name: value for name, value in vars(self).items() if name != "unit_norms"}
        for name in ("spectral_norm", "effective_spectral_norm"):
            norm: SpectralNorm | None = found[name]
            found[name] = None if norm is None else norm.value
            found[name.replace("norm", "residual")] = None if norm is None else norm.residual
        return found | {"input_size": list(self.input_size)}


def layer_weights(wiring: Wiring, steps: int, progress: Callable[[str], None]) -> list[LayerWeight]:
    """Return a row for each linear layer, and for each normalization with fixed statistics that none takes in.

    Args:
        wiring: of the model, which is in evaluation mode.
        steps: largest number of Lanczos' steps.
        progress: is called with the name of each layer before it is measured.

    Cost: up to two times ``steps`` products with the linear map of each layer and its transpose, for one sample.
    """
    alone = {norm.layer: norm for norm in wiring.unfolded}
    rows = []
    for layer in wiring.shapes:
        progress(wiring.names[layer])
        if isinstance(layer, Linear):
            rows.append(_layer_row(layer, wiring, steps))
        elif layer in alone:
            rows.append(_norm_row(alone[layer], wiring))
    return rows


def channel_factors(norm: NormLayer) -> Tensor:
    """Return γ/√(σ² + ε) of each channel in float64; ones for a normalization that only shifts."""
    factors: Tensor = scale_and_shift(norm, torch.float64)[0].detach()
    return factors


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight that a layer computes with, in float64, on the CPU if the device has none."""
    return on_observing_device(cast("Tensor", layer.weight).detach()).double()


def _layer_row(layer: nn.Module, wiring: Wiring, steps: int) -> LayerWeight:
    shapes = wiring.shapes[layer]
    row: dict[str, Any] = {"layer": wiring.names[layer], "kind": type(layer).__name__, "calls": len(shapes)}
    row["input_size"] = shapes[0][1:] if not isinstance(layer, nn.Linear) else shapes[0][-1:]
    if overrides(layer, "forward", "_conv_forward"):
        return LayerWeight(**row, normalization="unknown", note=OWN_FORWARD)
    weight, norm = weight_of(layer), wiring.folded.get(layer)
    raw, norms = linear_map(layer, weight), unit_norms(layer, weight)
    example = weight.new_empty(smallest_input(layer, shapes[0]))
    found = largest_singular_value(raw, example, steps)
    row |= {"weight_norm": float(norms.norm()), "spectral_norm": found, "unit_norms": norms}
    if layer in wiring.varying:
        return LayerWeight(**row, normalization=wiring.varying[layer], note="depends on the sample")
    if norm is None:
        title = parametrization_title(layer) if parametrizations_of(layer) else "none"
        return LayerWeight(**row, normalization=title, effective_norm=row["weight_norm"], effective_spectral_norm=found)
    factors = channel_factors(norm).to(weight.device)
    spread = along_channels(factors, layer)
    row["unit_norms"] = norms * factors.abs()
    return LayerWeight(
        **row,
        normalization=title_of(norm),
        effective_norm=float(row["unit_norms"].norm()),
        effective_spectral_norm=largest_singular_value(lambda x: raw(x) * spread, example, steps),
        epsilon_ratio=_epsilon_ratio(norm),
    )


def _norm_row(norm: NormLayer, wiring: Wiring) -> LayerWeight:
    """Return the row of a normalization: a factor for each channel, of which the largest is the spectral norm."""
    shapes = wiring.shapes[norm.layer]
    return LayerWeight(
        layer=norm.name,
        kind=type(norm.layer).__name__,
        normalization=title_of(norm),
        input_size=shapes[0][1:],
        calls=len(shapes),
        effective_spectral_norm=SpectralNorm(float(channel_factors(norm).abs().max()), 0.0, 0),
        epsilon_ratio=_epsilon_ratio(norm),
        note=f"a factor of its own: {wiring.unfolded[norm]}",
    )


def _epsilon_ratio(norm: NormLayer) -> float | None:
    variance = norm.statistics[1]
    if variance is None:
        return None
    ratios = cast("float", norm.layer.eps) / on_observing_device(variance.detach()).double()
    return float(ratios.median())
