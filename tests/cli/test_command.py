"""The command line, in process: the files a run writes, and the mistakes refused before training."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_normgeo import NORMS, ResNetClassifier, __version__, read_record
from lightning_normgeo.__main__ import main as console
from lightning_normgeo.cli import NormgeoCLI, main, run
from lightning_normgeo.errors import MeasurementWarning
from support.wandb_log import WandbRun, read_finished

TINY = """
trainer:
  max_epochs: 1
  accelerator: cpu
  limit_train_batches: 3
  limit_val_batches: 1
  limit_test_batches: 2
  limit_predict_batches: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_normgeo.OrthogonalityMonitor
    - class_path: lightning_normgeo.NormGrowthMonitor
    - class_path: lightning_normgeo.AffineConvergenceMonitor
    - class_path: lightning_normgeo.RobustnessEvaluation
      init_args: {max_samples: 16, steps: 2, num_images: 1}
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {monitor: val/accuracy, mode: max}
model: {arch: resnet18, stem: imagenet}
data:
  class_path: lightning_normgeo.DigitsDataModule
  init_args: {batch_size: 8}
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.05, weight_decay: 0.001}
"""
pytestmark = [
    # Lightning's LightningCLI calls what jsonargparse 4.49 renamed
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # Lightning's ModelCheckpoint, for a checkpoint of another run
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]
OFF = ["--wandb", "disabled"]


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return str(tmp_path / "tiny.yaml")


class Finished:
    """A finished ``fit``: the command line, what it printed, and the run's folder."""

    def __init__(self, cli: NormgeoCLI, printed: str) -> None:
        self.cli, self.printed = cli, printed
        self.folder = Path(cli.trainer.loggers[0].log_dir).absolute()

    @property
    def checkpoint(self) -> str:
        (file,) = self.folder.glob("checkpoints/epoch*.ckpt")
        return str(file)


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Finished:
    """Run ``normgeo fit`` once, with W&B offline, for all tests that inspect its results."""
    import wandb

    (workplace / "tiny.yaml").write_text(TINY)
    with redirect_stdout(StringIO()) as printed:
        cli = run(["fit", "--config", "tiny.yaml"])
    done = Finished(cli, printed.getvalue())
    wandb.finish()
    wandb.teardown()
    return done


