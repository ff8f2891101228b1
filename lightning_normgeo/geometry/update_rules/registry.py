"""Registry of optimizers: from an optimizer to the update rule that explains its norm increments."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.geometry.increments.increment_terms import UpdateRule
from lightning_normgeo.geometry.update_rules import optimizers
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.optimizers.lion import OWN_LION, describe_lion
from lightning_normgeo.geometry.update_rules.recipe import Describe, Described, Group, Recipe, State
from lightning_normgeo.geometry.update_rules.whole_tensor import WholeTensorRule
from lightning_normgeo.utilities.checked_values import shown


def register_optimizer(optimizer: type[Optimizer], describe: Describe) -> None:
    """Explain the increments of an optimizer of your own, in every monitor.

    The registered rule holds for the class and for subclasses that keep its ``step``. Registering a class again
    replaces its rule.

    Args:
        optimizer: the class.
        describe: returns the rule of a parameter's next update, such as
            :class:`~lightning_normgeo.geometry.LionRule` or an
            :class:`~lightning_normgeo.geometry.ElementwiseRule` of your own, and the state it reads.

    Raises:
        ConfigurationError: if ``optimizer`` is not a class of optimizers, or ``describe`` no function.

    Example:
        >>> class Lion(torch.optim.Optimizer):
        ...     pass  # with state["exp_avg"], as in lion-pytorch
        >>> register_optimizer(Lion, describe_lion)
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise ConfigurationError(
            f"register_optimizer({shown(optimizer)}): give the class, derived from torch.optim.Optimizer, not an "
            "instance."
        )
    if not callable(describe):
        raise ConfigurationError(
            f"register_optimizer({optimizer.__name__}, {shown(describe)}): give a function, as describe_lion."
        )
    _DESCRIPTIONS[optimizer] = describe


def describe_update(
    optimizer: Optimizer,
    group: Group,
    state: State,
    dtype: torch.dtype = torch.float64,
    parameter: Tensor | None = None,
) -> Described | None:
    """Return the rule of one parameter's next update, and the optimizer state it reads, before the step.

    Args:
        optimizer: any; known are those of torch but LBFGS and SparseAdam, many of timm, lion-pytorch and
            pytorch-optimizer, what :func:`register_optimizer` added, and subclasses that keep their ``step``.
        group: the parameter group.
        state: ``optimizer.state[parameter]``.
        dtype: what the parameter is stored in.
        parameter: the parameter; some rules depend on its shape.

    Returns:
        The rule and its state tensors, or None for an optimizer whose increments have no known decomposition, and for
        one with an option that its rule does not know.
    """
    describe = description_of(type(optimizer))
    if isinstance(describe, Recipe):
        if not describe.covers(optimizer, group):
            return None
        group = describe.view(optimizer, group, parameter)
    return None if describe is None else describe(group, state, dtype)


def described_safely(optimizer: Optimizer, group: Group, state: State, parameter: nn.Parameter) -> Described | None:
    """Return :func:`describe_update` for a training that nothing may stop: None where it fails for this parameter."""
    try:
        described = describe_update(optimizer, group, state, parameter.dtype.to_real(), parameter)
        if described is None or not _fits(described, parameter):
            return None
        rule, tensors = described
        if _rounds_decay(rule, group, parameter):
            return None
        if isinstance(rule, AdamRule) and decays_in_double(group, parameter.device):
            rule = replace(rule, dtype=torch.float64)
    except Exception as error:
        warn_unexplained(optimizer, error)
        return None
    return rule, tensors


def warn_unexplained(what: object, error: Exception) -> None:
    """Say once that the formula of an optimizer could not be applied."""
    warn_once(f"Increments of some weights are not explained, since {type(what).__name__} failed: {error!r}.")


def decays_in_double(group: Group, device: torch.device) -> bool:
    """Whether decoupled decay is W - ηλW with ηλ in double precision, as in torch's fused kernel for CUDA.

    Everywhere else torch multiplies W with 1 - ηλ, rounded as W is.
    """
    return bool(group.get("fused")) and device.type == "cuda"


def _rounds_decay(rule: UpdateRule, group: Group, parameter: Tensor) -> bool:
    """Whether torch rounds 1 - ηλ to 16 bits, as its foreach operations do on a CPU and nothing else does."""
    short = torch.finfo(parameter.dtype).bits < 32 and parameter.device.type == "cpu" and bool(group.get("foreach"))
    return short and isinstance(rule, ElementwiseRule) and bool(rule.shrink != 1)


def description_of(kind: type[Optimizer]) -> Describe | None:
    """Return what describes a class of optimizers: its own entry, or that of the nearest base whose step it keeps."""
    for base in kind.__mro__:
        describe = _DESCRIPTIONS.get(base) or recipe_of(base)
        if describe is describe_lion:  # which holds for a Lion as published, and no library's is only that
            describe = recipe_of(base) or OWN_LION
        if describe is not None:
            return describe if _keeps_step(kind, base) else None
    return None


def recipe_of(kind: type) -> Recipe | None:
    """Return the recipe of a class by its name, whatever its bases are."""
    return RECIPES.get(f"{kind.__module__}.{kind.__qualname__}")


def _keeps_step(kind: type[Optimizer], base: type[Optimizer]) -> bool:
    """Whether a class has the step of its base, and what its base has written for it."""
    family = [known for known in base.__mro__ if issubclass(known, Optimizer) and known is not Optimizer]
    helpers = {name for known in family for name in vars(known) if not name.startswith("__")} - set(vars(Optimizer))
    return all(_same(getattr(kind, name, None), getattr(base, name, None)) for name in helpers | {"step"})


def _same(one: object, other: object) -> bool:
    if callable(one) and callable(other):
        return inspect.unwrap(one) is inspect.unwrap(other)
    return True


def _fits(described: Described, parameter: Tensor) -> bool:
    """Whether a state can be read with the parameter, element by element."""
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
    """Return the recipes of all files in ``optimizers``."""
    files = (info.name for info in pkgutil.iter_modules(optimizers.__path__))
    modules = [importlib.import_module(f"{optimizers.__name__}.{name}") for name in files]
    return {name: recipe for module in modules for name, recipe in module.RECIPES.items()}


RECIPES: Mapping[str, Recipe] = _collected()
"""Recipes by the qualified name of the class, so that no library is imported to recognize its optimizers."""
_DESCRIPTIONS: dict[type[Optimizer], Describe] = {}
"""Descriptions that users have registered."""
