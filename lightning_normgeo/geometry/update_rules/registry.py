"""Registry of optimizers, which finds the update rule that explains the norm increments of an optimizer."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, MutableMapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.geometry.increments.increment_terms import UpdateRule
from lightning_normgeo.geometry.update_rules import optimizers
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule, as_fused_kernel
from lightning_normgeo.geometry.update_rules.optimizers.lion import OWN_LION, describe_lion
from lightning_normgeo.geometry.update_rules.recipe import Describe, Described, Group, Recipe, State
from lightning_normgeo.geometry.update_rules.whole_tensor import WholeTensorRule
from lightning_normgeo.utilities.checked_values import short_repr


def register_optimizer(optimizer: type[Optimizer], describe: Describe) -> None:
    """Register the update rule of your own optimizer, so that every monitor can explain its norm increments.

    The registered rule holds for the class and for subclasses that do not override its ``step``. Registering a class
    again replaces its rule.

    Args:
        optimizer: the class, derived from ``torch.optim.Optimizer``.
        describe: a function of a parameter group, an optimizer state and a dtype. It returns the rule of the
            parameter's next update, such as :class:`~lightning_normgeo.geometry.LionRule` or your own
            :class:`~lightning_normgeo.geometry.ElementwiseRule`, and the state tensors that the rule reads; None where
            the update has no known formula.

    Raises:
        ConfigurationError: if ``optimizer`` is not a class of optimizers, or ``describe`` is not a function.

    Example:
        >>> class Lion(torch.optim.Optimizer):
        ...     pass  # with state["exp_avg"], as in lion-pytorch
        >>> register_optimizer(Lion, describe_lion)
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise ConfigurationError(
            f"register_optimizer({short_repr(optimizer)}): give the class, derived from torch.optim.Optimizer, not an "
            "instance."
        )
    if not callable(describe):
        raise ConfigurationError(
            f"register_optimizer({optimizer.__name__}, {short_repr(describe)}): give a function, as describe_lion."
        )
    _DESCRIPTIONS[optimizer] = describe
    _OF_OPTIMIZERS.clear()


def describe_update(
    optimizer: Optimizer,
    group: Group,
    state: State,
    dtype: torch.dtype = torch.float64,
    parameter: Tensor | None = None,
) -> Described | None:
    """Return the rule of one parameter's next update, and the state tensors it reads, before the step.

    Args:
        optimizer: any optimizer. Known are those of torch except LBFGS and SparseAdam, many of timm, lion-pytorch and
            pytorch-optimizer, those added by :func:`register_optimizer`, and subclasses that do not override ``step``.
        group: the parameter group.
        state: ``optimizer.state[parameter]``.
        dtype: the type that the parameter is stored in. Default: float64.
        parameter: the parameter, which rules that depend on its shape need. Default: None.

    Returns:
        The rule and its state tensors; None for an optimizer whose increments have no known decomposition, or which
        has an option switched on that its rule does not know.
    """
    if optimizer not in _OF_OPTIMIZERS:
        _OF_OPTIMIZERS[optimizer] = description_of(type(optimizer))
    describe = _OF_OPTIMIZERS[optimizer]
    if isinstance(describe, Recipe):
        if not describe.covers(optimizer, group):
            return None
        group = describe.view(optimizer, group, parameter)
    return None if describe is None else describe(group, state, dtype)


def described_safely(optimizer: Optimizer, group: Group, state: State, parameter: nn.Parameter) -> Described | None:
    """Return the result of :func:`describe_update`; None with one warning, instead of an exception, where it fails."""
    try:
        described = describe_update(optimizer, group, state, parameter.dtype.to_real(), parameter)
        if described is None or not _fits(described, parameter):
            return None
        rule, tensors = described
        if _rounds_decay(rule, group, parameter):
            return None
        if isinstance(rule, AdamRule) and runs_fused_kernel(group, parameter.device):
            rule = as_fused_kernel(rule, parameter.dtype)
    except Exception as error:
        warn_unexplained(optimizer, error)
        return None
    return rule, tensors


def warn_unexplained(what: object, error: Exception) -> None:
    """Warn once that the formula of an optimizer could not be applied."""
    warn_once(f"Increments of some weights are not explained, since {type(what).__name__} failed: {error!r}.")


def runs_fused_kernel(group: Group, device: torch.device) -> bool:
    """Whether torch takes the step in its fused CUDA kernel, whose arithmetic :func:`as_fused_kernel` follows."""
    return bool(group.get("fused")) and device.type == "cuda"


def _rounds_decay(rule: UpdateRule, group: Group, parameter: Tensor) -> bool:
    """Whether torch rounds 1 - ηλ to 16 bits, as only its foreach operations on a CPU do."""
    short = torch.finfo(parameter.dtype).bits < 32 and parameter.device.type == "cpu" and bool(group.get("foreach"))
    return short and isinstance(rule, ElementwiseRule) and bool(rule.shrink != 1)


def description_of(kind: type[Optimizer]) -> Describe | None:
    """Return the description of an optimizer class: its own, or that of the nearest base whose step it inherits."""
    for base in kind.__mro__:
        describe = _DESCRIPTIONS.get(base) or recipe_of(base)
        if describe is describe_lion:  # it covers the published Lion only; libraries add options, which recipes check
            describe = recipe_of(base) or OWN_LION
        if describe is not None:
            return describe if _keeps_step(kind, base) else None
    return None


def recipe_of(kind: type) -> Recipe | None:
    """Return the recipe of a class by its qualified name alone; base classes are not searched."""
    return RECIPES.get(f"{kind.__module__}.{kind.__qualname__}")


def _keeps_step(kind: type[Optimizer], base: type[Optimizer]) -> bool:
    """Whether a class inherits ``step`` and all its helper methods from ``base`` unchanged."""
    family = [known for known in base.__mro__ if issubclass(known, Optimizer) and known is not Optimizer]
    helpers = {name for known in family for name in vars(known) if not name.startswith("__")} - set(vars(Optimizer))
    return all(_same(getattr(kind, name, None), getattr(base, name, None)) for name in helpers | {"step"})


def _same(one: object, other: object) -> bool:
    """Whether two attributes are the same function; other values count as the same."""
    if callable(one) and callable(other):
        return inspect.unwrap(one) is inspect.unwrap(other)
    return True


def _fits(described: Described, parameter: Tensor) -> bool:
    """Whether all state tensors match the parameter elementwise, in shape and kind of numbers."""
    rule, tensors = described
    if isinstance(rule, WholeTensorRule):
        return True
    return all(
        isinstance(tensor, Tensor)
        and tensor.shape == parameter.shape
        and tensor.is_complex() == parameter.is_complex()
        and (tensor.is_floating_point() or tensor.is_complex())
        for tensor in tensors
    )


def _collected() -> dict[str, Recipe]:
    """Return the recipes of all modules in ``optimizers``, by the qualified name of the optimizer."""
    files = (info.name for info in pkgutil.iter_modules(optimizers.__path__))
    modules = [importlib.import_module(f"{optimizers.__name__}.{name}") for name in files]
    return {name: recipe for module in modules for name, recipe in module.RECIPES.items()}


RECIPES: Mapping[str, Recipe] = _collected()
"""Recipes by the qualified name of the class: recognizing an optimizer needs no import of its library."""
_DESCRIPTIONS: dict[type[Optimizer], Describe] = {}
"""Descriptions that :func:`register_optimizer` added."""
_OF_OPTIMIZERS: MutableMapping[Optimizer, Describe | None] = WeakKeyDictionary()
"""Descriptions of optimizers in use: it is asked for once for each parameter in each measured step."""
