"""Interrupted and failed commands: their messages, exit status and files; and loggers that fail."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer

from lightning_normgeo import read_record, summarize
from lightning_normgeo.cli import main
from lightning_normgeo.cli.end_of_command import resume_command
from lightning_normgeo.cli.loggers import shield
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.runs.records.record import Record
from support.broken_logger import Broken

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    # an interrupted training may leave an extremely confident network
    pytest.mark.filterwarnings("ignore:The gradient is zero for:lightning_normgeo.errors.MeasurementWarning"),
]
TINY = """
trainer:
  max_epochs: 2
  accelerator: cpu
  limit_train_batches: 3
  limit_val_batches: 1
  limit_test_batches: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  num_sanity_val_steps: 0
model: {arch: resnet18, stem: imagenet}
data:
  class_path: lightning_normgeo.DigitsDataModule
  init_args: {batch_size: 4}
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.05}
"""
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stop(Callback):
    """Sends a signal to the own process at the end of a batch.

    Args:
        number: of the signal.
        batch: counted from 0 over all epochs.
    """

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.left = number, batch + 1

    def on_train_batch_end(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Record:
    """Run fit without an interruption; return its record."""
    (workplace / "tiny.yaml").write_text(TINY)
    main(["fit", "--config", "tiny.yaml", "--wandb", "disabled"])
    (run,) = (workplace / "runs" / "normgeo").iterdir()
    return read_record(run)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def stopped(number: int, batch: int, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Run fit, stop it, and return its exit status."""
    made: Any = Trainer.__init__

    @functools.wraps(made)  # its signature defines command line options
    def with_stop(self: Trainer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.callbacks.append(Stop(number, batch))  # type: ignore[attr-defined]

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the process that runs the tests may ignore the signal
    monkeypatch.setattr(Trainer, "__init__", with_stop)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "tiny.yaml", "--wandb", "disabled", *options])
    monkeypatch.setattr(Trainer, "__init__", made)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from then on Lightning ignores the signal
    return int(end.value.code or 0)


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_training_says_how_to_resume_and_resumes(
    number: int, whole: Record, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(number, 4, monkeypatch) == SIGNALS[signal.Signals(number)]
    said = capsys.readouterr().err.splitlines()
    (where,) = [Path(line.removeprefix("run:    ")) for line in said if line.startswith("run:")]
    (command,) = [line.removeprefix("resume: ") for line in said if line.startswith("resume:")]
    assert any(line.startswith("interrupted at step 5, in epoch 2 of 2") for line in said)
    assert where.parent == tiny / "runs" / "normgeo"
    words = shlex.split(command)
    run = ["--run", str(where.relative_to(tiny))]
    assert words == ["normgeo", "fit", "--config", "tiny.yaml", "--wandb", "disabled", *run]
    main(words[1:])
    resumed = read_record(where)
    assert resumed.complete
    assert resumed.metrics["norm_growth/increment"] == whole.metrics["norm_growth/increment"]  # bit for bit
    assert resumed.layers == whole.layers


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_before_the_first_checkpoint(
    number: int, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(number, 0, monkeypatch, "--run", "runs/mine/one") == SIGNALS[signal.Signals(number)]
    assert "There is no checkpoint yet: the same command begins anew." in capsys.readouterr().err
    assert read_record("runs/mine/one").metrics["norm_growth/increment"]


def test_resume_command_names_the_folder_once() -> None:
    given = ["fit", "--run", "runs/a/b", "--config", "my file.yaml", "--run=runs/a/b"]
    assert resume_command(given, Path("runs/a/b")) == "normgeo fit --config 'my file.yaml' --run runs/a/b"


@pytest.mark.parametrize("options", [[], ["--run", "runs/mine/one"]], ids=["", "run"])
@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_failed_commands_leave_nothing_behind(
    options: list[str], mode: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    arguments = ["--config", "tiny.yaml", "--wandb", mode, *options]
    arguments += ["--trainer.callbacks+=lightning_normgeo.OrthogonalityMonitor", "--trainer.callbacks.layers=nowhere"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments])
    assert end.value.code == 2
    of_the_tests = ".wandb_"  # the folder of W&B's own caches in these tests
    assert [path.name for path in tiny.iterdir() if not path.name.startswith(of_the_tests)] == ["tiny.yaml"]


def test_failed_command_leaves_what_others_have_written(tiny: Path) -> None:
    other = tiny / "runs" / "normgeo" / "other"
    other.mkdir(parents=True)
    (other / "record.jsonl").write_text("")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", "--wandb", "disabled", "--model.norm", "nope"])
    assert sorted(path.name for path in (tiny / "runs" / "normgeo").iterdir()) == ["other"]


@pytest.mark.filterwarnings("ignore:Broken failed 3 times in a row")
def test_a_logger_that_fails_does_not_stop_a_command(tiny: Path) -> None:
    Broken.calls = 0
    arguments = ["--trainer.logger+=support.broken_logger.Broken", "--trainer.logger.save_dir=csv"]
    with pytest.warns(MeasurementWarning, match=r"Broken failed \(service is gone\)\. The run goes on"):
        main(["fit", "--config", "tiny.yaml", "--wandb", "disabled", "--test_after_fit", "false", *arguments])
    (run,) = (tiny / "runs" / "normgeo").iterdir()
    assert len(read_record(run).metrics["train/loss"]) == 6
    assert Broken.calls == 3  # an unreachable service can take minutes for each call


def test_a_logger_that_recovers_is_kept() -> None:
    class Sometimes:
        def __init__(self) -> None:
            self.got: list[int] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            if step % 2:
                raise OSError("full")
            self.got.append(step)

    logger: Any = Sometimes()
    shield(logger)
    with pytest.warns(MeasurementWarning, match="full"):
        logger.log_metrics({}, step=1)
    with warnings.catch_warnings(action="ignore"):
        for step in range(2, 10):
            logger.log_metrics({}, step=step)
    assert logger.got == [2, 4, 6, 8]


def test_the_summary_says_what_does_not_apply(tiny: Path) -> None:
    options = ["--optimizer.momentum", "0.9", "--optimizer.weight_decay", "0.001", "--test_after_fit", "false"]
    main(["fit", "--config", "tiny.yaml", "--wandb", "disabled", *options])
    (run,) = (tiny / "runs" / "normgeo").iterdir()
    text = summarize(run)
    said = " ".join(text.split())
    assert "not applicable Eq 16: Δ‖W‖² = η²‖∇W‖² momentum 0.9, weight decay 0.001" in said
    assert "predicted by eq 16" not in text
    record = read_record(run)
    last = record.layers["orthogonality/max_abs_cos"][-1][1]
    (line,) = [line for line in text.splitlines() if line.strip().startswith("largest |cos")]
    assert line.split()[-1] == max(last, key=lambda layer: abs(last[layer]))
    assert text.splitlines()[-1] == f"record: {run.absolute()}"
