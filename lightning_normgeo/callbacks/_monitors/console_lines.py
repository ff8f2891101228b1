"""The two console lines of a training with monitors: measurements planned at its start, and made by its end."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.callbacks._monitors.cadence import DENSE, Cadence
from lightning_normgeo.callbacks._monitors.measured_step import Monitor
from lightning_normgeo.geometry.rows import has_float64
from lightning_normgeo.geometry.update_rules.registry import description_of
from lightning_normgeo.normalization.names import named_weights
from lightning_normgeo.probes.explain import parameters_of
from lightning_normgeo.runs.verdicts.wording import counted


def opening(monitors: Sequence[Monitor], trainer: Any, module: nn.Module, batch_norms: int | None) -> str:
    """Return the console line for the start: the planned measurements, their cadences, and their loggers.

    Args:
        monitors: the monitors of the Trainer.
        trainer: the Trainer, before its first batch.
        module: the model.
        batch_norms: the number of batch normalizations with γ and β; None where no monitor reads them.
    """
    steps = _steps_ahead(trainer)
    parts = []
    for every in sorted({monitor.cadence() for monitor in monitors}):
        groups = ", ".join(monitor.groups[0] for monitor in monitors if monitor.cadence() == every)
        parts.append(f"{groups} {_how_often(every, steps)}")
    what = _weights(trainer, module)
    if batch_norms is not None:
        what += f", {counted(batch_norms, 'batch normalization')}"
    device = trainer.strategy.root_device
    coarse = (
        "" if has_float64(device) else f" {device.type} has no float64: what is measured is copied to the CPU first."
    )
    return f"normgeo measures {'; '.join(parts)}. {what}. Results go to {_places(trainer)}.{coarse}"


def closing(cadence: Cadence, trainer: Any, rows: int, left_out: Counter[str], unexplained: Iterable[str]) -> str:
    """Return the console line for the end: the measured steps, those left out with reasons, and the logged rows.

    Args:
        cadence: the counts of steps taken and measured.
        trainer: the Trainer, after training.
        rows: the number of logged rows.
        left_out: the number of measurements that were left out, by reason.
        unexplained: class names of optimizers without a formula.
    """
    kinds = _names_by_id(trainer)
    each = [f"{kinds.get(key, 'another')} {cadence.measured[key]} of {taken}" for key, taken in cadence.taken.items()]
    taken, measured = sum(cadence.taken.values()), sum(cadence.measured.values())
    line = f"normgeo measured {measured} of {counted(taken, 'optimizer step')}"
    if len(each) > 1:
        line += f" ({', '.join(each)})"
    line += f", {counted(rows, 'row')} logged"
    line += "".join(f"; left out {count} x: {reason}" for reason, count in left_out.items())
    names = sorted(set(unexplained))
    if names:
        line += f"; no formula for {', '.join(names)}, so identity_… keys in place of explained"
    return line + "."


def nothing_measured(cadence: Cadence, trainer: Any, backwards: int, every: int) -> str | None:
    """Return a warning if no step of the training, or of one optimizer, was measured; None if there is none to give.

    Args:
        cadence: of all monitors.
        trainer: at the end of the training, or of what an exception has left of it.
        backwards: the number of backward passes that were seen.
        every: the smallest number of steps between two measurements.
    """
    kinds = _names_by_id(trainer)
    if not cadence.taken:
        if not backwards:
            return None
        names = ", ".join(kinds.values())
        nothing = f"No monitor has measured anything: there were backward passes, but no step() of {names}. "
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return f"{nothing}The gradient scaler skipped them, since gradients were not finite: train longer."
        return f"{nothing}If other methods move the weights (first_step and second_step of SAM), let step() call them."
    never = [
        f"{kinds.get(key, 'an optimizer')} ({taken} steps)"
        for key, taken in cadence.taken.items()
        if not cadence.measured[key] and taken < every
    ]
    succeeded = cadence.exchanged and cadence.measured.total() > 0  # one was measured in the place of another
    if not never or succeeded:
        return None
    return f"Never measured: {', '.join(never)}. Choose a smaller every_n_steps for the monitors."


def optimizers_of(trainer: Any) -> list[dict[str, Any]]:
    """Return the class of each optimizer, with its settings."""
    return [
        {"class": type(optimizer).__name__, "settings": _settings(optimizer.param_groups)}
        for optimizer in trainer.optimizers
    ]


_OF_ALL_GROUPS = ("momentum", "weight_decay", "nesterov", "dampening")
"""Settings of which the largest of all parameter groups counts: eq 16 covers no step with one of them."""


def _settings(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return numbers and flags of the first parameter group; of weight decay and the like the largest of all groups.

    Groups of biases without weight decay may come before those of weights.
    """
    found = {name: value for group in groups[:1] for name, value in group.items() if _is_number(value)}
    for name in _OF_ALL_GROUPS:
        values = [group[name] for group in groups if _is_number(group.get(name))]
        if values:
            found[name] = max(values)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float))


