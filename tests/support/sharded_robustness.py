"""Script of tests/callbacks/robustness/test_sharded.py: evaluations of sharded models, and of uneven shares."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from lightning_normgeo import ChannelEvaluation, RobustnessEvaluation  # noqa: E402
from lightning_normgeo.callbacks._robustness.distributed import gathered_flat_model, gathered_model, processes  # noqa: E402
from support.ddp_robustness import sensitive  # noqa: E402
from support.fsdp_scenarios import State  # noqa: E402
from support.gathered_flat_models import AnyPrecision, FlatOnCpu, every_flat_way, in_layers  # noqa: E402, F401
from support.gathered_models import every_way  # noqa: E402
from support.processes import leave_group  # noqa: E402
from support.projects import Project, images, same, trainer  # noqa: E402

RANK, WORLD, SHARDS = int(os.environ.get("LOCAL_RANK", "0")), 1, "fully_shard"
COUNT = 11
UNEVEN = [range(7), range(7, COUNT)]
"""Samples of each of two processes."""
ATTACKS = ["gaussian", "bim", "torchattacks.PGD"]
SHORT, LONG = 2.0, 3.0
"""Timeout of the Trainer's collectives, and the time that one process takes, in seconds."""
Report = dict[str, Any]


def loader(batch_size: int = 2, uneven: bool = False) -> DataLoader[Any]:
    """Return images of all processes, or those of this one."""
    data = TensorDataset(*images(COUNT, dtype=torch.float64).dataset.tensors)  # type: ignore[attr-defined]
    mine = [k for part in (UNEVEN if WORLD == 1 else [UNEVEN[RANK]]) for k in part]
    return DataLoader(data, batch_size, sampler=mine if uneven else None)


