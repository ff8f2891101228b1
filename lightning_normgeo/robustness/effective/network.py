"""Quantities of a whole network from the raw and effective weights of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.effective.layer_weights import LayerWeight
from lightning_normgeo.robustness.effective.path_norm import log10_path_norm
from lightning_normgeo.robustness.effective.wiring import Wiring

_NAMED = 2
"""Layers that a reason names."""


@dataclass(frozen=True)
class Network:
    """A network whose layers were measured.

    Attributes:
        module: the model, in evaluation mode.
        wiring: of the model.
        rows: of its layers.
        example: its input.
    """

    module: nn.Module
    wiring: Wiring
    rows: Sequence[LayerWeight]
    example: Any

    @property
    def layers(self) -> list[LayerWeight]:
        """The rows with a weight."""
        return [row for row in self.rows if not row.is_normalization]


def network_quantities(network: Network) -> tuple[dict[str, float], dict[str, str]]:
    r"""Return the quantities of a network, and the reason for each that is not defined.

    ==============================  ==================================================================================
    ``weight_norm``                 :math:`(\sum_l \lVert W'_l\rVert^2)^{1/2}` over all layers
    ``log10_spectral_product``      log10 of the product of the spectral norms of all effective linear maps. For a chain
                                    of layers with activations that are 1-Lipschitz it is an upper bound on the
                                    Lipschitz constant (Szegedy et al. 2014) and the leading factor of the spectral
                                    complexity (Bartlett et al. 2017); with residual connections it is no bound.
    ``log10_path_norm``             see :func:`log10_path_norm`; the network as a whole, residual connections included
    ``…_raw``                       the same of the raw weights; normalizations count as the identity
    ``last_layer_norm``             ‖W'‖ of the layer that runs last, the classifier
    ``epsilon_over_variance``       largest median of ε/σ² of a batch normalization: the share of its scale that the
                                    raw weights decide on
    ==============================  ==================================================================================

    Args:
        network: the network.
    """
    found: dict[str, float] = {}
    undefined: dict[str, str] = {}
    for effective, ending in ((True, ""), (False, "_raw")):
        why = _undefined(network, effective)
        for name, quantity in _QUANTITIES.items():
            try:
                if why:
                    raise ConfigurationError(why)
                found[f"{name}{ending}"] = quantity(network, effective)
            except ConfigurationError as error:
                undefined[f"{name}{ending}"] = str(error)
    if network.layers and network.layers[-1].effective_norm is not None:
        found["last_layer_norm"] = network.layers[-1].effective_norm
    ratios = [row.epsilon_ratio for row in network.rows if row.epsilon_ratio is not None]
    if ratios:
        found["epsilon_over_variance"] = max(ratios)
    return found, undefined


def _undefined(network: Network, effective: bool) -> str:
    """Return the reason why products and sums over all layers are not defined; empty if they are."""
    layers, outside = network.layers, network.wiring.outside
    if not layers:
        return "the network has no linear or convolutional layer"
    if outside:
        return f"parameters outside of linear layers and normalizations: {_some(outside)}"
    without = [row for row in layers if (row.effective_norm if effective else row.weight_norm) is None]
    if not without:
        return ""
    notes, names = ", ".join(dict.fromkeys(row.note for row in without)), _some([row.layer for row in without])
    return f"{len(without)} of {len(layers)} layers have no fixed weight ({notes}): {names}"


def _weight_norm(network: Network, effective: bool) -> float:
    norms = [(row.effective_norm if effective else row.weight_norm) or 0.0 for row in network.layers]
    return math.sqrt(math.fsum(norm * norm for norm in norms))


def _log10_product(network: Network, effective: bool) -> float:
    """Return log10 of the product of spectral norms, each as often as its layer runs.

    Raises:
        ConfigurationError: if one of them is zero or not finite.
    """
    terms = []
    for row in network.rows:
        norm = row.effective_spectral_norm if effective else row.spectral_norm
        if norm is None:  # a normalization, which counts as the identity among raw weights
            continue
        if not 0 < norm.value < math.inf:
            raise ConfigurationError(f"the linear map of {row.layer} is {'zero' if norm.value == 0 else 'not finite'}")
        terms.append(row.calls * math.log10(norm.value))
    return math.fsum(terms)


def _log10_path_norm(network: Network, effective: bool) -> float:
    return log10_path_norm(network.module, network.wiring, network.example, effective)


_QUANTITIES: dict[str, Callable[[Network, bool], float]] = {
    "weight_norm": _weight_norm,
    "log10_spectral_product": _log10_product,
    "log10_path_norm": _log10_path_norm,
}
"""Quantities over all layers, of effective or of raw weights."""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
