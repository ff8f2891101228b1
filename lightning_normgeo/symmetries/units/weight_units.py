"""Scale-invariant units of one weight, and the table of the units of a model.

A *unit* is a slice of a weight whose scale leaves the loss unchanged: L(αW_i) = L(W_i) for every α > 0.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

from torch import Tensor

from lightning_normgeo.geometry.rows import as_rows
from lightning_normgeo.normalization.names import layer_name
from lightning_normgeo.utilities.checked_values import UnknownNameError, nearest, short_repr
from lightning_normgeo.utilities.notebook import NotebookTable, summary

Kind = Literal["filter", "group", "layer", "matrix", "joint", "none"]


@dataclass(frozen=True, kw_only=True)
class WeightUnits:
    """The scale-invariant units of one weight.

    Attributes:
        name: name of the weight, as in ``named_parameters`` of the model; with its rows, ``qkv.weight[0:64]``, for a
            part of one.
        kind: the kind of unit. ``filter``: the slice of one output channel (under torch's weight normalization, of one
            index along its ``dim``); ``group``: the slices of several channels jointly; ``layer``: the whole weight,
            normalized over the data; ``matrix``: the whole weight, normalized by itself; ``joint``: slices of several
            layers together, such as all that write into a residual stream; ``none``: no scale invariance was found.
        count: number of units, at least 1; for ``none`` the number of output channels, each measured as one slice.
        dim: dimension of the weight along which the slices are counted.
        groups: number of groups of a transposed convolution, whose output channels are spread over them; otherwise 1.
        bias: name of the bias of the same layer, where only weight and bias scaled together leave the loss unchanged.
        partners: for ``joint``, the slices of the other parameters, in the same number.
        scale: name of the γ of the one batch normalization behind the weight, needed to correct for its ε.
        part: first row and the one behind the last, for a part of a weight, such as the queries in a packed one.
        normalization: the normalization that causes the invariance, in words; empty for ``none``.
        reason: why there is no invariance, in words; empty where there is one.
    """

    name: str
    kind: Kind
    count: int
    dim: int = 0
    groups: int = 1
    bias: str | None = None
    partners: tuple[WeightUnits, ...] = ()
    scale: str | None = None
    part: tuple[int, int] | None = None
    normalization: str = ""
    reason: str = ""

    def __repr__(self) -> str:
        kind = f"{self.count} × {self.kind}" + (" with bias" if self.bias else "")
        return summary("WeightUnits", [repr(self.name), kind, self.normalization or self.reason or "no reason known"])

    @property
    def layer(self) -> str:
        """The module path of the layer, which names the weight in metric keys; with the number of partners."""
        return _layer(self.name, self.parameter, len(self.partners))

    @property
    def parameter(self) -> str:
        """The name of the parameter."""
        return self.name if self.part is None else self.name.removesuffix(_rows_of(self.part))

    def of_part(self, start: int, stop: int) -> WeightUnits:
        """Return the same for some rows of the weight."""
        return replace(self, name=self.name + _rows_of((start, stop)), part=(start, stop))

    @property
    def invariant(self) -> bool:
        """Whether the loss is invariant to the scale of every unit."""
        return self.kind != "none"

    def without_invariance(self, reason: str) -> WeightUnits:
        """Return the same weight with kind ``none``, and the reason why it is not counted as invariant."""
        return replace(self, kind="none", bias=None, partners=(), scale=None, normalization="", reason=reason)

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the other parameters that belong to the units."""
        return (*(() if self.bias is None else (self.bias,)), *(own.name for own in self.partners))

    def rows(self, tensor: Tensor) -> Tensor:
        """View a tensor of the shape of the weight, or of its bias, as a matrix of shape ``(count, ...)``."""
        if self.part is not None:
            tensor = tensor[self.part[0] : self.part[1]]
        if tensor.ndim == 1:
            return as_rows(tensor, self.count)
        return as_rows(tensor, self.count, self.dim, self.groups)


def _rows_of(part: tuple[int, int]) -> str:
    return f"[{part[0]}:{part[1]}]"


def label(name: str, partners: int) -> str:
    """Return the name of a weight in metric keys: its module path, and ``+n`` if n other parameters belong to it."""
    return layer_name(name) + (f"+{partners}" if partners else "")


@functools.lru_cache(maxsize=2**14)
def _layer(name: str, parameter: str, partners: int) -> str:
    """Return the name of a layer; cached, since the monitors ask for it many times in each measured step."""
    return label(parameter, partners) + name.removeprefix(parameter)


@dataclass(frozen=True)
class Units:
    """The units of all weights of a model: a sequence, also indexed by module path or parameter name.

    Attributes:
        weights: one entry per weight, in the order of ``named_parameters``.

    Raises:
        UnknownNameError: when indexed with a name that is no weight's.
    """

    weights: tuple[WeightUnits, ...]

    def __iter__(self) -> Iterator[WeightUnits]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, key: object) -> bool:
        return any(key in (units.name, units.layer) or key is units for units in self.weights)

    @overload
    def __getitem__(self, key: int | str) -> WeightUnits: ...
    @overload
    def __getitem__(self, key: slice) -> Units: ...
    def __getitem__(self, key: int | str | slice) -> WeightUnits | Units:
        if isinstance(key, slice):
            return Units(self.weights[key])
        if isinstance(key, int):
            return self.weights[key]
        for units in self.weights:
            if key in (units.name, units.layer):
                return units
        layers = [units.layer for units in self.weights]
        raise UnknownNameError(f"{short_repr(key)} is none of the {len(self)} weights; {nearest(key, layers)}.")

    @property
    def kinds(self) -> dict[str, int]:
        """The number of weights by the kind of their units."""
        return dict(Counter(units.kind for units in self.weights))

    def __repr__(self) -> str:
        kinds = [f"{n} {kind}" for kind, n in self.kinds.items()]
        return summary("Units", [f"{len(self)} weights" + (f": {kinds[0]}" if kinds else ""), *kinds[1:]])

    def _table(self) -> NotebookTable:
        columns = ("weight", "unit", "count", "with bias", "why")
        rows = [
            (units.layer, units.kind, units.count, bool(units.bias), units.normalization or units.reason)
            for units in self.weights
        ]
        return NotebookTable("Scale-invariant units", columns, rows)

    def _repr_html_(self) -> str:
        return self._table().to_html()

    def to_frame(self) -> Any:
        """Return a pandas data frame indexed by module path: unit, count, with bias, and why.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        return self._table().to_frame("weight")

    def __str__(self) -> str:
        """Return a text table with the module path, kind, number of units and reason of each weight."""
        width = max((len(units.layer) for units in self.weights), default=0)
        lines = [f"{len(self)} weights: " + ", ".join(f"{n} {kind}" for kind, n in self.kinds.items())]
        for units in self.weights:
            kind = units.kind + (" with bias" if units.bias else "")
            why = units.normalization or units.reason
            lines.append(f"  {units.layer:{width}}  {kind:<17} {units.count:>6}  {why}")
        return "\n".join(lines)
