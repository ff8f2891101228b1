"""A study as a W&B sweep: W&B's agent runs the same runs, and the command line accepts every value."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.wandb.downloaded_records import read_project
from lightning_normgeo.study import load_study
from lightning_normgeo.study.study_command import main
from lightning_normgeo.study.validation import Checker
from lightning_normgeo.study.wandb_sweep import sweep_of
from support.isolation import REPOSITORY
from support.wandb_backend import ENTITY
from support.wandb_server import needs_pinned_wandb, serve

# Lightning's LightningCLI calls what jsonargparse 4.49 renamed
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

STUDY = """
name: everything
configs: [base.yaml]
settings: {trainer.max_epochs: 3, wandb: disabled}
grid:
  model.norm: [bn, gn+ws]
  lr_scheduler: [{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}]
  optimizer.init_args.lr: [1.0e-05, 0.1]
  optimizer.init_args.nesterov: [true, false]
  trainer.callbacks.init_args.eps: [[0.01, 2.0e-05], [0.1]]
  model.decayed: [all, weights]
  config: ["over lay.yaml", other.yaml]
"""
BASE = """
trainer: {callbacks: [{class_path: lightning_normgeo.RobustnessEvaluation}]}
data: {class_path: lightning_normgeo.DigitsDataModule}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.9}}
"""

SMALL_STUDY = """
name: small
configs: [base.yaml]
settings: {report: false, test_after_fit: false}
grid:
  model.norm: [gn]
  optimizer.init_args.weight_decay: [0.0, 0.001]
"""
SMALL_BASE = """
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 2, limit_val_batches: 1, log_every_n_steps: 1}
model: {arch: resnet18, stem: imagenet}
data: {class_path: lightning_normgeo.DigitsDataModule, init_args: {batch_size: 8}}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05}}
"""


@pytest.fixture
def study(tmp_path: Path) -> str:
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "over lay.yaml").write_text("model: {label_smoothing: 0.25}\n")
    (tmp_path / "other.yaml").write_text("model: {groups: 16}\n")
    return "study.yaml"


def command_of(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Return the command that an agent runs for the server's values."""
    flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
    filled = [flags if word == "${args}" else [word] for word in sweep["command"]]
    return [word for words in filled for word in words]


