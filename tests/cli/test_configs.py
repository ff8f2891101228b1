"""Every configuration in the repository runs through its command line."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import (
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    RobustnessEvaluation,
    read_record,
)
from lightning_normgeo.__main__ import main
from lightning_normgeo.cli import NormgeoCLI, configs_folder, run
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.normalization import NORMS, find_norm
from lightning_normgeo.study import load_study, runner
from lightning_normgeo.study.validation import Checker
from support.in_process import InProcess
from support.isolation import REPOSITORY
from support.scripts import load_script
from support.tiny_config import TINY

pytestmark = [
    # Lightning's LightningCLI calls what jsonargparse 4.49 renamed
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # after two steps networks are extremely confident
    pytest.mark.filterwarnings("ignore:The gradient is zero for:lightning_normgeo.errors.MeasurementWarning"),
    pytest.mark.filterwarnings("ignore:bim does not raise the loss:lightning_normgeo.errors.MeasurementWarning"),
]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
FRAGMENTS = [path for path in CONFIGS if "callbacks+" in (yaml.safe_load(path.read_text()).get("trainer") or {})]
STUDIES = [path for path in CONFIGS if "grid" in yaml.safe_load(path.read_text())]
DATA = {"paper_resnet18": "cifar10", "paper_cifar10": "cifar10", "paper_cifar100": "cifar100"}
"""Data sets of the studies that train on CIFAR."""


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY / "configs"))


def test_the_configurations_are_found() -> None:
    found = set(map(named, CONFIGS))
    assert {"quickstart.yaml", "defaults.yaml", "callbacks.yaml", "cifar10/resnet101_bn.yaml"} <= found
    studies = {f"study/paper_{name}.yaml" for name in ("small", "resnet18", "cifar10", "cifar100")}
    assert studies == set(map(named, STUDIES))
    assert configs_folder().resolve() == REPOSITORY / "configs"


SHIPPED = [*CONFIGS, *sorted((REPOSITORY / "examples").rglob("*.*")), *sorted((REPOSITORY / "docs").rglob("*.ipynb"))]


def test_nothing_that_is_shipped_forces_an_accelerator() -> None:
    """Lightning's default takes a GPU if there is one; on machines with several, digits are trained on one."""
    texts = {path: path.read_text(encoding="utf-8") for path in SHIPPED if path.suffix in (".yaml", ".py", ".ipynb")}
    assert len(texts) > len(CONFIGS) + 5
    assert [str(path) for path, text in texts.items() if "accelerator" in text] == []
    for name in ("quickstart", "study/small"):
        assert yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())["trainer"]["devices"] == 1, name


RUNNABLE = [path for path in CONFIGS if path not in FRAGMENTS + STUDIES]
DECAYED = [path for path in RUNNABLE if path.parent.name == "norm" and path.stem.endswith("_wd")]
"""Those of the normalizations with weight decay; another test compares them with those without."""


