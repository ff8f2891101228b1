"""Measurement of the effective weights of any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_normgeo.normalization.autograd.compiled_modules import check_not_compiled
from lightning_normgeo.normalization.example_inputs import few
from lightning_normgeo.normalization.user_inputs import as_example, check_module
from lightning_normgeo.robustness.effective.layer_weights import layer_weights
from lightning_normgeo.robustness.effective.network import Network, network_quantities
from lightning_normgeo.robustness.effective.result import EffectiveWeights
from lightning_normgeo.robustness.effective.wiring import wiring_of
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.utilities.checked_values import whole

STEPS = 30
"""Default of the largest number of Lanczos' steps."""


def effective_weights(
    module: nn.Module, example_batch: Any, steps: int = STEPS, progress: Callable[[str], None] | None = None
) -> EffectiveWeights:
    r"""Return the raw and the effective weight of each layer of a model, with norms and spectral norms.

    The effective weight :math:`W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}` (eq 12 of Sun et al. 2020), with the
    running variance, is what a layer in front of batch normalization computes with in evaluation mode. A longer W
    leaves it as it is, up to ε; the length of W alone is no property of the function. Behind layer, group or instance
    normalization there is no such weight, as the factor is another one for each sample: the row says so. A weight that
    a parametrization computes counts as computed.

    Spectral norms are those of the linear map with its stride, padding and input size, by Lanczos' method in float64.

    Args:
        module: any model, in any mode; it is run in evaluation mode, and left as it was.
        example_batch: its input, which determines the sizes of the layers' inputs; a tuple holds positional and a dict
            keyword arguments.
        steps: largest number of Lanczos' steps for each spectral norm; the residual says how good they are.
        progress: is called with the name of each layer before it is measured. Default: nothing is called.

    Raises:
        ConfigurationError: for a compiled model, for a batch that the model does not accept, and for ``steps`` < 1.

    Cost: seven forward passes of two samples, the search for scale-invariant units, and up to 2·``steps`` products with
    each layer's linear map and its transpose for one sample.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> convolution, last = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(288, 4)
        >>> network = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), last)
        >>> images = torch.rand(4, 3, 8, 8)
        >>> before = effective_weights(network.eval(), images)["0"]
        >>> with torch.no_grad():  # a weight of twice the length and the statistics to match: the same function
        ...     _ = convolution.weight.mul_(2), network[1].running_var.mul_(4)
        >>> after = effective_weights(network, images)["0"]
        >>> round(after.weight_norm / before.weight_norm, 3), round(after.effective_norm / before.effective_norm, 3)
        (2.0, 1.0)
    """
    check_module("effective_weights(module, example_batch)", module)
    check_not_compiled("effective_weights", module)
    steps = whole("steps", steps, 1)
    with torch.inference_mode(False):  # autograd takes no inference tensors
        example = pytree.tree_map(_copied, few(as_example(module, example_batch)))
    with preserved_state(module), torch.no_grad():
        wiring = wiring_of(module, example)
        rows = layer_weights(wiring, steps, progress or (lambda name: None))
        quantities, undefined = network_quantities(Network(module, wiring, rows, example))
    return EffectiveWeights(tuple(rows), quantities, undefined, steps)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
