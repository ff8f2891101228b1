"""swap_norm: another normalization for a model that is built already, with a report of what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.graph import is_compiled
from lightning_normgeo.normalization.example_inputs import attributes_kept, inputs_by_trial, shapes
from lightning_normgeo.normalization.registry import Normalization, find_norm
from lightning_normgeo.normalization.surgery.function_change import Yardstick
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer, matching, normalization_layers
from lightning_normgeo.normalization.surgery.planning import plan_all
from lightning_normgeo.normalization.surgery.preceding_layers import NormInputs, inputs_by_graph, inputs_in_order
from lightning_normgeo.normalization.surgery.swap_report import LeftAlone, SwapReport
from lightning_normgeo.normalization.surgery.trial import Trial, keeps
from lightning_normgeo.normalization.user_inputs import as_example, check_module
from lightning_normgeo.utilities.checked_values import flag, shown, whole

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def swap_norm(
    module: nn.Module,
    to: str,
    layers: str | Sequence[str] = "*",
    groups: int | None = None,
    unbiased: bool = True,
    example_batch: Any = None,
    optimizer: Optimizer | None = None,
) -> SwapReport:
    r"""Give a built model another normalization, in place.

    Layers over the data (``bn``, ``ln``, ``in``, ``gn``) are replaced under their names: γ, β (the same Parameters, so
    an optimizer stays valid), ε, momentum, device, dtype, training mode and activations of subclasses (behind the new
    layer, in a Sequential) are kept; running statistics are kept between batch normalizations. ``ln`` normalizes
    channels and positions jointly (``GroupNorm(1, C)``). Layers that would normalize one or two values are left alone.

    For ``wn``, ``cwn``, ``ws``, ``sn`` and ``none`` the layer goes and the weight that fed it is parametrized. Where
    that weight is directly in front, γ, β and running statistics are folded into it, and it gets a bias:

    .. math:: W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}, \quad
              b' = \beta + \gamma (b - \mu) / \sqrt{\sigma^2 + \varepsilon}

    (eq 12; without running statistics σ² + ε = 1, μ = 0). So in evaluation mode ``none``, ``wn`` and ``sn`` keep the
    function that batch normalization had, ``cwn`` and ``ws`` keep it up to the mean of each row; ``wn+mbn`` keeps it
    too, with μ and β in the layer. Without γ behind them ``cwn`` and ``ws`` get a learnable gain per row, ``sn`` one
    for the matrix. ``gn+ws`` and the like do both and fold nothing: running statistics of a trained batch
    normalization do not fit the changed weights, and a pass in training mode has to renew them.

    Whether the function was kept is measured, not believed: the model runs in evaluation mode before and after, and
    each layer is compared with what it was. A layer that should keep its function and would not is left alone, with the
    reason. Everything that the forward passes touch is put back.

    Args:
        module: the model; layers inside it are replaced.
        to: a name out of ``NORMS``.
        layers: globs over the module paths of the normalization layers to be replaced.
        groups: for ``gn``. Default: the largest divisor up to 32 that leaves two channels, and eight values of a
            sample, in each group.
        unbiased: whether the deviation of ``ws`` divides by n - 1 (Qiao's code) or by n (the paper).
        example_batch: a batch, or the tuple of arguments. The model runs on it to find the weights in front of each
            layer, also through sums and concatenations, and to measure what the swap changed. Default: the model's own
            example (``example_input_array``, timm's ``input_size``), or noise that its first layer takes. A model that
            runs on none of these is changed only where no guess is needed. Changes that are meant are measured with an
            example that was given alone.
        optimizer: an optimizer that exists already, to be checked; that of a running Trainer is found by itself.

    Returns:
        What changed, what was left alone and why, whether the function of evaluation mode is what it was, and how many
        parameters there were and are.

    Raises:
        ConfigurationError: for an unknown name; no layer to replace, or none that would change; groups that do not
            divide or have one or two values; lazy layers; a model wrapped by DDP or FSDP or compiled; an optimizer that
            would miss parameters.
    """
    target = _checked(module, to, groups, unbiased, optimizer)
    example_batch = None if example_batch is None else as_example(module, example_batch)
    _check_wrapping(module)
    found = normalization_layers(module)
    norm_layers, parameters = matching(found, layers), _count(module)
    inputs, example, hint = _look(module, found, example_batch, target)
    plans, left = plan_all(module, norm_layers, inputs, target, groups, hint)
    yardstick = None
    # noise shows whether a function is kept; how far another one is from it, data have to show
    keeping = target.folds or any(keeps(plan.norm_layer, target) for plan in plans)
    if example_batch is not None or (example is not None and keeping):
        samples = 1 if example_batch is None else 2
        yardstick = Yardstick(module, example, [plan.norm_layer.name for plan in plans], samples)
    replaced = {plan.norm_layer: {id(p) for p in plan.changed_parameters(target)} for plan in plans}
    outcome = Trial(module, target, unbiased, yardstick, hint).settle(plans)
    left += outcome.left
    if not outcome.changes:
        raise ConfigurationError(f"swap_norm(to={to!r}) would change nothing: {_first_reasons(left)}.")
    try:
        _check_optimizers(module, optimizer, set().union(*(replaced[norm_layer] for norm_layer in outcome.changes)))
    except ConfigurationError:
        outcome.undo.restore()
        raise
    rest = [name for norm_layer in found if norm_layer not in norm_layers for name in norm_layer.names]
    return SwapReport(
        to=to,
        changes=tuple(change for of_source in outcome.changes.values() for change in of_source),
        left=(*left, *(LeftAlone(name, f"layers={layers!r} does not match it") for name in rest)),
        parameters_before=parameters,
        parameters_after=_count(module),
        traced=example is not None if target.data is None or target.weight is not None else None,
        change=outcome.change,
        unmeasured="pass example_batch" if yardstick is None else yardstick.problem,
        example=shapes(example) if example is not None and example_batch is None else None,
        keeps=all(keeps(norm_layer, target) for norm_layer in outcome.changes),
    )


def _look(
    module: nn.Module, found: Sequence[NormLayer], example_batch: Any, target: Normalization
) -> tuple[dict[nn.Module, NormInputs], Any, str]:
    """Return what each normalization reads, the example that this was seen with, and what to do about it."""
    if example_batch is not None:
        with attributes_kept(module):
            return inputs_by_graph(module, found, example_batch), example_batch, ""
    inputs, example = inputs_by_trial(module, found, large=target.data in ("in", "gn", "ln"))
    if inputs is None:
        return inputs_in_order(module, found), None, "Pass example_batch, on which the model can be run"
    return inputs, example, f"Seen with an input made up here, {shapes(example)}; pass example_batch to see a true one"


def _first_reasons(left: Sequence[LeftAlone]) -> str:
    reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in left[:3])
    return f"{reasons}; …" if len(left) > 3 else reasons


def _checked(module: Any, to: Any, groups: Any, unbiased: Any, optimizer: Any) -> Normalization:
    """Return the normalization that is meant, once everything else is what it has to be."""
    check_module("swap_norm(module, to)", module)
    target = find_norm(to, "to")
    if groups is not None and target.data != "gn":
        raise ConfigurationError(f"groups={shown(groups)} is for group normalization, not for {to!r}. Leave it out.")
    if groups is not None:
        whole("groups", groups, 1, "Leave it out for the default.")
    flag("unbiased", unbiased)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"optimizer={shown(optimizer)} must be a torch.optim.Optimizer that exists already.")
    return target


def _check_wrapping(module: nn.Module) -> None:
    trained = getattr(getattr(_running_trainer(module), "strategy", None), "model", None)
    for child in [*module.modules(), trained]:
        kinds = {base.__name__ for base in type(child).__mro__} & set(_WRAPPERS)
        if kinds:
            raise ConfigurationError(
                f"swap_norm was given a model wrapped by {min(kinds, key=_WRAPPERS.index)}, which has taken stock of "
                "its parameters. Swap first and wrap afterwards."
            )
    if is_compiled(module):
        raise ConfigurationError("swap_norm was given a compiled model. Swap first and call torch.compile afterwards.")


def _check_optimizers(module: nn.Module, optimizer: Optimizer | None, replaced: set[int]) -> None:
    """Refuse where an optimizer holds parameters, given by id, that would vanish, or would miss new ones."""
    optimizers = [*([] if optimizer is None else [optimizer]), *getattr(_running_trainer(module), "optimizers", ())]
    for held in optimizers:
        if any(id(p) in replaced for group in held.param_groups for p in group["params"]):
            raise ConfigurationError(
                f"{type(held).__name__} holds parameters of the model that swap_norm would replace. Swap first and "
                "build the optimizer afterwards (in Lightning: before Trainer.fit, or in configure_model)."
            )


def _running_trainer(module: nn.Module) -> Any:
    """Return the Trainer that a LightningModule is in the hands of, if any; one that has finished lets go of it."""
    trainer = getattr(module, "_trainer", None)
    return trainer if getattr(getattr(trainer, "state", None), "status", None) == "running" else None


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
