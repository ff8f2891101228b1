"""Script of tests/callbacks/robustness/test_processes.py: a test loop for each order and sharding of samples."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from lightning_normgeo import RobustnessEvaluation  # noqa: E402
from support.processes import leave_group  # noqa: E402
from support.projects import ConvNet, Project, images, trainer  # noqa: E402

COUNT = 31
RANK, WORLD = int(os.environ.get("LOCAL_RANK", "0")), 1

ATTACKS = [
    *("gaussian", "bim", "pgd"),
    {"name": "apgd", "steps": 3, "loss": "dlr", "restarts": 2},
    {"name": "square", "queries": 4},
    {"name": "corruptions", "kinds": ["noise", "elastic"], "severities": 3},
]


def data() -> TensorDataset:
    """Return images, two of which are equal, with the same label."""
    x, y = images(COUNT, dtype=torch.float64).dataset.tensors
    x[4], y[4] = x[3], y[3]
    return TensorDataset(x, y)


def sensitive() -> ConvNet:
    """Return a network with mixed predictions that are easily changed."""
    net, x = ConvNet().double().eval(), data().tensors[0]
    with torch.no_grad():
        torch.nn.init.normal_(net[-1].weight, std=30.0)
        net[-1].bias.sub_(net(x).mean(0))
    return net


class OwnBatches(Sampler[list[int]]):
    """A batch sampler that distributes batches over processes itself, in an order of its own."""

    def __iter__(self) -> Iterator[list[int]]:
        mine = list(range(COUNT))[::-1][RANK::WORLD]
        yield from (mine[k : k + 3] for k in range(0, len(mine), 3))

    def __len__(self) -> int:
        return -(-len(range(COUNT)[RANK::WORLD]) // 3)


class Repeating(Sampler[int]):
    """A sampler that yields some samples twice, to any process."""

    def __iter__(self) -> Iterator[int]:
        yield from [*range(COUNT), *range(9)][RANK::WORLD]

    def __len__(self) -> int:
        return len(range(COUNT + 9)[RANK::WORLD])


class Stream(IterableDataset[Any]):
    def __init__(self, sharded: bool) -> None:
        self.sharded = sharded

    def __iter__(self) -> Iterator[Any]:
        whole = [(x, y) for k, (x, y) in enumerate(data()) if k != 4]  # two equal samples cannot be told apart here
        yield from whole[RANK::WORLD] if self.sharded else whole


def ways() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return loaders, and settings of the Trainer."""
    found: Dataset[Any] = data()
    seeded = torch.Generator().manual_seed(3)
    own: dict[str, Any] = {"use_distributed_sampler": False}
    dealt = DistributedSampler(found, num_replicas=WORLD, rank=RANK, shuffle=True)
    replaced = RandomSampler(found, replacement=True, num_samples=2 * COUNT, generator=seeded)
    subset = SubsetRandomSampler([k for k in range(COUNT) if k % 3])
    return {
        "distributed sampler": (DataLoader(found, 4, sampler=dealt if WORLD > 1 else None), own),
        "own batch sampler": (DataLoader(found, batch_sampler=OwnBatches()), own),
        "subset in random order": (DataLoader(found, 4, sampler=subset), own),
        "with replacement": (DataLoader(found, 4, sampler=replaced), own),
        "repeating sampler": (DataLoader(found, 4, sampler=Repeating()), own),
        "stream that shards itself": (DataLoader(Stream(True), 4), {}),
        "stream that does not": (DataLoader(Stream(False), 4), {}),
        "dictionary of loaders": ({"a": DataLoader(found, 4), "b": DataLoader(found, 7)}, {}),
        "uneven ends": (DataLoader(found, 4), {}),
        "shuffled": (DataLoader(found, 4, shuffle=True), {}),
        "shuffled, not dealt": (DataLoader(found, 4, shuffle=True), own),
        "limited": (DataLoader(found, 4, shuffle=True), own),
    }


class Several(Project):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


def main(folder: str, devices: int) -> None:
    global RANK, WORLD
    torch.set_num_threads(1)
    WORLD = devices
    torch.manual_seed(0)
    project = Several(net=sensitive()).double()
    spread: dict[str, Any] = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    report: dict[str, Any] = {}
    rank = 0
    for way, (loaders, settings) in ways().items():
        limit = 12 if way == "limited" else None
        callback = RobustnessEvaluation(
            eps=0.02, attacks=ATTACKS, noise_std=0.1, num_images=0, max_samples=limit, batch_size=5
        )
        run = trainer(callback, default_root_dir=folder, **spread, **settings)
        run.test(project, loaders, verbose=False)
        rank = run.global_rank
        report[way] = {
            suffix: {
                attack: sorted(zip(*(getattr(found.decisions.of(attack), name).tolist() for name in KEPT), strict=True))
                for attack in found.decisions.attacks
            }
            for suffix, found in callback.reports.items()
        }
    report["without a batch"] = without_a_batch(folder, spread) if devices > 1 else []
    report["after fit"] = after_fit(folder, spread)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(report))


def without_a_batch(folder: str, spread: dict[str, Any]) -> list[str]:
    """Lightning skips the loop if a project allows processes without a batch: no process may wait for another."""
    project = Several()
    project.allow_zero_length_dataloader_with_multiple_devices = True
    callback = RobustnessEvaluation(steps=1)
    run = trainer(callback, default_root_dir=folder, use_distributed_sampler=False, **spread)
    mine = range(8 if RANK == 0 else 0)
    run.test(project, DataLoader(data(), 4, sampler=list(mine)), verbose=False)
    return list(callback.not_evaluated.values())


class Fragile(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        if RANK == 1:
            raise OSError("the disk of one process")
        return super().__getitem__(index)


def after_fit(folder: str, spread: dict[str, Any]) -> list[str]:
    """Test data that raise on one process only."""

    class Own(Several):
        def test_dataloader(self) -> Any:
            return DataLoader(Fragile(*images(16).dataset.tensors), 4)

    callback = RobustnessEvaluation(steps=1, after_fit=True, num_images=0)
    trainer(callback, steps=1, default_root_dir=folder, **spread).fit(Own(), images(16))
    return list(callback.not_evaluated.values())


KEPT = ("sample", "label", "prediction")

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    leave_group()
