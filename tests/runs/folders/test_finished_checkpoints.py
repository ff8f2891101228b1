"""Checkpoints of finished runs without optimizer states: everything else stays, and nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_normgeo import NormGrowthMonitor
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.runs.folders.finished_checkpoints import drop_optimizer_states
from lightning_normgeo.runs.folders.resume import NewestEpoch, RandomState
from lightning_normgeo.runs.folders.run_folder import RunFolder
from support.full_disk import no_file_beyond
from support.projects import Project, images, trainer


class WithMomentum(Project):
    """The project with momentum and a schedule, whose states are in its checkpoints."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run with the best checkpoint, a link to it, and the newest one."""
    folder = tmp_path / "study" / "run"
    best = ModelCheckpoint(folder / "checkpoints", monitor="loss", save_last="link")
    callbacks = RandomState(restore=False), NormGrowthMonitor(1, cumulative=True), best, NewestEpoch(folder)
    trainer(*callbacks, steps=16, enable_checkpointing=True).fit(WithMomentum(), images())
    assert len(files(folder)) == 2
    assert (folder / "checkpoints" / "last.ckpt").is_symlink()
    return folder


def files(folder: Path) -> list[Path]:
    return [path for path in sorted((folder / "checkpoints").glob("*.ckpt")) if not path.is_symlink()]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal, tensors bit by bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_everything_else_stays(folder: Path) -> None:
    before = {path: (load(path), path.stat()) for path in files(folder)}
    freed = drop_optimizer_states(folder)
    assert freed == sum(stat.st_size - path.stat().st_size for path, (_, stat) in before.items())
    for path, (content, stat) in before.items():
        after = load(path)
        dropped = {key: content.pop(key) for key in content.keys() - after.keys()}
        assert dropped.keys() == {"optimizer_states", "lr_schedulers"}
        assert len(dropped["optimizer_states"][0]["state"]) > 0
        assert same(content, after)
        assert path.stat().st_mtime_ns == stat.st_mtime_ns
        momentum = sum(state["momentum_buffer"].nbytes for state in dropped["optimizer_states"][0]["state"].values())
        assert stat.st_size - path.stat().st_size > momentum
    assert same(load(folder / "checkpoints" / "last.ckpt"), load(files(folder)[0]))
    assert not list(folder.glob("checkpoints/*.part"))


def test_a_file_whose_states_have_no_tensors_is_left_alone(tmp_path: Path) -> None:
    """As under plain SGD: there is nothing to free."""
    path = tmp_path / "checkpoints" / "epoch=1.ckpt"
    path.parent.mkdir()
    torch.save({"state_dict": {"w": torch.ones(3)}, "optimizer_states": [{"state": {}}], "lr_schedulers": []}, path)
    before = path.read_bytes()
    assert drop_optimizer_states(tmp_path) == 0
    assert path.read_bytes() == before


def test_once_is_enough(folder: Path) -> None:
    assert RunFolder(folder).checkpoint is not None
    assert drop_optimizer_states(folder) > 0
    before = [path.read_bytes() for path in files(folder)]
    assert drop_optimizer_states(folder) == 0
    assert [path.read_bytes() for path in files(folder)] == before
    assert RunFolder(folder).checkpoint is None, "nothing to resume from"


def test_a_full_disk_leaves_the_checkpoints_as_they_were(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with no_file_beyond(2000), pytest.warns(MeasurementWarning, match="keeps its optimizer states"):
        assert drop_optimizer_states(folder) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


class Own:
    """A value of a user's own class, which is not loaded from a file."""


def test_checkpoints_that_are_not_ours_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "sharded.ckpt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "sharded.ckpt" / "meta.pt").write_bytes(b"optimizer_states")
    (tmp_path / "checkpoints" / "torn.ckpt").write_bytes(b"PK\x03\x04 torn")
    torch.save({"optimizer_states": [], "own": Own()}, tmp_path / "checkpoints" / "own.ckpt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.warns(MeasurementWarning, match=r"own\.ckpt keeps its optimizer states: it could not be rewritten"):
        assert drop_optimizer_states(tmp_path) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert drop_optimizer_states(tmp_path / "no such folder") == 0
