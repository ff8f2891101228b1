"""One call on a model and a batch: the geometry of the inputs of its layers, and of its batch normalizations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_normgeo.errors import ConfigurationError, nearest_names
from lightning_normgeo.geometry.batches.batch_outputs import (
    COLLAPSED_ABOVE,
    PAIR,
    epsilon_over_variance,
    radius_reached,
)
from lightning_normgeo.normalization.autograd.compiled_modules import check_not_compiled
from lightning_normgeo.normalization.autograd.tracing import trace
from lightning_normgeo.normalization.user_inputs import as_example, check_module
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics
from lightning_normgeo.probes.batch_norm.layers import readable_batch_norms
from lightning_normgeo.probes.batch_norm.probe import BatchNormProbe
from lightning_normgeo.probes.layer_inputs.layers import readable_layers
from lightning_normgeo.probes.layer_inputs.probe import InputProbe, InputSettings, LayerGeometry
from lightning_normgeo.utilities.checked_values import whole
from lightning_normgeo.utilities.notebook import NotebookTable, summary

_LAYERS = ("layer", "n", "N", "rank", "bound", "effective rank", "±", "kernel share", "largest", "leading", "gap")
_NORMS = ("batch normalization", "N", "channels", "collapsed", "ε/s² median", "ε/s² max", "radius min")


@dataclass(frozen=True)
class BatchGeometry:
    """Geometry of one batch in a network: Σ_X in front of its layers, and what its batch normalizations reach.

    Attributes:
        layers: rank, spectrum and kernel of Σ_X and the orthogonality gap of the inputs, by module path.
        batch_norms: statistics of the batch normalizations with γ and β in training mode, by module path.
    """

    layers: dict[str, LayerGeometry]
    batch_norms: dict[str, BatchStatistics]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: str) -> LayerGeometry:
        return self.layers[layer]

    def __repr__(self) -> str:
        return summary("BatchGeometry", [f"{len(self.layers)} layers", f"{len(self.batch_norms)} batch normalizations"])

    def __str__(self) -> str:
        """Return both tables as text."""
        tables = [table for table in (self._table(), self._norm_table()) if table.rows]
        return "\n\n".join(_text(table) for table in tables) or "no layer"

    def _table(self) -> NotebookTable:
        rows = [_layer_row(name, one) for name, one in self.layers.items()]
        notes = [
            "n inputs of a unit, N input vectors, bound = min(n, N - 1); kernel share: mean over units, and largest",
            "leading: the largest eigenvalue of Σ_X over its trace; gap: orthogonality gap of the samples",
        ]
        return NotebookTable("Covariance Σ_X of the inputs of each layer", _LAYERS, rows, notes)

    def _norm_table(self) -> NotebookTable:
        rows = [_norm_row(name, one) for name, one in self.batch_norms.items()]
        notes = ["collapsed: ε/s² above 1e4, output ≡ β within 1 %; radius: s/√(s² + ε), 1 is the whole sphere"]
        if any(one.samples <= PAIR for one in self.batch_norms.values()):
            notes.append("of at most two values per channel little more than the sign is kept, and gradients vanish")
        return NotebookTable("Outputs of the batch normalizations", _NORMS, rows, notes)

    def _repr_html_(self) -> str:
        return self._table().to_html() + (self._norm_table().to_html() if self.batch_norms else "")

    def to_frame(self) -> Any:
        """Return a pandas data frame with a row for each layer.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        return self._table().to_frame("layer")

    def batch_norms_frame(self) -> Any:
        """Return a pandas data frame with a row for each batch normalization.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        return self._norm_table().to_frame("batch normalization")


def batch_geometry(
    module: nn.Module,
    example_batch: Any,
    layers: str = "*",
    probes: int = InputSettings.probes,
    exact_up_to: int = InputSettings.exact_up_to,
    seed: int = InputSettings.seed,
) -> BatchGeometry:
    """Measure the geometry of one batch in a network: rank against width, kernels, collapsed channels.

    The module runs once, in its current mode. Buffers, ``.grad`` and random number generators are left as they were.
    Layers and batch normalizations in evaluation mode are left out: call ``module.train()`` first.

    Args:
        module: any module.
        example_batch: its input; a tuple holds positional and a dict keyword arguments.
        layers: glob for the module paths of the linear and convolution layers. Default: all.
        probes: number of random vectors of each kind for spectra that are not exact, at least 2. Default: 16.
        exact_up_to: size of the largest matrices that are decomposed, at least 1. Default: 640.
        seed: of the random vectors, at least 0. Default: 0.

    Raises:
        ConfigurationError: for a compiled module, a batch that it does not accept, a glob that matches no layer, or an
            unsuitable number.

    Cost: one forward pass, and for each layer about as much as its own forward and backward pass (see
        :func:`.input_geometry`).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> convolution, last = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(288, 4)
        >>> network = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), last)
        >>> images = torch.rand(4, 3, 8, 8)
        >>> found = batch_geometry(network, images)
        >>> inputs = found["0"].inputs
        >>> inputs.width, inputs.samples  # 3 × 3 × 3 inputs of a unit; 4 images of 6 × 6 positions
        (27, 144)
        >>> bool(inputs.rank <= min(inputs.width, inputs.samples - 1))
        True
    """
    check_module("batch_geometry(module, example_batch)", module)
    check_not_compiled("batch_geometry", module)
    settings = checked_settings(probes, exact_up_to, seed)
    found = readable_layers(module)
    chosen = {name: layer for name, layer in found.items() if fnmatchcase(name, layers)}
    if not chosen:
        raise ConfigurationError(
            f"layers={layers!r} matches none of the {len(found)} linear and convolution layers. "
            f"Nearest: {nearest_names(layers, found)}."
        )
    inputs, batch_norms = InputProbe(chosen, settings), BatchNormProbe(readable_batch_norms(module))
    try:
        inputs.arm()
        batch_norms.arm()
        outputs = trace(module, as_example(module, example_batch))
        inputs.close()
        result = BatchGeometry(inputs.collect(), {name: runs[-1] for name, runs in batch_norms.collect().items()})
        del outputs  # keeps the autograd graph, in which the statistics are saved, until here
    finally:
        inputs.disarm()
        batch_norms.detach()
    return result


def checked_settings(probes: Any, exact_up_to: Any, seed: Any) -> InputSettings:
    """Return the settings of a measurement.

    Raises:
        ConfigurationError: for anything but whole numbers that are large enough.
    """
    return InputSettings(whole("probes", probes, 2), whole("exact_up_to", exact_up_to, 1), whole("seed", seed, 0))


def _layer_row(name: str, one: LayerGeometry) -> tuple[object, ...]:
    inputs, spectrum = one.inputs, one.inputs.spectrum
    rank, lower = float(inputs.rank.mean()), float(inputs.rank_at_least.mean())
    share, largest = inputs.kernel_share.mean(), inputs.kernel_share.max()
    leading = (spectrum.eigenvalues[:, 0] / spectrum.trace).mean()
    return (
        name,
        inputs.width,
        inputs.samples,
        f"≥ {lower:g}" if math.isnan(rank) else f"{rank:g}",
        inputs.bound,
        float(spectrum.effective_rank.mean()),
        float(spectrum.effective_rank_error.square().sum().sqrt()) / len(spectrum.trace),
        None if share.isnan() else float(share),
        None if share.isnan() else float(largest),
        float(leading),
        float(one.gap),
    )


def _norm_row(name: str, one: BatchStatistics) -> tuple[object, ...]:
    ratios, radii = epsilon_over_variance(one.variance, one.eps), radius_reached(one.variance, one.eps)
    collapsed = int((ratios > COLLAPSED_ABOVE).sum())
    return (name, one.samples, len(ratios), collapsed, float(ratios.median()), float(ratios.max()), float(radii.min()))


def _text(table: NotebookTable) -> str:
    """Return a table as text, with its columns aligned."""
    cells = [list(table.columns), *([_cell(value) for value in row] for row in table.rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(table.columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([table.caption, *lines, *table.notes])


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
