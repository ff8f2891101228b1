r"""Optimizer states behind scaled weights: averages of gradients and of their squares.

Where a symmetry multiplies a weight by :math:`e^s`, its gradient is multiplied by :math:`e^{-s}`. A state is scaled to
what it would be if all gradients so far had been taken at the scaled weights:

=====================================================  ================  =============================================
state                                                  factor            optimizers of torch
=====================================================  ================  =============================================
average of gradients, last gradient                    :math:`e^{-s}`    SGD, Adam and its relatives, Muon, Rprop
average or sum of squared gradients                    :math:`e^{-2s}`   Adam and its relatives, RMSprop, Adagrad
average of steps divided by √v, sizes of steps         1                 momentum of RMSprop, Adadelta, Rprop
average of weights                                     :math:`e^{s}`     ASGD
=====================================================  ================  =============================================

This is exact for SGD, Muon, Lion, Adam, AdamW, NAdam, RAdam, Adagrad, Rprop and ASGD, as long as weight decay is not
added to the gradient, which brings λW into the averages, and Adagrad's sum starts at 0. It is exact up to ε for Adamax,
Adadelta, and the momentum of RMSprop. Steps of Muon and Rprop that read several elements or signs are no part of the
state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError

_ADAM = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
_POWERS: dict[str, dict[str, int]] = {
    "torch.optim.sgd.SGD": {"momentum_buffer": -1},
    "torch.optim.adam.Adam": _ADAM,
    "torch.optim.adamw.AdamW": _ADAM,
    "torch.optim.nadam.NAdam": _ADAM,
    "torch.optim.radam.RAdam": _ADAM,
    "torch.optim.adamax.Adamax": {"exp_avg": -1, "exp_inf": -1},
    "torch.optim.rmsprop.RMSprop": {"square_avg": -2, "grad_avg": -1, "momentum_buffer": 0},
    "torch.optim.adagrad.Adagrad": {"sum": -2},
    "torch.optim.adadelta.Adadelta": {"square_avg": -2, "acc_delta": 0},
    "torch.optim.rprop.Rprop": {"prev": -1, "step_size": 0},
    "torch.optim.asgd.ASGD": {"ax": 1},
    "torch.optim._muon.Muon": {"momentum_buffer": -1},
    "torch.optim.Muon": {"momentum_buffer": -1},
    "timm.optim.sgdw.SGDW": {"momentum_buffer": -1},
    "timm.optim.lion.Lion": {"exp_avg": -1},
    "lion_pytorch.lion_pytorch.Lion": {"exp_avg": -1},
}
"""Power of the weight's factor that each state tensor is multiplied by, for each optimizer by its qualified name."""
_COUNTS = frozenset({"step", "eta", "mu", "mu_product"})
"""State tensors that are one number for the whole parameter."""


def check_states(optimizer: Optimizer, scaled: Sequence[tuple[nn.Parameter, Any]]) -> None:
    """Check that the states of some parameters can be scaled.

    Args:
        optimizer: the optimizer.
        scaled: parameters and the logarithms of their factors.

    Raises:
        ConfigurationError: for an unknown optimizer that has a state, and for a state that is not known.
    """
    powers = _powers(optimizer)
    for parameter, _ in scaled:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and key not in _COUNTS and key not in powers:
                raise ConfigurationError(
                    f"It is not known how the state {key!r} of {type(optimizer).__name__} scales with the weights. "
                    "Transform the module before the first step, clear the state (optimizer.state.clear()), or leave "
                    f"out optimizer. Known are {', '.join(sorted({name.rpartition('.')[2] for name in _POWERS}))}."
                )


def scale_states(
    optimizer: Optimizer,
    scaled: Sequence[tuple[nn.Parameter, Any]],
    multiply: Callable[[Tensor, Any, float], None],
) -> None:
    """Scale the states of some parameters in place.

    Args:
        optimizer: the optimizer, whose states :func:`check_states` has accepted.
        scaled: parameters and the logarithms of their factors.
        multiply: function that multiplies a tensor by a power of the factors.
    """
    powers = _powers(optimizer)
    for parameter, logarithms in scaled:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and powers.get(key):
                multiply(value, logarithms, float(powers[key]))


def _powers(optimizer: Optimizer) -> dict[str, int]:
    for kind in type(optimizer).__mro__:
        found = _POWERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    return {}