def test_run_folder_holds_everything(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    results = {"robustness.json", "robustness.npz", "report.html", "images"}
    assert names == {"record.jsonl", "config.yaml", "checkpoints", *results}
    record = read_record(finished.folder)
    assert record.complete
    assert [step for step, _ in record.metrics["norm_growth/increment"]] == [0, 1, 2]
    results = json.loads((finished.folder / "robustness.json").read_text())
    assert results == record.results["robustness"]
    assert [(row["attack"], row["n"]) for row in results["results"]] == [("clean", 16), ("gaussian", 16), ("bim", 16)]
    assert results["settings"]["threat"]["steps"] == 2


def test_saved_configuration_is_complete_and_runs_again(finished: Finished) -> None:
    saved = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert saved["seed_everything"] == 0
    assert saved["model"]["label_smoothing"] == 0.0  # also skipped steps
    assert saved["optimizer"]["init_args"]["lr"] == 0.05
    assert saved == read_record(finished.folder).settings["config"]
    again = run(["fit", "--config", str(finished.folder / "config.yaml"), *OFF])
    first, second = (read_record(folder).metrics for folder in (finished.folder, again.trainer.loggers[0].log_dir))
    assert first["norm_growth/increment"] == second["norm_growth/increment"]  # bit for bit


def test_configuration_is_in_wandb(finished: Finished, workplace: Path) -> None:
    logged: WandbRun = read_finished(workplace)
    assert logged.config["config"]["model"]["arch"] == "resnet18"
    assert logged.config["config"]["optimizer"]["init_args"]["weight_decay"] == 0.001
    assert logged.points("norm_growth/increment") == read_record(finished.folder).metrics["norm_growth/increment"]


def test_wandb_draws_at_most_thirty_charts_under_the_name_of_the_run(finished: Finished, workplace: Path) -> None:
    logged: WandbRun = read_finished(workplace)
    scalars = {key for row in logged.history for key, value in row.items() if isinstance(value, int | float)}
    scalars = {key for key in scalars if not key.startswith("_")}
    assert {"norm_growth/increment", "robustness/bim/accuracy", "train/loss"} <= scalars
    assert len(scalars - logged.hidden) <= 30
    (logger,) = [logger for logger in finished.cli.trainer.loggers if type(logger).__name__ == "WandbLogger"]
    assert logger._name == finished.folder.name  # type: ignore[attr-defined]


def test_settings_reach_model_data_and_optimizer(finished: Finished) -> None:
    assert finished.cli.model.hparams["num_classes"] == finished.cli.datamodule.num_classes == 10
    (group,) = finished.cli.trainer.optimizers[0].param_groups
    assert (type(finished.cli.trainer.optimizers[0]), group["weight_decay"]) == (torch.optim.SGD, 0.001)


def test_summary_is_printed_with_the_way_to_the_report(finished: Finished) -> None:
    lines = finished.printed.splitlines()
    assert any("Δ‖W‖² of a step, measured" in line for line in lines)
    assert any(line.split()[:1] == ["gaussian"] for line in lines)
    (report,) = [line.removeprefix("report: ") for line in lines if line.startswith("report: ")]
    assert Path(report) == finished.folder / "report.html"
    (sync,) = [line.removeprefix("W&B:    wandb sync ") for line in lines if line.startswith("W&B:")]
    assert list((finished.folder.parents[2] / sync).glob("run-*.wandb"))


def test_same_command_again_makes_a_run_of_its_own(tiny: str, tmp_path: Path) -> None:
    for _ in range(2):
        main(["fit", "--config", tiny, *OFF, "--trainer.limit_train_batches", "1", "--test_after_fit", "false"])
    folders = list((tmp_path / "runs" / "normgeo").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert (folder / "config.yaml").is_file()
        assert not (folder / "robustness.json").exists()
    assert not (tmp_path / "runs" / "wandb").exists()  # --wandb disabled writes nothing


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_other_commands_on_the_checkpoint(
    finished: Finished, tiny: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = run([command, "--config", tiny, *OFF, "--ckpt_path", finished.checkpoint])
    folder = Path(cli.trainer.loggers[0].log_dir)
    saved = torch.load(finished.checkpoint, weights_only=False)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in cli.model.state_dict().items())
    if command == "test":
        first, second = (read_record(place).results["robustness"] for place in (finished.folder, folder))
        assert first["results"] == second["results"]  # the same weights were tested
        assert first["settings"]["threat"] == second["settings"]["threat"]
    if command in ("test", "validate"):
        assert (folder / "report.html").is_file()
    else:
        (batch,) = torch.load(folder / "predictions.pt", weights_only=True)
        images = next(iter(cli.datamodule.predict_dataloader())).images / 255
        torch.testing.assert_close(batch, cli.model.eval()(images).softmax(1))
        assert f"predictions: {folder.absolute() / 'predictions.pt'}" in capsys.readouterr().out
    if command == "validate":
        assert read_record(folder).results["robustness"]["data"] == "validation"
        assert set(read_record(folder).metrics) >= {"val/loss", "val/accuracy"}


def test_random_weights_are_named(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(["predict", "--config", tiny, *OFF, "--trainer.fast_dev_run", "true"])
    assert "normgeo predict without --ckpt_path: the weights are random, not trained." in capsys.readouterr().err


def test_the_last_checkpoint_is_never_replaced_by_random_weights(
    finished: Finished, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    one = "{class_path: ModelCheckpoint, init_args: {monitor: val/accuracy, mode: max, dirpath: kept}}"
    last = ["test", "--config", tiny, *OFF, f"--trainer.callbacks=[{one}]", "--ckpt_path", "last", "--report", "false"]
    said = refused(last, capsys)
    assert "--ckpt_path last is a checkpoint of a training in the same process, and normgeo test has none." in said
    kept.mkdir()
    shutil.copy(finished.checkpoint, kept / "last.ckpt")
    tested = run(last).model.state_dict()
    saved = torch.load(finished.checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in tested.items())


def test_classes_in_a_file_of_the_current_folder_are_found(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = [place for place in sys.path if place not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", list(elsewhere))  # as for a console script, whose own folder is there
    (tmp_path / "beside.py").write_text(
        "import lightning_normgeo\nclass Own(lightning_normgeo.DigitsDataModule): ...\n"
    )
    console(["fit", "--config", tiny, *OFF, "--data", "beside.Own", "--trainer.fast_dev_run", "true"])
    assert sys.modules.pop("beside").__file__ == str(tmp_path / "beside.py")
    assert sys.path == [*elsewhere, str(tmp_path)]  # last, so that it hides nothing


@pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning")  # few steps: low accuracy
def test_resuming_goes_on_after_the_last_step(
    finished: Finished, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    cli = run(["fit", "--config", "tiny.yaml", *OFF, "--ckpt_path", finished.checkpoint, "--trainer.max_epochs", "2"])
    assert cli.trainer.global_step == 6
    assert "trained nothing" not in capsys.readouterr().err
    record = read_record(cli.trainer.loggers[0].log_dir)
    assert [step for step, _ in record.metrics["norm_growth/increment"]] == [3, 4, 5]


def test_resuming_from_another_folder_ends_well(
    finished: Finished, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(MeasurementWarning, match=r"checkpoint .*epoch.*ckpt is gone; the last weights are tested"):
        cli = run(["fit", "--config", tiny, *OFF, "--ckpt_path", finished.checkpoint])  # all its epochs are done
    assert (Path(cli.trainer.loggers[0].log_dir) / "report.html").is_file()
    said = " ".join(capsys.readouterr().err.split())
    expected = "normgeo fit trained nothing: it is at epoch 1, step 3, where trainer.max_epochs: 1 ends. Raise it to"
    assert expected in said


def test_settings_given_with_a_checkpoint_are_not_ignored(finished: Finished, tiny: str) -> None:
    given = ["--model.label_smoothing", "0.25"]
    cli = run(["validate", "--config", tiny, *OFF, *given, "--ckpt_path", finished.checkpoint])
    assert cli.model.hparams["label_smoothing"] == 0.25


def test_report_can_be_left_out(finished: Finished, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run(["test", "--config", tiny, *OFF, "--ckpt_path", finished.checkpoint, "--report", "false"])
    assert not (Path(cli.trainer.loggers[0].log_dir) / "report.html").exists()
    assert "report:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--version"], __version__),
        (["--help"], "predict"),
        (["fit", "--help"], "--test_after_fit"),
        (["fit", "--help"], "'wn+mbn'"),
        (["fit", "--trainer.callbacks.help", "lightning_normgeo.NormGrowthMonitor"], "every_n_steps"),
        (["fit", "--data.help", "lightning_normgeo.DigitsDataModule"], "split_seed"),
    ],
    ids=" ".join,
)
def test_help(args: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "variable", "mode"),
    [
        ([], None, "offline"),
        ([], "disabled", "disabled"),
        (["--wandb", "disabled"], "online", "disabled"),
        (["--wandb", "online"], "offline", "online"),
    ],
    ids=["default", "environment", "flag first", "flag online"],
)
def test_wandb_mode(
    flag: list[str], variable: str | None, mode: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.delenv("WANDB_MODE")
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    run(["fit", "--config", tiny, *flag, "--trainer.fast_dev_run", "1"])  # nothing is logged, so nothing is sent
    assert os.environ["WANDB_MODE"] == mode
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "runs" / "wandb-data")


def test_wandb_that_cannot_start_does_not_stop_the_run(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(*args: object, **kwargs: object) -> None:
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(MeasurementWarning, match=r"W&B could not start \(no API key.*goes on without.*--wandb offline"):
        cli = run(["fit", "--config", tiny, "--trainer.limit_train_batches", "1", "--test_after_fit", "false"])
    (logger,) = cli.trainer.loggers
    assert read_record(logger.log_dir).complete
    assert "norm_growth/increment" in read_record(logger.log_dir).metrics


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every training or test step fail."""
    steps: list[str] = []
    for name in ("training_step", "test_step"):
        monkeypatch.setattr(ResNetClassifier, name, lambda *_, name=name: steps.append(name))
    yield
    assert steps == []


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that has to end with status 2, and return its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert "Traceback" not in said
    return " ".join(said.split())


LAST = "--trainer.callbacks.init_args"
MONITOR = ["--trainer.callbacks", "lightning_normgeo.NormGrowthMonitor"]
ATTACK = ["--trainer.callbacks", "lightning_normgeo.RobustnessEvaluation"]
BAD = {
    "glob": ([*MONITOR, f"{LAST}.layers", "[layer9*]"], ["layers=['layer9*']", "matches none of", "Nearest: 'model."]),
    "unknown norm": (["--model.norm", "gnn"], ["norm='gnn' is unknown", "did you mean 'gn'", *map(repr, NORMS)]),
    "groups": (["--model.norm", "gn", "--model.groups", "48"], ["bn1: groups=48 does not divide 64", "such as 32"]),
    "every 0 steps": ([*MONITOR, f"{LAST}.every_n_steps", "0"], ["every_n_steps=0", "at least 1", "Leave it out"]),
    "negative eps": ([*ATTACK, f"{LAST}.eps", "-0.1"], ["eps=-0.1", "at least 0", "8/255"]),
    "large eps": ([*ATTACK, f"{LAST}.eps", "8"], ["eps=8", "pixel range", "8/255 = 0.0314"]),
    "unknown attack": ([*ATTACK, f"{LAST}.attacks", "[bin]"], ["attacks=['bin']", "did you mean 'bim'"]),
    "unknown preset": ([*ATTACK, f"{LAST}.preset", "pixel-8"], ["preset='pixel-8'", "'pixel-8-255'"]),
    "unknown option": (["--model.depth", "3"], ["model.depth"]),
    "unknown init arg": ([*MONITOR, f"{LAST}.every_n_step", "3"], ["every_n_step"]),
    "wrong type": (["--trainer.max_epochs", "many"], ["max_epochs", "many"]),
    "unknown arch": (["--model.arch", "resnet19"], ["arch='resnet19'", "'resnet18'"]),
    "batch size": (["--data.batch_size", "0"], ["batch_size=0", "at least 1"]),
    "wandb mode": (["--wandb", "sometimes"], ["wandb", "sometimes", "offline"]),
    "other classes": (["--model.num_classes", "3"], ["num_classes"]),
}  # fmt: skip


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("case", BAD)
def test_bad_settings_end_in_one_clear_line(case: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, words = BAD[case]
    said = refused(["fit", "--config", tiny, "--wandb", "disabled", *args], capsys)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.usefixtures("no_step")
def test_unwritable_results_folder(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    logger = ["--trainer.logger", "lightning_normgeo.RecordLogger", "--trainer.logger.save_dir", "file/runs"]
    said = refused(["fit", "--config", tiny, *OFF, *logger], capsys)
    assert "RecordLogger(save_dir='file/runs'): cannot write there" in said
    assert "Choose another folder" in said


@pytest.mark.usefixtures("no_step")
def test_results_folder_that_is_a_file(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("")
    said = refused(["fit", "--config", tiny, *OFF], capsys)
    assert "'runs'" in said
    assert "cannot write there" in said


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("option", "saved", "wanted"),
    [
        (["--model.arch", "resnet34"], "arch='resnet18'", "arch='resnet34'"),
        (["--model.stem", "cifar"], "stem='imagenet'", "stem='cifar'"),
    ],
    ids=["arch", "stem"],
)
def test_checkpoint_of_another_architecture(
    finished: Finished, tiny: str, command: str, option: list[str], saved: str, wanted: str, capsys: Any
) -> None:
    before = Path(finished.checkpoint).read_bytes()
    said = refused([command, "--config", tiny, *OFF, *option, "--ckpt_path", finished.checkpoint], capsys)
    assert f"The checkpoint was trained with {saved}" in said
    assert wanted in said
    assert Path(finished.checkpoint).read_bytes() == before


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("damage", ["empty class", "unreadable image", "no folder"])
def test_damaged_image_folder(damage: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for k in range(4):
                pixels = np.full((8, 8, 3), 100 * i + k, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{k}.png")
    if damage == "empty class":
        (tmp_path / "images/train/bird").mkdir()
    elif damage == "unreadable image":
        (tmp_path / "images/train/dog/2.png").write_text("no pixels")
    else:
        shutil.rmtree(tmp_path / "images")
    data = ["--data", "lightning_normgeo.ImageFolderDataModule", "--data.data_dir", str(tmp_path / "images")]
    said = refused(["fit", "--config", tiny, *OFF, *data], capsys)
    words = {"empty class": "bird", "unreadable image": "dog/2.png", "no folder": "images/train does not exist"}
    assert words[damage] in said
