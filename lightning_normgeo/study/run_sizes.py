"""Size of a run before it begins: measured steps, bytes of its record and of its checkpoints, from its settings.

No data is loaded and nothing is trained: the model is built on the meta device, the optimizer for one small weight. The
bytes of a record come from a model with the columns below, which were counted in short trainings of ResNets with 8
normalizations, SGD (with and without momentum and weight decay) and AdamW. Its numbers are those of a typical value and
key; real records differ by up to a quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lightning_normgeo.callbacks._monitors.cadence import measured_steps

_BYTES_OF_A_VALUE, _BYTES_OF_A_KEY = 11.9, 19.8
"""A value by layer, with nine digits and a comma, or part of one that all layers share; and an aggregate."""
_BYTES_OF_A_MEASURED_STEP, _BYTES_OF_A_LOGGED_STEP, _BYTES_OF_A_RECORD = 220, 120, 13_000
"""What a record has besides: heads of lines, the training loss, settings, names of keys and columns, and the end."""
_MOST_KEYS = 16
"""Largest number of layers of one monitor with metric keys of their own."""
_PATTERN = "*.layer1.0.*"
"""Layers that have keys of their own by default, as a glob for their paths after a dot."""


@dataclass(frozen=True)
class _Columns:
    """Numbers of quantities of a monitor: for each weight, each batch normalization, and each layer with own keys."""

    of_a_weight: int = 0
    of_a_batch_norm: int = 0
    of_a_chosen_layer: int = 0
    aggregates: int = 0
    keys_of_a_layer: int = 0


_GROWTH, _GROWTH_WITH_MOMENTUM_OR_DECAY, _GROWTH_CUMULATIVE = 12, 14, 10
_COLUMNS = {
    "OrthogonalityMonitor": _Columns(2, 1, 0, 9, 3),
    "AffineConvergenceMonitor": _Columns(0, 6, 0, 9, 6),
    "BatchGeometryMonitor": _Columns(0, 4, 15, 21, 19),
    "SymmetryMonitor": _Columns(5, 0, 0, 8, 0),
}


@dataclass(frozen=True)
class RunSize:
    """Size of one run; see :func:`size_of`.

    Attributes:
        steps: Optimizer steps; None if they are unknown before the data is loaded, or unlimited.
        measured: Steps at which the monitor that measures most often measures.
        record: Bytes of ``record.jsonl``; if the steps are unknown, those of one measured step.
        weights: Bytes of a checkpoint without optimizer states.
        checkpoint: Bytes of a checkpoint with optimizer states.
        files: Number of checkpoint files that are left at the end.
    """

    steps: int | None
    measured: int | None
    record: float
    weights: float
    checkpoint: float
    files: int


def size_of(settings: Any, meta_model: Callable[..., nn.Module]) -> RunSize:
    """Return the size of a run.

    Args:
        settings: Settings of ``normgeo fit``, as parsed.
        meta_model: Function that builds a model on the meta device, from the settings of the model.
    """
    trainer, model = settings.trainer, settings.model.as_dict()
    network = meta_model(**{**model, "norm": "bn", "groups": None})  # spectral normalizations take seconds to build
    small = meta_model(**{**model, "arch": "resnet18"})
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in small.modules())
    weights = [name for name, parameter in network.named_parameters() if parameter.ndim >= 2]
    batch_norms = len(weights) - 1 if has_batch_norm else 0
    steps, per_epoch = _steps(trainer, settings.get("data"))
    measured, record = _record(trainer, settings.get("optimizer"), weights, batch_norms, steps)
    held = sum(entry.nbytes for entry in network.state_dict().values())
    of_parameters = sum(parameter.nbytes for parameter in network.parameters())
    states = of_parameters * _states_of(settings.get("optimizer"))
    epochs = steps // per_epoch if steps and per_epoch else 1
    return RunSize(steps, measured, record, held, held + states, _files(trainer, epochs))


def _record(
    trainer: Any, optimizer: Any, weights: list[str], batch_norms: int, steps: int | None
) -> tuple[int | None, float]:
    """Return the number of measured steps and the bytes of a record."""
    every_row = max(int(trainer.get("log_every_n_steps") or 50), 1)
    measured, of_values = 0, 0.0
    for name, options in _entries(trainer.get("callbacks")):
        columns = _columns_of(name, options, optimizer)
        if columns is None:
            continue
        at_a_step = _bytes_of_a_step(columns, weights, batch_norms, options.get("layers"))
        points = 1 if steps is None else measured_steps(_cadence(options.get("every_n_steps"), every_row), steps)
        measured = max(measured, points)
        of_values += points * at_a_step
    if steps is None:
        return None, of_values + _BYTES_OF_A_MEASURED_STEP
    rest = measured * _BYTES_OF_A_MEASURED_STEP + steps // every_row * _BYTES_OF_A_LOGGED_STEP
    return measured, of_values + rest + _BYTES_OF_A_RECORD


def _bytes_of_a_step(columns: _Columns, weights: list[str], batch_norms: int, layers: Any) -> float:
    """Return the bytes of the values of one monitor at one measured step."""
    globs = [_PATTERN] if layers is None else [layers] if isinstance(layers, str) else layers
    chosen = sum(any(fnmatchcase(f".{weight}", f"*{glob}*") for glob in globs) for weight in weights)
    chosen = min(chosen, _MOST_KEYS) if layers is None else chosen * (chosen <= _MOST_KEYS)
    values = len(weights) * columns.of_a_weight + batch_norms * columns.of_a_batch_norm
    values += chosen * columns.of_a_chosen_layer
    keys = columns.aggregates + chosen * columns.keys_of_a_layer
    return values * _BYTES_OF_A_VALUE + keys * _BYTES_OF_A_KEY


def _columns_of(name: str, options: Mapping[str, Any], optimizer: Any) -> _Columns | None:
    if name != "NormGrowthMonitor":
        return _COLUMNS.get(name)
    told = {} if optimizer is None else optimizer.get("init_args") or {}
    more = any(told.get(option) for option in ("momentum", "betas", "weight_decay"))
    columns = _GROWTH_WITH_MOMENTUM_OR_DECAY if more else _GROWTH
    columns += _GROWTH_CUMULATIVE if options.get("cumulative") else 0
    return _Columns(columns, 0, 0, 2 * columns + 3, columns)


def _cadence(every: Any, of_the_trainer: int) -> int:
    """Return a cadence as monitors have it: negative if it thins out."""
    return -of_the_trainer if every == "auto" else every or of_the_trainer


def _steps(trainer: Any, data: Any) -> tuple[int | None, int | None]:
    """Return the numbers of optimizer steps of a run and of an epoch; None where they are unknown."""
    batches = _batches(trainer, data)
    per_epoch = None if batches is None else -(-batches // (trainer.get("accumulate_grad_batches") or 1))
    limits = []
    if (trainer.get("max_steps") or -1) > 0:
        limits.append(trainer.max_steps)
    epochs = trainer.get("max_epochs")
    epochs = 1000 if epochs is None and not limits else epochs or -1  # Lightning's default
    if epochs > 0 and per_epoch is not None:
        limits.append(epochs * per_epoch)
    known = bool(limits) and (per_epoch is not None or epochs <= 0)
    return (min(limits) if known else None), per_epoch


def _batches(trainer: Any, data: Any) -> int | None:
    """Return the number of training batches of an epoch on each device; None if it is unknown."""
    limit = trainer.get("overfit_batches") or trainer.get("limit_train_batches")
    there = _batches_of(data)
    if isinstance(limit, int) or (limit or 0) > 1:  # a number of batches, which may be parsed as a float
        return int(limit) if there is None else min(int(limit), there)
    if there is None:
        return None
    devices = trainer.get("devices")
    devices = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    there = max(there // (devices * (trainer.get("num_nodes") or 1)), 1)
    return there if limit is None else max(int(there * limit), 1)


def _batches_of(data: Any) -> int | None:
    """Return the number of batches of a data module that knows it without loading its data."""
    try:
        kind = _class_of(data.class_path)
        if not hasattr(kind, "training_batches"):
            return None
        return int(kind(**data.init_args).training_batches())
    except Exception:  # a folder that is not there yet, or a user's own class
        return None


def _states_of(optimizer: Any) -> float:
    """Return the bytes of an optimizer's states for each byte of a parameter, from a step with one small weight."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    try:
        built = _class_of(optimizer.class_path)([weight], **(optimizer.get("init_args") or {}))
        built.step()
        held = built.state_dict()["state"].values()
    except Exception:  # of an optimizer that needs more than that
        return 0.0
    return sum(entry.nbytes for state in held for entry in state.values() if torch.is_tensor(entry)) / weight.nbytes


def _files(trainer: Any, epochs: int) -> int:
    """Return the number of checkpoint files at the end, with the newest one beside the best."""
    if trainer.get("enable_checkpointing") is False:
        return 0
    savers = [options for name, options in _entries(trainer.get("callbacks")) if name == "ModelCheckpoint"]
    if not savers:
        return 1
    files = 0
    for options in savers:
        best = options.get("save_top_k", 1)
        files += (epochs if best < 0 else best) + (options.get("save_last") is True)
    keep_the_best = all(one.get("monitor") is not None and one.get("save_last") is not False for one in savers)
    return files + keep_the_best


def _entries(found: Any) -> list[tuple[str, Any]]:
    """Return the class name and settings of each entry of a list of classes."""
    entries = found if isinstance(found, list) else [found]
    known = [entry for entry in entries if hasattr(entry, "get")]
    return [(entry.class_path.rpartition(".")[2], entry.get("init_args") or {}) for entry in known]


def _class_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
