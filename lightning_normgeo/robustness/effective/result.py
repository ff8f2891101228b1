"""Effective weights of a network as a result: a row for each layer, and quantities of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_normgeo.geometry.spectral_norms import SpectralNorm
from lightning_normgeo.robustness.effective.layer_weights import LayerWeight
from lightning_normgeo.utilities.notebook import NotebookTable, summary

COLUMNS = (
    "layer",
    "normalization",
    "input size",
    "‖W‖",
    "‖W'‖",
    "σmax(W)",
    "σmax(W')",
    "residual",
    "ε/σ²",
    "note",
)
"""Titles of the columns of the table; σmax is the spectral norm of the linear map."""
_TITLES = {
    "weight_norm": "‖W'‖, all layers",
    "weight_norm_raw": "‖W‖, all layers",
    "log10_spectral_product": "log10 of the product of σmax(W')",
    "log10_spectral_product_raw": "log10 of the product of σmax(W)",
    "log10_path_norm": "log10 of the path norm of W'",
    "log10_path_norm_raw": "log10 of the path norm of W",
    "last_layer_norm": "‖W'‖ of the last layer",
    "epsilon_over_variance": "largest median of ε/σ²",
}
_NO_BOUND = (
    "The product of spectral norms bounds the Lipschitz constant of a chain of layers; with residual connections it is "
    "no bound."
)


@dataclass(frozen=True)
class EffectiveWeights(Sequence[LayerWeight]):
    """Raw and effective weights of the layers of a network, in the order in which they run.

    Attributes:
        layers: a row for each layer; also indexed by module path.
        quantities: quantities of the network by name; see :func:`.network_quantities`.
        undefined: for each quantity that this network does not have, the reason.
        steps: largest number of Lanczos' steps.
    """

    layers: tuple[LayerWeight, ...]
    quantities: Mapping[str, float]
    undefined: Mapping[str, str]
    steps: int

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        """Return a row by its number or module path."""
        if isinstance(index, str):
            return {row.layer: row for row in self.layers}[index]
        return self.layers[index]

    def __iter__(self) -> Iterator[LayerWeight]:
        return iter(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as plain values, the content of ``effective_weights.json``."""
        return {
            "quantities": dict(self.quantities),
            "undefined": dict(self.undefined),
            "steps": self.steps,
            "layers": [row.as_dict() for row in self.layers],
        }

    def rows(self) -> list[list[Any]]:
        """Return a row for each layer with the values of :data:`COLUMNS`, None for missing ones."""
        return [
            [
                row.layer,
                row.normalization,
                "×".join(map(str, row.input_size)),
                row.weight_norm,
                row.effective_norm,
                _value(row.spectral_norm),
                _value(row.effective_spectral_norm),
                None if row.effective_spectral_norm is None else row.effective_spectral_norm.residual,
                row.epsilon_ratio,
                row.note,
            ]
            for row in self.layers
        ]

    def __repr__(self) -> str:
        numbers = [f"{name}={value:.4g}" for name, value in self.quantities.items()]
        return summary("EffectiveWeights", [f"{len(self)} layers", *numbers])

    def __str__(self) -> str:
        """Return a text table of the layers, and the quantities of the network."""
        cells = [list(COLUMNS), *([_text(value) for value in row] for row in self.rows())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                _aligned(cell, width, k) for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, "", *self._notes()])

    def _notes(self) -> list[str]:
        found = [f"{_TITLES[name]}: {value:.4g}" for name, value in self.quantities.items()]
        missing: dict[str, list[str]] = {}
        for name, why in self.undefined.items():
            missing.setdefault(why, []).append(_TITLES[name])
        found += [f"not defined, {why}: {'; '.join(names)}" for why, names in missing.items()]
        return [*found, _NO_BOUND] if "log10_spectral_product" in self.quantities else found

    def _table(self) -> NotebookTable:
        return NotebookTable("Effective weights", COLUMNS, self.rows(), self._notes())

    def _repr_html_(self) -> str:
        return self._table().to_html()

    def to_frame(self) -> Any:
        """Return a pandas data frame with a row for each layer.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        return self._table().to_frame("layer")


def _value(norm: SpectralNorm | None) -> float | None:
    return None if norm is None else norm.value


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_LEFT = (0, 1, len(COLUMNS) - 1)
"""Columns of words, which are aligned to the left."""


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in _LEFT else cell.rjust(width)
