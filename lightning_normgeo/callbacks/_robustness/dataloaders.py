"""Test loaders of a Trainer, during its loops and after fit: their names and their batches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from lightning_normgeo._lightning import is_lightnings_own
from lightning_normgeo.callbacks._monitors.sharded_models import runs_under
from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.utilities.checked_values import short_repr


def named_loaders(loaders: Any) -> dict[str, Any]:
    """Return the loaders of a loop by name.

    A single loader has the empty name. Loaders of a list are called ``dataloader_0``, ``dataloader_1``, …; those of a
    dictionary by its keys. In nested collections the parts of a name are joined by a dot.
    """
    found = list(_flat(loaders))
    if len(found) == 1:
        return {"": found[0][1]}
    names: dict[str, Any] = {}
    for name, loader in found:
        unique, number = name, 0  # different keys of a dictionary may become the same name once they are cleaned
        while unique in names:
            number += 1
            unique = f"{name}.{number}"
        names[unique] = loader
    return names


def loaders_of(loop: Any) -> dict[str, Any]:
    """Return the loaders of the Trainer's evaluation loop by name; none before it has them."""
    combined = getattr(loop, "_combined_loader", None)
    return {} if combined is None else named_loaders(combined)


def _flat(loaders: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and the loader of each entry of nested collections."""
    if isinstance(loaders, Mapping):
        for key, value in loaders.items():
            yield from _flat(value, f"{prefix}{re.sub(r'[^A-Za-z0-9_-]+', '_', str(key))}.")
    elif isinstance(loaders, (list, tuple)):
        for number, value in enumerate(loaders):
            yield from _flat(value, f"{prefix}dataloader_{number}." if not prefix else f"{prefix}{number}.")
    elif hasattr(loaders, "iterables") and hasattr(loaders, "flattened"):  # a CombinedLoader
        yield from _flat(loaders.iterables, prefix)
    else:
        yield prefix.rstrip(".") or "dataloader_0", loaders


def batches_by_loader(loop: Any, batch: Any, number: int) -> Iterator[tuple[int, Any]]:
    """Yield the number of a loader and its batch, for each loader whose batch is in ``batch``.

    A sequential loop gives one loader's batch at a time; other modes of a CombinedLoader join the batches of all.

    Args:
        loop: the Trainer's evaluation loop.
        batch: as the hooks of the loop get it.
        number: the loader's number in a sequential loop (``dataloader_idx``).
    """
    combined = getattr(loop, "_combined_loader", None)
    if combined is None or getattr(combined, "_mode", "sequential") == "sequential":
        yield number, batch
        return
    parts = _parts(combined.iterables, batch)
    yield from ((k, part) for k, part in enumerate(parts) if part is not None)


def _parts(loaders: Any, batch: Any) -> Iterator[Any]:
    """Yield each loader's part of a joint batch, in the order of :func:`named_loaders`."""
    if isinstance(loaders, (Mapping, list, tuple)):
        keys = loaders.keys() if isinstance(loaders, Mapping) else range(len(loaders))
        for key in keys:
            yield from _parts(loaders[key], batch[key])
    else:
        yield batch


def test_source(trainer: Any, callback: str) -> Any:
    """Return the data module or LightningModule with a ``test_dataloader`` of its own.

    Args:
        trainer: knows both.
        callback: name of the callback, for the message.

    Raises:
        UnsuitableError: if neither has one.
    """
    for source in (trainer.datamodule, trainer.lightning_module):
        if source is not None and not is_lightnings_own(source, "test_dataloader"):
            return source
    raise UnsuitableError(
        f"{callback}(after_fit=True) needs a test_dataloader in the data module or in the LightningModule. "
        "Add one, or call trainer.test(model, dataloader) with after_fit=False."
    )


@contextmanager
def testing(trainer: Any) -> Iterator[None]:
    """Put the Trainer into its test stage, and restore the stage and the data module's attributes afterwards.

    The project's hooks and data module may look at ``trainer.testing``.
    """
    stage, data = trainer.state.stage, trainer.datamodule
    attributes = {} if data is None else dict(vars(data))
    trainer.state.stage = type(stage).TESTING
    try:
        yield
    finally:
        trainer.state.stage = stage
        if data is not None:
            vars(data).clear()
            vars(data).update(attributes)


def test_loaders(trainer: Any, callback: str) -> dict[str, Any]:
    """Return the test loaders by name, with distributed samplers if there are several processes.

    To be called inside :func:`testing`.

    Args:
        trainer: the Trainer.
        callback: name of the callback, for the message.

    Raises:
        UnsuitableError: if there are none, or one is None.
    """
    source = test_source(trainer, callback)
    if source is trainer.datamodule:
        source.setup("test")
    given = source.test_dataloader()
    loaders = named_loaders(given)
    if not loaders or any(loader is None for loader in loaders.values()):
        raise UnsuitableError(
            f"{callback}(after_fit=True) got {short_repr(given)} from {type(source).__name__}.test_dataloader, which "
            "is no data. Return a DataLoader, or call trainer.test(model, dataloader) with after_fit=False."
        )
    if trainer.world_size == 1:
        return loaders
    stage = type(trainer.state.stage).TESTING
    prepare = trainer._data_connector._prepare_dataloader  # adds the distributed sampler, as Lightning's own loops do
    return {name: prepare(loader, shuffle=False, mode=stage) for name, loader in loaders.items()}


def batches_at(trainer: Any, loader: Any, positions: Sequence[int], number: int = 0) -> Iterable[Any]:
    """Yield the samples at positions of a loader's data set, in batches on the device."""
    again = DataLoader(loader.dataset, loader.batch_size, sampler=positions, collate_fn=loader.collate_fn)
    return (_on_device(trainer, batch, number) for batch in again)


def batches_of(trainer: Any, loader: Any, number: int = 0, limit: str = "test") -> Iterable[Any]:
    """Yield the batches of a loader after fit, on the device, up to a limit of the Trainer's.

    Args:
        trainer: has the limits ``limit_test_batches`` and ``limit_val_batches``.
        loader: the loader.
        number: its number.
        limit: ``test`` or ``validation``.
    """
    for batch in islice(loader, batch_count(trainer, loader, limit)):
        yield _on_device(trainer, batch, number)


def _on_device(trainer: Any, batch: Any, number: int) -> Any:
    """Return a batch as the project's step gets it in Lightning's own loops."""
    converted = trainer.precision_plugin.convert_input(batch)
    converted = trainer.lightning_module._on_before_batch_transfer(converted, dataloader_idx=number)
    return trainer.strategy.batch_to_device(converted, dataloader_idx=number)


def batch_count(trainer: Any, loader: Any, limit: str = "test") -> int | None:
    """Return the number of a loader's batches that are evaluated after fit; None if there is no length and no limit."""
    most = trainer.limit_test_batches if limit == "test" else trainer.limit_val_batches
    try:
        length = len(loader)
    except TypeError:
        return most if isinstance(most, int) and not isinstance(most, bool) else None
    if most is None:
        return length
    return min(length, most if isinstance(most, int) else int(most * length))


def check_not_sharded(trainer: Any, callback: str = "RobustnessEvaluation") -> None:
    """Refuse strategies that shard the model's layers, and whose weights cannot be gathered by ``EvaluationProcesses``.

    There every process has to take part in every forward pass, but a process without samples left makes none.

    Raises:
        UnsuitableError: naming the strategy.
    """
    strategy = runs_under(trainer, "DeepSpeedStrategy", "XLAFSDPStrategy")
    if strategy is not None:
        raise UnsuitableError(
            f"{callback} cannot run under {strategy}, where processes wait for each other in every layer. "
            "Save a checkpoint and test it on one device or with ddp."
        )


def check_all_take_part(trainer: Any, callback: str = "RobustnessEvaluation") -> None:
    """Refuse loops that Lightning skips on processes without a batch: the other processes would wait for them forever.

    Raises:
        UnsuitableError: if the project allows for loaders without a batch.
    """
    flag = "allow_zero_length_dataloader_with_multiple_devices"
    allows = any(getattr(one, flag, False) for one in (trainer.lightning_module, trainer.datamodule))
    if trainer.world_size > 1 and allows:
        raise UnsuitableError(
            f"{callback} needs every process in its loop, and {flag} lets some be without a batch. Set it to "
            "False, or test on one device."
        )