def corners(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Return value sets in which each value of each parameter occurs."""
    parameters = {name: entry["values"] for name, entry in sweep["parameters"].items()}
    most = max(map(len, parameters.values()))
    return [{name: values[min(i, len(values) - 1)] for name, values in parameters.items()} for i in range(most)]


def test_the_agents_command_is_taken_and_means_the_same(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([study, "--wandb-sweep", "sweep.yaml"]) == 0
    assert "Now: wandb sweep sweep.yaml, and on each machine wandb agent" in capsys.readouterr().out
    assert not Path("runs").exists()
    sweep = yaml.safe_load(Path("sweep.yaml").read_text())
    checker, loaded = Checker(), load_study(study)
    local = [dict(options) for options in loaded.runs().values()]
    for values in corners(sweep):
        command = command_of(sweep, values)
        assert command[:5] == ["${env}", "${interpreter}", "-m", "lightning_normgeo", "fit"]
        assert values in local
        settings = checker.parse(command[4:])
        assert settings.model.norm == values["model.norm"]
        assert settings.model.decayed == values["model.decayed"]
        assert settings.optimizer.init_args.lr == values["optimizer.init_args.lr"]
        assert settings.optimizer.init_args.momentum == 0.9
        assert settings.optimizer.init_args.nesterov is values["optimizer.init_args.nesterov"]
        assert settings.trainer.callbacks[0].init_args.eps == values["trainer.callbacks.init_args.eps"]
        assert settings.lr_scheduler.init_args.step_size == 3
        assert settings.trainer.max_epochs == 3
        assert (settings.model.label_smoothing, settings.model.groups) in {(0.25, None), (0.0, 16)}
        assert settings.wandb == "online"  # else the server would never learn of the run


def test_sweep_is_one_of_wandb(study: str) -> None:
    main([study, "--wandb-sweep", "sweep.yaml"])
    sweep = yaml.safe_load(Path("sweep.yaml").read_text())
    assert (sweep["name"], sweep["method"], sweep["project"]) == ("everything", "grid", "normgeo")
    assert sweep["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    size = 1
    for entry in sweep["parameters"].values():
        size *= len(entry["values"])
    assert size == len(load_study(study).runs()) == 64


@pytest.mark.parametrize("value", ["null", "[null]", "{a: [1, null]}"])
def test_null_is_refused(value: str, study: str) -> None:
    Path(study).write_text(f"name: s\ngrid: {{model.groups: [8, {value}]}}\n")
    with pytest.raises(ConfigurationError, match=r"grid.model.groups has the value null.*'None'.*Leave it out, or"):
        sweep_of(load_study(study))


@pytest.mark.parametrize(("value", "text"), [(".inf", "inf"), ("[-.inf]", "-inf"), ("{a: .nan}", "nan")])
def test_numbers_that_are_not_finite_are_refused(value: str, text: str, study: str) -> None:
    Path(study).write_text(f"name: s\ngrid: {{trainer.gradient_clip_val: [{value}]}}\n")
    with pytest.raises(ConfigurationError, match=rf"has the value -?\.(inf|nan), which.* as the text '{text}'"):
        sweep_of(load_study(study))


def test_the_agent_puts_files_before_the_options_that_go_over_them(study: str) -> None:
    Path("other.yaml").write_text("model: {norm: ln}")
    Path(study).write_text("name: s\nconfigs: [base.yaml]\ngrid: {model.norm: [gn], config: [other.yaml]}")
    sweep = sweep_of(load_study(study))
    (values,) = corners(sweep)
    assert Checker().parse(command_of(sweep, values)[4:]).model.norm == "gn"


def test_a_place_that_cannot_be_written(study: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--wandb-sweep nowhere/sweep.yaml: cannot write there \(No such"):
        main([study, "--wandb-sweep", "nowhere/sweep.yaml"])


@pytest.mark.parametrize("name", ["paper_small", "paper_cifar10", "paper_cifar100"])
def test_studies_of_the_repository(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # paths in a sweep are relative, for machines with other folders
    sweep = sweep_of(load_study(f"configs/study/{name}.yaml"))
    checker = Checker()
    for values in corners(sweep):
        command = command_of(sweep, values)
        assert str(REPOSITORY) not in shlex.join(command)
        settings = checker.parse(command[4:])
        assert settings.model.norm == values["model.norm"]
        assert settings.optimizer.init_args.weight_decay == values["optimizer.init_args.weight_decay"]


@needs_pinned_wandb
@pytest.mark.slow
def test_an_agent_runs_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study.yaml").write_text(SMALL_STUDY)
    (tmp_path / "base.yaml").write_text(SMALL_BASE)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.delenv("WANDB_MODE")
    main(["study.yaml", "--wandb-sweep", "sweep.yaml"])
    with serve() as server:
        wandb("sweep", "sweep.yaml")
        wandb("agent", f"{ENTITY}/normgeo/sweep0")
        records = read_project(f"{ENTITY}/normgeo", tmp_path / "read")
        assert server.refused == []
    settings = [record.settings["config"] for record in records]
    found = [(one["model"]["norm"], one["optimizer"]["init_args"]["weight_decay"]) for one in settings]
    assert found == [("gn", 0), ("gn", 0.001)]
    assert {run.fields["sweep"] for run in server.runs.values()} == {"sweep0"}
    assert {run.exit_code for run in server.runs.values()} == {0}
    for record in records:
        assert [step for step, _ in record.metrics["norm_growth/increment"]] == [0, 1]


def wandb(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "wandb", *args], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
