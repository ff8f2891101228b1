"""``normgeo fit --run``: one process at a time in a chosen folder, and resuming from its last checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

from lightning_normgeo import ResNetClassifier, read_record
from lightning_normgeo.cli import run
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.runs.folders.resume import RandomState
from lightning_normgeo.runs.folders.run_folder import RunFolder
from lightning_normgeo.study.run_process import RunProcess
from lightning_normgeo.study.runner import NORMGEO
from lightning_normgeo.study.study_index import IndexEntry
from support.wandb_log import read_finished

pytestmark = [
    # Lightning's LightningCLI calls what jsonargparse 4.49 renamed
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # Lightning warns at every resumption
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

TINY = """
trainer:
  max_epochs: 2
  accelerator: cpu
  limit_train_batches: 2
  limit_val_batches: 2
  limit_test_batches: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - class_path: lightning_normgeo.RecordLogger
  callbacks:
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {monitor: val/accuracy, mode: max}
model: {arch: resnet18, stem: imagenet}
data:
  class_path: lightning_normgeo.DigitsDataModule
  init_args: {batch_size: 4}
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.01}
report: false
"""
WITH_WANDB = """
trainer:
  logger:
    - class_path: lightning_normgeo.RecordLogger
    - class_path: pytorch_lightning.loggers.WandbLogger
      init_args: {save_dir: runs}
"""
CSV = "pytorch_lightning.loggers.CSVLogger\n      init_args: {save_dir: runs}"
RUN = "runs/study/one"


class StoppedError(RuntimeError):
    """Stands for any error that ends a training."""


@pytest.fixture
def fit(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Run ``normgeo fit`` in one folder, with further options."""
    (tmp_path / "tiny.yaml").write_text(TINY)

    def fit(*args: str, place: str = RUN) -> Any:
        return run(["fit", "--config", "tiny.yaml", "--run", place, *args])

    yield fit
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # a hundred megabytes


@pytest.fixture
def wandb_too() -> list[str]:
    """Return the options that add W&B."""
    Path("wandb.yaml").write_text(WITH_WANDB)
    return ["--config", "wandb.yaml"]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the training fail with an error at a step; -1 for never."""
    at = [-1]
    original = ResNetClassifier.training_step

    def training_step(self: ResNetClassifier, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == at[0]:
            raise StoppedError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ResNetClassifier, "training_step", training_step)
    return lambda step: at.__setitem__(0, step)


def steps(folder: str = RUN) -> list[int]:
    return [step for step, _ in read_record(folder).metrics["train/loss"]]


def test_everything_is_in_the_folder_and_a_finished_one_is_left_alone(fit: Any) -> None:
    cli = fit()
    folder = RunFolder(RUN)
    assert folder.finished
    assert not folder.in_use
    assert {path.name for path in folder.path.iterdir()} == {
        "record.jsonl", "config.yaml", "checkpoints", "run.json", ".lock",
    }  # fmt: skip
    written = json.loads((folder.path / "run.json").read_text())
    assert written["status"] == "finished"
    assert 0 < written["seconds"] < 60
    assert read_record(RUN).complete
    assert cli.trainer.default_root_dir == RUN
    before = (folder.path / "record.jsonl").read_bytes()
    with pytest.raises(
        ConfigurationError, match=r"--run runs/study/one has finished. Choose another folder, or remove"
    ):
        fit()
    assert (folder.path / "record.jsonl").read_bytes() == before
    assert not folder.in_use


def test_goes_on_after_its_last_epoch_again_and_again(fit: Any, stop_at: Any) -> None:
    for step in (3, 5):
        stop_at(step)
        with pytest.raises(StoppedError):
            fit("--trainer.max_epochs", "4")
        assert not RunFolder(RUN).finished
        assert not RunFolder(RUN).in_use  # although the traceback keeps references to all objects
    stop_at(-1)
    cli = fit("--trainer.max_epochs", "4")
    assert cli.trainer.global_step == 8
    lines = [json.loads(line) for line in (Path(RUN) / "record.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if "train/loss" in line.get("values", {})]
    assert logged == [
        0,
        1,
        2,
        2,
        3,
        4,
        4,
        5,
        6,
        7,
    ]  # the first epoch appears once, though the checkpoint is the second newest
    assert steps() == list(range(8))
    saved = yaml.safe_load((Path(RUN) / "config.yaml").read_text())
    assert saved["ckpt_path"] is None  # so that the configuration starts the run from its beginning
    assert [path.name for path in Path(RUN, "checkpoints").glob("resume*")] == ["resume-epoch=3-step=8.ckpt"]


def test_its_own_checkpoint_is_newer_than_the_one_it_was_told_to_start_from(fit: Any, stop_at: Any) -> None:
    fit(place="runs/study/before")
    start = ["--ckpt_path", "runs/study/before/checkpoints/resume-epoch=1-step=4.ckpt", "--trainer.max_epochs", "4"]
    stop_at(7)
    with pytest.warns(UserWarning, match="The dirpath has changed"), pytest.raises(StoppedError):
        fit(*start)
    assert steps() == [4, 5, 6]
    stop_at(-1)
    fit(*start)
    assert steps() == [4, 5, 6, 7]
    environments = (Path(RUN) / "record.jsonl").read_text().count('"kind": "environment"')
    assert environments == 2


def test_random_numbers_are_those_of_the_run_itself_only(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds that start from one checkpoint are three runs."""
    fit(place="runs/study/before")
    batches: list[list[int]] = []
    original = ResNetClassifier.training_step

    def training_step(self: ResNetClassifier, batch: Any, batch_idx: int) -> Any:
        batches.append(batch[1].tolist())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ResNetClassifier, "training_step", training_step)
    for seed in ("1", "2"):
        with pytest.warns(UserWarning, match="The dirpath has changed"):
            fit(
                *(
                    "--ckpt_path",
                    "runs/study/before/checkpoints/resume-epoch=1-step=4.ckpt",
                    "--trainer.max_epochs",
                    "3",
                ),
                *("--seed_everything", seed),
                place=f"runs/study/{seed}",
            )
    assert batches[:2] != batches[2:]


