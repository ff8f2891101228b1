"""The normalizations by name: one table from which models, the command line, tests and documentation are made."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_normgeo.utilities.checked_values import entry_of


@dataclass(frozen=True)
class Normalization:
    """One choice of normalization: a layer over the data, a parametrization of the weights, or both.

    Attributes:
        title: its name in words.
        source: who proposed it.
        data: the layer: ``bn``, ``ln``, ``in``, ``gn``, ``mbn`` (mean-only batch normalization) or None.
        weight: the parametrization: ``wn``, ``cwn``, ``ws``, ``sn`` or None.
    """

    title: str
    source: str
    data: str | None = None
    weight: str | None = None

    @property
    def gain(self) -> bool:
        """Whether normalized weights get a learnable length: where no layer behind them has a γ."""
        return self.data is None

    @property
    def folds(self) -> bool:
        """Whether what a batch normalization does in evaluation mode is to go into the weight in front, exactly."""
        return self.data in (None, "mbn") and self.weight in (None, "wn", "sn")


NORMS: dict[str, Normalization] = {
    "bn": Normalization("batch normalization", "Ioffe & Szegedy 2015", data="bn"),
    "ln": Normalization("layer normalization", "Ba et al. 2016", data="ln"),
    "in": Normalization("instance normalization", "Ulyanov et al. 2016", data="in"),
    "gn": Normalization("group normalization", "Wu & He 2018", data="gn"),
    "wn": Normalization("weight normalization", "Salimans & Kingma 2016", weight="wn"),
    "cwn": Normalization("centered weight normalization", "Huang et al. 2017", weight="cwn"),
    "ws": Normalization("weight standardization", "Qiao et al. 2019", weight="ws"),
    "sn": Normalization("spectral normalization", "Miyato et al. 2018", weight="sn"),
    "none": Normalization("no normalization", ""),
    "bn+ws": Normalization("batch normalization of standardized weights", "Qiao et al. 2019", data="bn", weight="ws"),
    "gn+ws": Normalization("group normalization of standardized weights", "Qiao et al. 2019", data="gn", weight="ws"),
    "bn+cwn": Normalization(
        "batch normalization of centered, normalized weights", "Huang et al. 2017", data="bn", weight="cwn"
    ),
    "bn+sn": Normalization("batch normalization of spectrally normalized weights", "", data="bn", weight="sn"),
    "wn+mbn": Normalization(
        "weight normalization with mean-only batch normalization", "Salimans & Kingma 2016", data="mbn", weight="wn"
    ),
}
"""Every normalization by name. A pair is a layer over the data behind normalized weights."""


def find_norm(name: str, option: str = "norm") -> Normalization:
    """Return the entry of :data:`NORMS` called ``name``.

    Args:
        name: of the normalization.
        option: what the name was given as.

    Raises:
        ConfigurationError: for an unknown name, with those near in letters or meaning, and all there are.
    """
    return entry_of(option, name, NORMS, {known: norm.title for known, norm in NORMS.items()})
