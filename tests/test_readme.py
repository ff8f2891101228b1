"""The README's Python code, commands and key table match the package."""

from __future__ import annotations

import functools
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml

from lightning_normgeo import read_record
from lightning_normgeo.cli import NormgeoCLI
from lightning_normgeo.report.report_command import report_parser
from lightning_normgeo.runs.quantities import QUANTITIES
from lightning_normgeo.study import load_study
from lightning_normgeo.study.study_command import study_parser
from lightning_normgeo.study.validation import check
from support.projects import Project, images, sgd, trainer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONDITIONS = ("with weight decay", "with `cumulative=True`")
"""Conditions of quantities that the README's code logs in these tests."""
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


@functools.cache
def checked(path: str) -> Any:
    """Check a study of 48 runs once, however many commands name it."""
    return check(load_study(path), path)


def run_python() -> dict[str, Any]:
    """Run the Python blocks one after the other, as a reader would."""

    def small_trainer(callbacks: Any, logger: Any) -> Any:
        for callback in callbacks:
            callback.cumulative = True  # its keys are in the table too
        return trainer(*callbacks, logger=logger)

    scope: dict[str, Any] = {
        "Trainer": small_trainer,
        "model": Project(sgd(weight_decay=0.01)),
        "train_loader": images(),
        "test_loader": images(16),
        "Lion": type("Lion", (torch.optim.Optimizer,), {}),
        "network": torchvision.models.resnet18(),
        "images": torch.rand(2, 3, 64, 64),
    }
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "README.md", "exec"), scope)
    return scope


def test_python_blocks_run_and_the_key_table_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run_python()
    assert scope["record"].folder.is_relative_to("runs")
    assert len(scope["growth"]) == 4
    rows = README.split("<!-- keys -->")[1].split("<!-- /keys -->")[0]
    documented = re.findall(r"^\| `([^`]+)`", rows, re.MULTILINE)
    assert len(documented) > 25
    elsewhere = {key for key, quantity in QUANTITIES.items() if quantity.condition not in ("", *CONDITIONS)}
    patterns = [re.sub(r"\{\w+\}", "*", key) for key in documented]
    means = [key for key in patterns if "_mean" in key and key not in elsewhere]
    patterns += [key.replace("_mean", suffix) for key in means for suffix in ("_median", "_q90")]
    groups = ("orthogonality", "norm_growth", "affine", "robustness")
    logged = {key for key in read_record(scope["record"].folder).metrics if key.startswith(groups)}
    for pattern in set(patterns) - elsewhere:
        assert any(fnmatchcase(key, pattern) for key in logged), f"{pattern} is in the README but never logged"
    patterns += [f"affine/{name}_channel/*" for name in ("abs_beta_minus_mu", "gamma2_over_sigma2")]
    for key in logged:
        aggregate = any(fnmatchcase(key, pattern) for pattern in patterns)
        layer = any(fnmatchcase(key.rpartition("/")[0], pattern) for pattern in patterns)
        assert aggregate or layer, f"{key} is logged but not in the README"


def test_the_test_command_is_the_one_ci_runs() -> None:
    commands = [line for language, code in BLOCKS if language == "bash" for line in code.strip().splitlines()]
    (suite,) = [line for line in commands if "pytest" in line]
    assert suite in (ROOT / ".ci" / "run").read_text().splitlines()
    (quick,) = [line for line in commands if line.endswith("normgeo fit --config quickstart")]
    assert '".[report]"' in quick


@pytest.mark.parametrize(
    "command",
    [
        line.partition("#")[0].strip()
        for language, code in BLOCKS
        if language == "bash"
        for line in code.splitlines()
        if line.startswith("normgeo")
    ],
)
def test_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything is parsed as in a shell; models are built and trained in other tests."""
    parsed: list[Any] = []
    monkeypatch.setattr(NormgeoCLI, "instantiate_classes", lambda self: parsed.append(self.config))
    monkeypatch.setattr(NormgeoCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(NormgeoCLI, "_run_subcommand", lambda self, name: None)
    for check_of in ("check_exists", "check_checkpoint"):  # the README's checkpoint has … in its path
        monkeypatch.setattr(f"lightning_normgeo.cli.command.{check_of}", lambda path: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    name, *options = shlex.split(command)[1:]
    if name == "study":
        path = study_parser().parse_args(options).study
        checked(path)
    elif name == "report":
        assert report_parser().parse_args(options).runs
    else:
        NormgeoCLI([name, *options])
        assert parsed


def test_named_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for text in re.findall(r"configs/[\w/+]+\.yaml", README):
        assert yaml.safe_load((ROOT / text).read_text())