class Sharded(Project):
    """A classifier that is sharded by fully_shard if there are several processes.

    Args:
        passes: whether its test step calls the network, which takes all processes.
    """

    def __init__(self, passes: bool = True) -> None:
        torch.manual_seed(0)
        super().__init__(net=sensitive())
        self.double()
        self.passes, self.is_divided = passes, False

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.is_divided:
            self.is_divided = True
            self.divide()
        elif isinstance(self.trainer.strategy, FlatOnCpu) and not self.passes:
            # else the strategy wraps the whole project, and every test step takes all processes
            self.net = in_layers(self.net)

    def divide(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for part in (self.net[0], self.net[3], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if self.passes:
            self(batch[0])

    def test_dataloader(self) -> Any:
        return loader()


class TensorParallel(Sharded):
    def divide(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"8": ColwiseParallel()})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


def strategy(parallel: int = 1) -> Report:
    """Return settings of a Trainer for a model that is sharded over all processes."""
    if WORLD == 1:
        return {}
    if SHARDS == "flat":
        whole = FlatOnCpu(auto_wrap_policy={torch.nn.Conv2d})
        return {"strategy": whole, "devices": WORLD, "plugins": AnyPrecision("32-true")}
    sizes = {"data_parallel_size": WORLD // parallel, "tensor_parallel_size": parallel}
    return {"strategy": ModelParallelStrategy(**sizes), "devices": WORLD}


def ddp() -> Report:
    return {"strategy": "ddp", "devices": WORLD} if WORLD > 1 else {}


def decisions(callback: RobustnessEvaluation) -> Report:
    """Return the sorted (sample, label, prediction) of each attack, and the reasons for missing ones."""
    found: Report = {"not evaluated": callback.not_evaluated}
    for report in callback.reports.values():
        for attack in report.decisions.attacks:
            rows = report.decisions.of(attack)
            columns = (getattr(rows, name).tolist() for name in ("sample", "label", "prediction"))
            found[attack] = sorted(zip(*columns, strict=True))
    return found


def evaluation(kind: type[RobustnessEvaluation] = RobustnessEvaluation, **settings: Any) -> RobustnessEvaluation:
    given = {"eps": 0.02, "steps": 4, "attacks": ATTACKS, "noise_std": 0.1, "num_images": 0, "batch_size": 3}
    return kind(**{**given, **settings})


def tested(project: Any, loaders: Any, spread: Report, *callbacks: Any, **settings: Any) -> Report:
    """Return the decisions of the first callback in a test."""
    trainer(*callbacks, default_root_dir=FOLDER, **spread, **settings).test(project, loaders, verbose=False)
    return decisions(callbacks[0])


def even() -> Report:
    ways = {"final": {"restarts": 2}, "any": {"semantics": "any", "restarts": 2}}
    return {name: tested(Sharded(), loader(), strategy(), evaluation(**given)) for name, given in ways.items()}


def uneven() -> Report:
    """Test two evaluations and channels in one Trainer, with another number of batches on each process."""
    weak = evaluation(attacks="gaussian", name="weak")
    channels = ChannelEvaluation(ratios=[0.5], criteria=["gamma", "share"])
    callbacks = evaluation(semantics="any", name="strong"), weak, channels
    own = {"use_distributed_sampler": False}
    strong = tested(Sharded(passes=False), loader(uneven=True), strategy(), *callbacks, **own)
    assert channels.report is not None
    masked = [(one.criterion, one.removed, one.correct, one.n) for one in channels.report.results]
    under_ddp = tested(Project(net=sensitive()).double(), loader(uneven=True), ddp(), evaluation(), **own)
    return {"strong": strong, "weak": decisions(weak), "channels": masked, "ddp": under_ddp}


class Counting(RobustnessEvaluation):
    """Counts the images that go through the model."""

    passes = 0

    def logits(self, pl_module: Any, images: Tensor) -> Tensor:
        self.passes += len(images)
        return pl_module(images)  # type: ignore[no-any-return]


def undealt() -> Report:
    """Test without a distributed sampler: each process gets all samples, or other ones behind the same first batch."""
    whole = loader().dataset
    mine = [*range(3), *((3, 4, 5, 6) if RANK == 0 else (7, 8, 9, 10))]
    every = {
        "all": loader(),
        "others": DataLoader(torch.utils.data.Subset(whole, mine if WORLD > 1 else range(COUNT)), 2),
        "limited": loader(),
    }
    found: Report = {}
    for name, given in every.items():
        counting = evaluation(Counting, semantics="any", max_samples=6 if name == "limited" else None)
        found[name] = tested(Sharded(), given, strategy(), counting, use_distributed_sampler=False)
        found[f"{name}: passes"] = counting.passes
    return found


class Slow(RobustnessEvaluation):
    """Takes longer on one process than collectives of the Trainer wait."""

    is_slow = True

    def logits(self, pl_module: Any, images: Tensor) -> Tensor:
        if RANK == 1 and self.is_slow:
            self.is_slow = False
            time.sleep(LONG)
        return pl_module(images)  # type: ignore[no-any-return]


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Context in which collectives of the Trainer fail after a short time."""
    from torch.distributed import distributed_c10d

    own = processes._group and processes._group[1]
    groups = [group for group in distributed_c10d._world.pg_map if group is not own]
    for seconds in (SHORT, 1800.0):
        for group in groups:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
        if seconds == SHORT:
            yield


def slow() -> Report:
    with short_timeouts():
        settings = {"attacks": "bim", "semantics": "any"}
        return {
            name: tested(project, loader(), spread, evaluation(Slow, **settings))
            for name, project, spread in (
                ("sharded", Sharded(), strategy()),
                ("ddp", Project(net=sensitive()).double(), ddp()),
            )
        }


class Fragile(RobustnessEvaluation):
    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        if RANK == 1:
            raise OSError("the disk of one process")
        return batch  # type: ignore[no-any-return]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from loader().dataset if RANK == 0 else ()  # type: ignore[misc]


def stepping_aside() -> Report:
    """Evaluate what one process or none can evaluate; no process may wait for another."""
    attacks = {"attacks": "bim", "steps": 1}
    several = evaluation(**attacks), evaluation(**attacks, name="second"), ChannelEvaluation(ratios=[0.5])
    under_ddp = [evaluation(**attacks, name=name) for name in (None, "second")]
    found = {
        "one fails": tested(Sharded(), loader(), strategy(), evaluation(Fragile, **attacks)),
        "one has no sample": tested(Sharded(passes=False), DataLoader(Stream(), 2), strategy(), *several),
        "second, one has no sample": decisions(several[1]),
        "ddp, one has no sample": tested(Project(net=sensitive()).double(), DataLoader(Stream(), 2), ddp(), *under_ddp),
        "second of ddp, one has no sample": decisions(under_ddp[1]),
        "channels, one has no sample": [one.n for one in several[2].report.results],
    }
    if SHARDS != "flat":
        found["tensor parallel"] = tested(TensorParallel(), loader(), strategy(WORLD), evaluation(**attacks))
    place, name = (gathered_flat_model, "_check_room") if SHARDS == "flat" else (gathered_model, "_room")
    genuine = getattr(place, name)

    def scarce(*given: Any) -> Any:
        with mock.patch.object(torch, "empty", side_effect=torch.OutOfMemoryError("no memory")):
            return genuine(*given)

    with mock.patch.object(place, name, scarce if RANK == 1 else genuine):
        callbacks = evaluation(**attacks), ChannelEvaluation()
        found["one has no memory"] = tested(Sharded(), loader(), strategy(), *callbacks)
        found["channels"] = callbacks[1].report.not_evaluated
    return found


def training() -> Report:
    """Train twice two steps, with and without an evaluation after the first ones, and compare the whole state."""
    states, found = [], {}
    for callbacks in ([], [evaluation(after_fit=True), ChannelEvaluation(ratios=[0.5], after_fit=True)]):
        state, project = State(), Sharded()
        # Lightning does not unwrap a model after a fit with FSDPStrategy, and cannot fit it again
        for _ in range(1 if SHARDS == "flat" else 2):
            run = trainer(state, *callbacks, steps=2, default_root_dir=FOLDER, **strategy())
            run.fit(project, images(dtype=torch.float64))
            found = decisions(callbacks[0]) if callbacks and not found else found
        states.append(state.states)
    return {
        "same": same(*states),
        "steps": len(states[0]),
        "not evaluated": found["not evaluated"],
        "n": len(found["bim"]),
    }


FOLDER = ""


def compiled() -> Report:
    """Gather compiled models, after a test that starts the processes."""
    tested(Sharded(), loader(), strategy(), evaluation(attacks="gaussian"))
    return every_way(compiled=True)


def main(folder: str, devices: int, shards: str, *names: str) -> None:
    """Run scenarios, and write their reports.

    Args:
        folder: folder for the reports.
        devices: number of processes.
        shards: how models are sharded: ``fully_shard``, or ``flat`` for FullyShardedDataParallel.
        names: names of scenarios.
    """
    global WORLD, FOLDER, SHARDS
    torch.set_num_threads(1)
    WORLD, FOLDER, SHARDS = devices, folder, shards
    report = {name: globals()[name]() for name in names}
    Path(folder, f"rank{RANK}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    leave_group()
