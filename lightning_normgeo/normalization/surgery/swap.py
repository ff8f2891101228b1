"""Replacement of the normalization of an existing model, with a report of the changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.compiled_modules import is_compiled
from lightning_normgeo.normalization.example_inputs import attributes_kept, inputs_by_trial, shapes
from lightning_normgeo.normalization.registry import Normalization, find_norm
from lightning_normgeo.normalization.surgery.function_change import Yardstick
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer, matching, normalization_layers
from lightning_normgeo.normalization.surgery.planning import plan_all
from lightning_normgeo.normalization.surgery.preceding_layers import NormInputs, inputs_by_graph, inputs_in_order
from lightning_normgeo.normalization.surgery.swap_report import LeftAlone, SwapReport
from lightning_normgeo.normalization.surgery.trial import Trial, keeps
from lightning_normgeo.normalization.user_inputs import as_example, check_module
from lightning_normgeo.utilities.checked_values import flag, short_repr, whole

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
    r"""Replace the normalization of an existing model, in place.

    Normalizations over the data (``bn``, ``ln``, ``in``, ``gn``) replace the old layers under their module paths. γ
    and β stay the same Parameters, so that an existing optimizer stays valid. ε, momentum, device, dtype, training mode
    and the activations inside subclasses (put behind the new layer, in a Sequential) are kept. Running statistics are
    kept from one batch normalization to another. ``ln`` normalizes channels and positions jointly
    (``GroupNorm(1, C)``). A layer that would normalize only one or two values is not replaced.

    For ``wn``, ``cwn``, ``ws``, ``sn`` and ``none`` the layer is removed, and the weight that feeds it is parametrized.
    If that weight is directly in front of the layer, γ, β and running statistics are folded into weight and bias:

    .. math:: W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}, \quad
              b' = \beta + \gamma (b - \mu) / \sqrt{\sigma^2 + \varepsilon}

    (eq 12; without running statistics σ² + ε = 1, μ = 0). So in evaluation mode ``none``, ``wn`` and ``sn`` compute
    the same function as the batch normalization before, ``cwn`` and ``ws`` the same up to the mean of each row of W,
    and ``wn+mbn`` the same, with μ and β in the new layer. ``cwn`` and ``ws`` without a γ behind them get a learnable
    gain per row, ``sn`` one for the matrix. Pairs such as ``gn+ws`` replace the layer, parametrize the weight and fold
    nothing. Running statistics of a trained batch normalization then do not fit the changed weights, and have to be
    renewed by a pass in training mode.

    Whether the function is unchanged is measured: the model runs in evaluation mode before and after the swap, and each
    layer is compared with its state before. A layer that should compute the same function and would not is left as it
    was, and the report gives the reason. All side effects of these forward passes are undone.

    Args:
        module: the model; layers inside it are replaced.
        to: name of the new normalization, a key of ``NORMS``.
        layers: globs over the module paths of the normalization layers to be replaced.
        groups: number of groups of ``gn``. Default: the largest divisor of the channels, up to 32, with at least two
            channels and eight values per sample in each group.
        unbiased: whether the standard deviation of ``ws`` divides by n - 1 (Qiao's code) or by n (the paper).
        example_batch: a batch, or the tuple of arguments. The model runs on it to find the weights in front of each
            layer, also through sums and concatenations, and to measure what the swap changed. Default: the example of
            the model (``example_input_array``, timm's ``input_size``), or noise that fits its first layer. If the model
            accepts none of these, only layers whose preceding weights are certain are replaced. The size of an
            intended change is measured only with an example that was given, since noise is not representative.
        optimizer: an existing optimizer, checked for parameters that the swap would remove. The optimizers of a running
            Trainer are always checked.

    Returns:
        The changes, the layers that were not replaced and why, the measured change of the function in evaluation mode,
        and the number of parameters before and after.

    Raises:
        ConfigurationError: for an unknown name; no layer to replace, or none that would change; groups that do not
            divide the channels or hold one or two values; lazy layers; a model that is compiled or wrapped by DDP or
            FSDP; an optimizer that holds parameters that would be removed, or would miss new ones.

    Cost: one forward pass to find the preceding layers and about three to measure the change; more if layers have to be
    tried one by one, or if a change is so close to the tolerance that it is measured again in float64.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> convolution, last = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(288, 4)
        >>> network = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), last)
        >>> images = torch.rand(4, 3, 8, 8)
        >>> report = swap_norm(network, "gn", example_batch=images)
        >>> type(network[1]).__name__, network[1].num_groups
        ('GroupNorm', 4)
    """
    target = _checked(module, to, groups, unbiased, optimizer)
    example_batch = None if example_batch is None else as_example(module, example_batch)
    _check_wrapping(module)
    found = normalization_layers(module)
    norm_layers, parameters = matching(found, layers), _count(module)
    inputs, example, hint = _look(module, found, example_batch, target)
    plans, left = plan_all(module, norm_layers, inputs, target, groups, hint)
    yardstick = None
    # noise is enough to show whether a function stays the same; the size of an intended change needs real data
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
    """Return the layers that feed each normalization, the example used to find them, and advice for error messages."""
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
    """Check the arguments of ``swap_norm`` and return the normalization called ``to``."""
    check_module("swap_norm(module, to)", module)
    target = find_norm(to, "to")
    if groups is not None and target.data != "gn":
        raise ConfigurationError(
            f"groups={short_repr(groups)} is for group normalization, not for {to!r}. Leave it out."
        )
    if groups is not None:
        whole("groups", groups, 1, "Leave it out for the default.")
    flag("unbiased", unbiased)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"optimizer={short_repr(optimizer)} must be a torch.optim.Optimizer that exists already."
        )
    return target


def _check_wrapping(module: nn.Module) -> None:
    trained = getattr(getattr(_running_trainer(module), "strategy", None), "model", None)
    for child in [*module.modules(), trained]:
        kinds = {base.__name__ for base in type(child).__mro__} & set(_WRAPPERS)
        if kinds:
            raise ConfigurationError(
                f"swap_norm was given a model wrapped by {min(kinds, key=_WRAPPERS.index)}, which already holds its "
                "parameters. Swap first and wrap afterwards."
            )
    if is_compiled(module):
        raise ConfigurationError("swap_norm was given a compiled model. Swap first and call torch.compile afterwards.")


def _check_optimizers(module: nn.Module, optimizer: Optimizer | None, replaced: set[int]) -> None:
    """Raise an error if an optimizer holds any of the parameters, given by id, that the swap replaces."""
    optimizers = list(getattr(_running_trainer(module), "optimizers", ()))
    if optimizer is not None:
        optimizers.insert(0, optimizer)
    for held in optimizers:
        if any(id(p) in replaced for group in held.param_groups for p in group["params"]):
            raise ConfigurationError(
                f"{type(held).__name__} holds parameters of the model that swap_norm would replace. Swap first and "
                "build the optimizer afterwards (in Lightning: before Trainer.fit, or in configure_model)."
            )


def _running_trainer(module: nn.Module) -> Any:
    """Return the Trainer that is running a LightningModule; None if there is none or it has finished."""
    trainer = getattr(module, "_trainer", None)
    return trainer if getattr(getattr(trainer, "state", None), "status", None) == "running" else None


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