@pytest.mark.usefixtures("fake_cifar10")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path in DECAYED[1:] else ()) for path in RUNNABLE],
    ids=named,
)
def test_configuration_runs(path: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    text = yaml.safe_load(path.read_text())
    data = [] if "data" in text else ["--data", "lightning_normgeo.DigitsDataModule"]
    norm = find_norm((text.get("model") or {}).get("norm", "bn"))
    stem = ["--model.stem", "cifar"] if norm.data == "in" else []
    command = ["fit", "--config", str(path), "--config", "tiny.yaml", "--wandb", "disabled", *data, *stem]
    command += ["--data.batch_size", "4"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AffineConvergenceMonitor observes nothing" if norm.data != "bn" else "$^")
        warnings.filterwarnings("ignore", "None of 21 weights is scale invariant" if norm.title[:2] == "no" else "$^")
        cli = run(command)
    record = read_record(cli.trainer.loggers[0].log_dir)
    assert record.complete
    invariant = {"orthogonality", "norm_growth"} if norm.data or norm.weight else set()
    affine = {"affine"} if norm.data == "bn" else set()
    groups = {key.split("/")[0] for key in record.metrics}
    assert {"orthogonality_control", "norm_growth_control", "robustness", *invariant, *affine} <= groups
    assert (record.folder / "report.html").is_file()
    saved = record.settings["config"]
    for key, value in (text.get("optimizer") or {}).get("init_args", {}).items():
        assert saved["optimizer"]["init_args"][key] == value


def test_configurations_of_the_normalizations_are_those_of_the_table() -> None:
    """None too many and none out of date; short, and different from the base only in the norm and weight decay."""
    files = load_script("docs/generate.py").files()
    assert {path: path.read_text() for path in files} == files, "run docs/generate.py"
    assert set((REPOSITORY / "configs" / "norm").iterdir()) == {path for path in files if path.suffix == ".yaml"}
    assert all(len(text.splitlines()) <= 12 for path, text in files.items() if path.suffix == ".yaml")


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Any]:
    """Parse a command as the shell does, without building anything."""
    found: list[Any] = []
    monkeypatch.setattr(NormgeoCLI, "instantiate_classes", lambda self: found.append(self.config["fit"]))
    monkeypatch.setattr(NormgeoCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(NormgeoCLI, "_run_subcommand", lambda self, name: None)
    return lambda args: (NormgeoCLI(args), found.pop())[1]


@pytest.mark.parametrize("decay", [0.0, 0.0005])
def test_a_normalization_goes_over_the_base(decay: float, parse: Callable[[list[str]], Any]) -> None:
    file = "gn+ws_wd.yaml" if decay else "gn+ws.yaml"
    configs = ["cifar10/resnet101_bn.yaml", f"norm/{file}"]
    paths = [option for name in configs for option in ("--config", str(REPOSITORY / "configs" / name))]
    parsed = parse(["fit", *paths])
    base = parse(["fit", *paths[:2]])
    assert parsed.model.norm == "gn+ws"
    assert parsed.optimizer.init_args.weight_decay == decay
    parsed.model.norm, parsed.optimizer.init_args.weight_decay = "bn", 0.0
    assert parsed.optimizer == base.optimizer
    parsed.trainer.logger = base.trainer.logger = None  # each run has a folder of its own
    assert (parsed.trainer, parsed.data) == (base.trainer, base.data)


@pytest.mark.parametrize("path", STUDIES, ids=named)
def test_study_is_listed_and_its_runs_are_those_of_the_paper(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks all values through the command, and each normalization with each weight decay in full."""
    with pytest.raises(SystemExit) as stopped:
        main(["study", str(path), "--dry-run"])
    assert stopped.value.code == 0
    study, checker = load_study(path), Checker()
    shown = capsys.readouterr().out
    assert all(f"  {name}  " in shown for name in study.runs())
    single = [name for name, norm in NORMS.items() if not (norm.data and norm.weight) and name != "none"]
    norms, decays = study.grid["model.norm"], study.grid["optimizer.init_args.weight_decay"]
    few = path.stem in ("paper_small", "paper_resnet18")
    assert set(norms) == ({"bn", "gn", "ln", "wn"} if few else set(single))
    for options in study.runs().values():
        if options.get("seed_everything", 0) == 0:
            parsed = checker.parse(runner.arguments_for(study, options, Path("runs/s/one")))
            assert parsed.model.norm == options["model.norm"]
            assert parsed.optimizer.init_args.weight_decay == options["optimizer.init_args.weight_decay"]
            assert parsed.run == "runs/s/one"
            assert parsed.data.init_args.get("name") == DATA.get(path.stem)
    assert min(decays) == 0 < max(decays)
    assert study.grid.get("seed_everything", [0, 1, 2]) == [0, 1, 2]


def test_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = yaml.safe_load((REPOSITORY / "configs" / "study" / "paper_small.yaml").read_text())
    small = REPOSITORY / "configs" / "study" / text["configs"][0]
    callbacks = [
        {"class_path": entry["class_path"]} for entry in yaml.safe_load(small.read_text())["trainer"]["callbacks"]
    ]
    (attacked,) = [entry for entry in callbacks if entry["class_path"].endswith("RobustnessEvaluation")]
    attacked["init_args"] = {"steps": 1}  # settings that are not named keep their values
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump({**TINY, "trainer": {**TINY["trainer"], "callbacks": callbacks}})
    )
    settings = {"data.init_args.batch_size": 4, "wandb": "disabled", "report": False}
    norm, decay = "model.norm", "optimizer.init_args.weight_decay"
    grid = {norm: text["grid"][norm][:2], decay: text["grid"][decay][-1:]}  # a quarter of the runs suffices
    tiny = {**text, "configs": [str(small), "tiny.yaml"], "settings": settings, "grid": grid}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tiny, sort_keys=False))
    monkeypatch.setattr(runner, "RunProcess", InProcess)
    warnings.simplefilter("ignore", MeasurementWarning)  # one step: low accuracy
    with pytest.raises(SystemExit) as stopped:
        main(["study", "study.yaml", "--report", "false"])
    assert stopped.value.code == 0
    for name, options in load_study("study.yaml").runs().items():
        record = read_record(tmp_path / "runs" / "paper_small" / name)
        assert record.complete
        assert record.settings["config"]["model"]["norm"] == options["model.norm"]
        attacks = [row["attack"] for row in record.results["robustness"]["results"]]
        assert len(attacks) == len(set(attacks)) == 2 * (2 + 4)  # clean, noise, four radii; and rescaled
        assert {"orthogonality", "norm_growth", "robustness"} <= {key.split("/")[0] for key in record.metrics}
    shutil.rmtree(tmp_path / "runs")


class ForeignModel(pl.LightningModule):
    """A user project that normalizes in the model and does not know this package."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 4)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ForeignData(pl.LightningDataModule):
    """Random images."""

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(torch.rand(8, 3, 8, 8), torch.arange(8) % 4), batch_size=4)

    test_dataloader = train_dataloader


FOREIGN = """
trainer:
  max_epochs: 1
  accelerator: cpu
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: pytorch_lightning.callbacks.LearningRateMonitor
  logger:
    - class_path: lightning_normgeo.RecordLogger
      init_args: {save_dir: out, version: one}
"""


@pytest.mark.parametrize("path", [path for path in FRAGMENTS if path.stem == "callbacks"], ids=named)
def test_fragment_joins_the_callbacks_of_another_project(path: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(FOREIGN)
    cli = LightningCLI(
        ForeignModel,
        ForeignData,
        save_config_callback=None,
        seed_everything_default=0,
        args=["fit", "--config", "theirs.yaml", "--config", str(path)],
    )
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert {LearningRateMonitor, OrthogonalityMonitor, NormGrowthMonitor, RobustnessEvaluation} <= set(kinds)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    assert isinstance(cli.trainer.logger, RecordLogger)
    record = read_record(cli.trainer.logger.folder)
    assert {"orthogonality", "norm_growth", "affine", "robustness", "lr-SGD"} <= {
        k.split("/")[0] for k in record.metrics
    }
    assert record.metrics["orthogonality/max_abs_cos"][-1][1] < 1e-3
    assert record.metrics["robustness/clean/n"] == [(2, 8.0)]
