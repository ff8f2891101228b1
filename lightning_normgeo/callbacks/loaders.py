"""Test loaders during and after fit: which there are, and which samples their batches hold."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch.utils.data import DistributedSampler

from lightning_normgeo._lightning import is_lightnings_own
from lightning_normgeo.callbacks.sharding import runs_under
from lightning_normgeo.errors import ConfigurationError


def indices_of(trainer: Any, loader: Any, seen: int, count: int) -> list[int | None]:
    """Return which samples of the data set a batch holds; None for those that do not count here.

    A distributed sampler deals out samples in turn and repeats some to fill the last round. Without one every process
    sees all samples, and the first one counts them.
    """
    if trainer.world_size == 1:
        return list(range(seen, seen + count))
    if not isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return [seen + i if trainer.global_rank == 0 else None for i in range(count)]
    positions = [trainer.global_rank + trainer.world_size * (seen + i) for i in range(count)]
    return [position if position < len(loader.dataset) else None for position in positions]


def test_source(trainer: Any) -> Any:
    """Return the object whose ``test_dataloader`` was written by the user.

    Raises:
        ConfigurationError: if there is none.
    """
    for source in (trainer.datamodule, trainer.lightning_module):
        if source is not None and not is_lightnings_own(source, "test_dataloader"):
            return source
    raise ConfigurationError(
        "RobustnessEvaluation(after_fit=True) needs a test_dataloader in the data module or in the LightningModule. "
        "Add one, or call trainer.test(model, dataloader) with after_fit=False."
    )


def test_loaders(trainer: Any) -> list[Any]:
    """Return the test loaders, dealt out to the processes."""
    source = test_source(trainer)
    if source is trainer.datamodule:
        source.setup("test")
    loaders = source.test_dataloader()
    loaders = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
    if trainer.world_size == 1:
        return loaders
    stage = type(trainer.state.stage).TESTING
    return [trainer._data_connector._prepare_dataloader(loader, shuffle=False, mode=stage) for loader in loaders]


def batches_of(trainer: Any, loader: Any) -> Iterable[Any]:
    """Yield batches on the device, after fit."""
    limit = trainer.limit_test_batches
    batches = len(loader) if limit is None else int(limit if isinstance(limit, int) else limit * len(loader))
    batches = min(batches, len(loader))
    for batch in islice(loader, batches):
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)


def loader_of(loaders: Any, number: int) -> Any:
    """Return one of a loop's loaders."""
    return loaders[number] if isinstance(loaders, (list, tuple)) else loaders


def refuse_divided(trainer: Any) -> None:
    """Refuse models whose layers every process has to run together: one that has run out of samples would not.

    Raises:
        ConfigurationError: naming the strategy.
    """
    strategy = runs_under(trainer, "ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy")
    if strategy is not None:
        raise ConfigurationError(
            f"RobustnessEvaluation cannot run under {strategy}, where processes wait for each other in every layer. "
            "Save a checkpoint and test it on one device or with ddp."
        )
