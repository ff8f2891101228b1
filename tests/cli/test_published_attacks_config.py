"""``--config published_attacks`` adds an evaluation with attacks as robustness tables have them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml
from torch import nn

from lightning_normgeo import RobustnessEvaluation, read_record
from lightning_normgeo.cli import run
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.models import resnet
from support.tiny_config import TINY_DIGITS


def small_network(*settings: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_it_adds_an_evaluation_beside_that_of_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "build_resnet", small_network)  # the attacks classify thousands of times
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_DIGITS))
    with warnings.catch_warnings(action="ignore", category=MeasurementWarning):  # of an untrained network
        cli = run(["fit", "--config", "tiny.yaml", "--config", "published_attacks", "--wandb", "disabled"])
    names = [one.name for one in cli.trainer.callbacks if isinstance(one, RobustnessEvaluation)]
    assert names == [None, "published"]
    record = read_record(cli.trainer.loggers[0].log_dir)
    found = record.evaluations["published"]
    rows = {row["attack"].partition("/")[0] for row in found["results"]}
    assert {"bim-margin", "apgd", "apgd-t", "square", "nearest", "worst", "corruptions-jpeg_s5"} <= rows
    assert found["sanity"]
    assert found["settings"]["attacks"]["apgd-t"]["targets"] == 9
    report = (record.folder / "report.html").read_text(encoding="utf-8")
    assert all(f'id="{anchor}"' in report for anchor in ("worst-case", "smallest-radii", "corruptions", "sanity"))