def test_tests_do_not_touch_random_numbers() -> None:
    trainer, module = (
        type("Trainer", (), {"state": type("State", (), {"fn": "test"})})(),
        ResNetClassifier(arch="resnet18"),
    )
    checkpoint: dict[str, Any] = {}
    state = RandomState(restore=True)
    state.on_save_checkpoint(trainer, module, checkpoint)
    torch.save(checkpoint, "state.ckpt")
    loaded = torch.load("state.ckpt", weights_only=True)  # as Lightning may
    first = torch.rand(3)
    state.on_load_checkpoint(trainer, module, loaded)
    assert not torch.equal(torch.rand(3), first)
    trainer.state.fn = "fit"
    state.on_load_checkpoint(trainer, module, loaded)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("damage", ["torn", "weights only", "none left"])
def test_a_checkpoint_that_cannot_be_gone_on_from_is_passed_over(damage: str, fit: Any, stop_at: Any) -> None:
    stop_at(5)
    with pytest.raises(StoppedError):
        fit("--trainer.max_epochs", "3")
    (last,) = (Path(RUN) / "checkpoints").glob("resume*.ckpt")
    (best,) = last.parent.glob("epoch*.ckpt")
    whole = last.read_bytes()
    assert RunFolder(RUN).checkpoint == str(last)
    if damage == "torn":
        last.write_bytes(whole[: len(whole) // 2])
    elif damage == "weights only":
        torch.save({"state_dict": {}}, last)
    else:
        shutil.rmtree(last.parent)
    assert RunFolder(RUN).checkpoint == (None if damage == "none left" else str(best))
    stop_at(-1)
    fit("--trainer.max_epochs", "3")
    assert steps() == list(range(6))


def test_goes_on_from_the_newest_epoch_where_an_older_one_is_the_best(fit: Any, stop_at: Any) -> None:
    first_is_best = ["--trainer.callbacks.init_args.monitor", "epoch", "--trainer.callbacks.init_args.mode", "min"]
    stop_at(5)
    with pytest.raises(StoppedError):
        fit("--trainer.max_epochs", "3", *first_is_best, "--trainer.callbacks.init_args.save_last", "true")
    there = {path.name for path in (Path(RUN) / "checkpoints").iterdir()}
    assert there == {"epoch=0-step=2.ckpt", "last.ckpt", "resume-epoch=1-step=4.ckpt"}
    assert RunFolder(RUN).checkpoint == f"{RUN}/checkpoints/resume-epoch=1-step=4.ckpt"
    stop_at(-1)
    cli = fit("--trainer.max_epochs", "3", *first_is_best)
    assert steps() == list(range(6))
    assert Path(cli.trainer.checkpoint_callback.best_model_path).name == "epoch=0-step=2.ckpt", "the user's own"


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # Lightning, for a checkpoint of another run
def test_a_configuration_of_a_run_does_not_name_its_folder(fit: Any) -> None:
    fit("--trainer.max_epochs", "1")
    saved = f"{RUN}/config.yaml"
    checkpoint = str(RunFolder(RUN).checkpoint)
    tested = run(["test", "--config", saved, "--ckpt_path", checkpoint])
    assert read_record(tested.trainer.loggers[0].log_dir).folder.parent == Path("runs/study")
    assert Path(tested.trainer.loggers[0].log_dir) != Path(RUN)


def test_a_run_that_writes_nothing_is_refused(fit: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"--run runs/study/one with trainer.fast_dev_run, which writes nothing"
    ):
        fit("--trainer.fast_dev_run", "true")


def test_checkpoints_of_many_files() -> None:
    folder = RunFolder(RUN)
    place = folder.path / "checkpoints" / "last.ckpt"
    place.mkdir(parents=True)
    assert folder.checkpoint is None
    (place / "meta.pt").touch()
    assert folder.checkpoint == str(place)


@pytest.mark.parametrize(
    ("given", "saved"), [("null", True), ("false", False)], ids=["left out", "switched off by the user"]
)
def test_the_last_checkpoint_is_kept_unless_somebody_said_no(given: str, saved: bool, fit: Any) -> None:
    fit("--trainer.max_epochs", "1", "--trainer.callbacks.init_args.save_last", given)
    assert any((Path(RUN) / "checkpoints").glob("resume*.ckpt")) is saved


def test_one_process_at_a_time(fit: Any) -> None:
    Path(RUN).mkdir(parents=True)
    with FileLock(Path(RUN) / ".lock"):
        assert RunFolder(RUN).in_use
        with pytest.raises(ConfigurationError, match=r"--run runs/study/one is being written by another process. Wait"):
            fit()
    assert not (Path(RUN) / "record.jsonl").exists()


def test_a_look_at_the_lock_does_not_keep_a_run_from_beginning() -> None:
    folder = RunFolder(RUN)
    folder.path.mkdir(parents=True)
    script = (
        "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); print('has it');"
        "sys.stdout.flush(); time.sleep(0.3)"
    )
    command = [sys.executable, "-S", "-c", script, str(folder.path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as looking:
        assert looking.stdout is not None
        looking.stdout.readline()
        folder.claim()
    folder.release()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["fit", "--run", "one"], "--run one: give a folder in a folder, such as runs/my-study/bn-seed0"),
        (["fit", "--run", ""], "--run .*: give a folder in a folder"),
        (["fit", "--run", "runs/.."], r"--run runs/\.\.: give a folder in a folder"),
        (["fit", "--run", RUN, "--trainer.logger", "false"], "needs a RecordLogger as the first of trainer.logger"),
        (["fit", "--run", RUN, "--config", "csv.yaml"], "needs a RecordLogger as the first of trainer.logger"),
        (["test", "--run", RUN], "--run is for fit. Leave it out: test gets a folder of its own"),
        (["fit", "--run", "tiny.yaml/a"], r"--run tiny.yaml/a: cannot write there \(Not a directory\)"),
    ],
)
def test_refused(args: list[str], reason: str, fit: Any) -> None:
    command, *others = args
    Path("csv.yaml").write_text(WITH_WANDB.replace("lightning_normgeo.RecordLogger", CSV))
    with pytest.raises(ConfigurationError, match=reason):
        run([command, "--config", "tiny.yaml", *others])
    assert not RunFolder(RUN).in_use


def test_wandb_goes_on_in_the_same_run(fit: Any, wandb_too: list[str], stop_at: Any, tmp_path: Path) -> None:
    import wandb

    stop_at(3)
    with pytest.raises(StoppedError):
        fit(*wandb_too)
    wandb.finish()
    first = RunFolder(RUN).wandb_id
    assert first is not None
    (before,) = tmp_path.rglob("run-*.wandb")
    before.rename("before")
    stop_at(-1)
    fit(*wandb_too)
    wandb.finish()
    wandb.teardown()
    assert RunFolder(RUN).wandb_id == first
    (after,) = tmp_path.rglob("run-*.wandb")
    assert before.name == after.name == f"run-{first}.wandb"
    assert [step for step, _ in read_finished(tmp_path).points("train/loss")] == [2, 3]


def test_a_wandb_that_cannot_start_does_not_stop_the_run(
    fit: Any, wandb_too: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", "nowhere")  # no key, so no server is asked
    with pytest.warns(MeasurementWarning, match="W&B could not start"):
        fit(*wandb_too, "--wandb", "online", "--trainer.max_epochs", "1")
    assert RunFolder(RUN).finished


# Real processes


def test_two_devices_share_a_run_of_which_nothing_is_left_when_it_is_killed(fit: Any) -> None:
    arguments = ["fit", "--config=tiny.yaml", f"--run={RUN}", "--trainer.max_epochs=1000"]
    several = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    attempt = RunProcess(IndexEntry("one", {}), RunFolder(RUN), slot=0)
    attempt.start([*NORMGEO, *arguments, *several], {"OMP_NUM_THREADS": "1"})
    said = Path(RUN, "output.log")
    try:
        deadline = time.monotonic() + 180
        while attempt.folder.checkpoint is None:
            assert not attempt.ended, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert attempt.folder.in_use
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if group_of(path) == attempt.pid]
        assert len(pids) >= 2
    finally:
        attempt.kill()
    assert not attempt.folder.in_use
    assert not attempt.folder.finished
    assert attempt.error == "ended by SIGKILL, as when memory runs out"
    deadline = time.monotonic() + 20
    while any(group_of(Path(f"/proc/{pid}")) == attempt.pid for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "MEMBER: 2/2" in said.read_text()
    assert "args parameter is intended to run from within Python" not in said.read_text()
    fit()
    assert RunFolder(RUN).finished
    assert steps() == list(range(len(steps())))


def group_of(process: Path) -> int | None:
    """Return the process group of a process that has not ended."""
    try:
        state, _, group, *_ = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(group)
