r"""Optimizer states behind scaled weights: averages of gradients and of their squares.

Where a symmetry multiplies a weight by :math:`e^s`, its gradient is multiplied by :math:`e^{-s}`. A state is scaled to
what it would be if all gradients so far had been taken at the scaled weights:

=====================================================  ================  =============================================
state                                                  factor            optimizers of torch
=====================================================  ================  =============================================
average of gradients, last gradient                    :math:`e^{-s}`    SGD, Adam and its kin, Muon, Lion, Rprop
average or sum of squared gradients                    :math:`e^{-2s}`   Adam and its kin, RMSprop, Adagrad
average of steps divided by √v, sizes of steps         1                 RMSprop, Adadelta, Rprop, Adopt, LaProp
average of weights                                     :math:`e^{s}`     ASGD
=====================================================  ================  =============================================

This is exact for SGD, Muon, Lion, Adam, AdamW, NAdam, RAdam, Adagrad, Rprop and ASGD, as long as weight decay is not
added to the gradient, which brings λW into the averages, and Adagrad's sum starts at 0. It is exact up to ε for Adamax,
Adadelta, and the momentum of RMSprop. Steps of Muon and Rprop that read several elements or signs are no part of the
state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError

STEP_AS_GRADIENT = 2
"""Power p of optimizers whose steps are proportional to gradients."""


@dataclass(frozen=True)
class StateScaling:
    """Scaling of the state and the steps of one class of optimizers with a scale-invariant weight.

    Attributes:
        powers: power of the weight's factor that each state tensor is multiplied by.
        rate: power p for which a step at ‖W‖ with learning rate η turns W as a step at r with η·(r/‖W‖)^p: 2 where
            steps are proportional to gradients, 1 where their size does not depend on that of the gradients; None
            where no such power exists, as where it changes during training.
    """

    powers: Mapping[str, int]
    rate: int | None = 1


_SGD = StateScaling({"momentum_buffer": -1}, rate=STEP_AS_GRADIENT)
_ADAM = StateScaling({"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2})
_LION = StateScaling({"exp_avg": -1})
_MUON = StateScaling({"momentum_buffer": -1})
_SCALINGS: dict[str, StateScaling] = {
    "torch.optim.sgd.SGD": _SGD,
    "torch.optim.asgd.ASGD": StateScaling({"ax": 1}, rate=STEP_AS_GRADIENT),
    "torch.optim.adam.Adam": _ADAM,
    "torch.optim.adamw.AdamW": _ADAM,
    "torch.optim.nadam.NAdam": _ADAM,
    "torch.optim.radam.RAdam": StateScaling(_ADAM.powers, rate=None),
    "torch.optim.adamax.Adamax": StateScaling({"exp_avg": -1, "exp_inf": -1}),
    "torch.optim.rmsprop.RMSprop": StateScaling({"square_avg": -2, "grad_avg": -1, "momentum_buffer": 0}),
    "torch.optim.adagrad.Adagrad": StateScaling({"sum": -2}),
    "torch.optim.adadelta.Adadelta": StateScaling({"square_avg": -2, "acc_delta": 0}),
    "torch.optim.rprop.Rprop": StateScaling({"prev": -1, "step_size": 0}, rate=None),
    "torch.optim._muon.Muon": _MUON,
    "torch.optim.Muon": _MUON,
    "timm.optim.sgdw.SGDW": _SGD,
    "timm.optim.sgdp.SGDP": StateScaling({"momentum": -1}, rate=STEP_AS_GRADIENT),
    "timm.optim.adamw.AdamWLegacy": _ADAM,
    "timm.optim.nadamw.NAdamW": _ADAM,
    "timm.optim.adamp.AdamP": _ADAM,
    "timm.optim.adopt.Adopt": StateScaling({"exp_avg": 0, "exp_avg_sq": -2}),
    "timm.optim.laprop.LaProp": StateScaling({"exp_avg": 0, "exp_avg_sq": -2, "exp_avg_lr_1": 0, "exp_avg_lr_2": 0}),
    "timm.optim.lamb.Lamb": StateScaling(_ADAM.powers, rate=None),
    "timm.optim.lion.Lion": _LION,
    "lion_pytorch.lion_pytorch.Lion": _LION,
    "pytorch_optimizer.optimizer.lion.Lion": _LION,
    "pytorch_optimizer.optimizer.ademamix.AdEMAMix": StateScaling(
        {"exp_avg": -1, "exp_avg_slow": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
    ),
}
"""Scalings by the qualified name of the optimizer's class."""
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
    powers = _powers_of(optimizer)
    for parameter, _ in scaled:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and key not in _COUNTS and key not in powers:
                raise ConfigurationError(
                    f"It is not known how the state {key!r} of {type(optimizer).__name__} scales with the weights. "
                    "Transform the module before the first step, clear the state (optimizer.state.clear()), or leave "
                    f"out optimizer. Known are {known_optimizers()}."
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
    powers = _powers_of(optimizer)
    for parameter, logarithms in scaled:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and powers.get(key):
                multiply(value, logarithms, float(powers[key]))


def scaling_of(optimizer: Optimizer) -> StateScaling | None:
    """Return the scaling of an optimizer's state; None if it is not known."""
    for kind in type(optimizer).__mro__:
        found = _SCALINGS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    return None


def averages_of_gradients(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """Return the state tensors of a parameter that are averages of its gradients, such as momentum."""
    powers = _powers_of(optimizer)
    state = optimizer.state.get(parameter, {})
    return [value for key, value in state.items() if isinstance(value, Tensor) and powers.get(key) == -1]


def known_optimizers() -> str:
    """Return the names of the optimizers whose state is known, as a text."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in _SCALINGS}))


def _powers_of(optimizer: Optimizer) -> Mapping[str, int]:
    found = scaling_of(optimizer)
    return {} if found is None else found.powers