_DEEPEST = 8
"""Subsets of subsets that are looked into: a data set may call itself its own."""


def network_of(module: nn.Module) -> str:
    """Return the class name of the network: of the only child with parameters if there is one, else of the module."""
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    return type(children[0] if len(children) == 1 else module).__name__


def data_of(trainer: Any) -> str:
    """Return the class name of the training data set without its subsets; empty if it says nothing, or is unknown."""
    dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
    for _ in range(_DEEPEST):
        dataset = getattr(dataset, "dataset", dataset)
    name = type(dataset).__name__
    return "" if dataset is None or name in ("TensorDataset", "list", "tuple") else name


def _names_by_id(trainer: Any) -> dict[int, str]:
    return {id(optimizer): type(optimizer).__name__ for optimizer in trainer.optimizers}


def _weights(trainer: Any, module: nn.Module) -> str:
    """Return a phrase with the number of weights of each kind and the optimizers that move them."""
    held = {id(parameter) for optimizer in trainer.optimizers for parameter in parameters_of(optimizer)}
    weights = [weight for _, weight in named_weights(module, frozen=True)]
    numbers = [weight for weight in weights if weight.is_floating_point() or weight.is_complex()]
    moved = sum(id(weight) in held and weight.requires_grad for weight in numbers)
    kinds = dict.fromkeys(type(optimizer) for optimizer in trainer.optimizers)
    names = [kind.__name__ + (" without a formula" if description_of(kind) is None else "") for kind in kinds]
    rest = {"frozen or in no optimizer": len(numbers) - moved, "of integers or quantized": len(weights) - len(numbers)}
    others = "".join(f", {count:,} {kind}" for kind, count in rest.items() if count)
    return f"{counted(moved, 'weight')} ({', '.join(names)}){others}"


def _how_often(every: int, steps: float) -> str:
    if not every:
        return "never, since log_every_n_steps is 0 (give the monitor an every_n_steps)"
    often = "every step" if abs(every) == 1 else f"every {abs(every)} steps"
    often += ", later less often" if every < 0 and steps > DENSE * -every else ""
    every = abs(every)
    if steps < every:
        return f"{often}, which is more than the {counted(int(steps), 'step')} of this training: never"
    return often


def _steps_ahead(trainer: Any) -> float:
    """Return the largest number of optimizer steps that this training can take; ``inf`` if it is not limited."""
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    per_epoch = math.inf if batches == math.inf else math.ceil(batches / max(1, trainer.accumulate_grad_batches))
    by_epochs: float
    if epochs in (None, -1):
        by_epochs = math.inf
    elif epochs == 0:
        by_epochs = 0  # infinity times zero would be NaN
    else:
        by_epochs = per_epoch * epochs
    return min(by_epochs, trainer.max_steps if trainer.max_steps >= 0 else math.inf)


def _places(trainer: Any) -> str:
    off = os.environ.get("WANDB_MODE") == "disabled"
    names = [type(logger).__name__ for logger in trainer.loggers if not (off and is_wandb(logger))]
    return ", ".join(names) if names else "trainer.callback_metrics alone: the Trainer has no logger"
