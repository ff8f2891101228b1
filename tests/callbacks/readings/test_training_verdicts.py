"""Verdicts on a training are logged with every logger that has tables, also of a training that was resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    read_record,
    verdicts,
)
from lightning_normgeo.runs.verdicts.logged_verdicts import KEYS, TRAINING, verdict_rows
from support.projects import Project, Rows, images, sgd, trainer


class Tables(Rows):
    """A logger with tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Any]]] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        self.tables[key] = data


def fit(*loggers: Any, steps: int, **settings: Any) -> Any:
    run = trainer(OrthogonalityMonitor(), NormGrowthMonitor(), steps=steps, logger=list(loggers))
    run.fit(Project(sgd(momentum=0.9)), images(24), **settings)
    return run


def test_verdicts_need_no_record() -> None:
    tables, record = Tables(), RecordLogger("runs")
    fit(tables, record, steps=4)
    alone = Tables()
    fit(alone, steps=4)
    topics = ["Lemma 3: W ⟂ ∇W", "Eq 16: Δ‖W‖² = η²‖∇W‖²", "Increments explained", "Norms grow (Lemma 3)"]
    assert [row[0] for row in alone.tables[TRAINING]] == [*topics, "Decay: equilibrium"]
    assert tables.tables[TRAINING] == verdict_rows(read_record(record.folder))
    assert alone.tables[TRAINING][1][1:5] == ["not applicable", "", "", "momentum 0.9"]
    assert {row[1] for row in alone.tables[TRAINING]} == {"undecided", "not applicable"}, "four steps are too few"


@pytest.mark.parametrize("recorded", [True, False])
def test_verdicts_of_a_resumed_training_are_those_of_all_its_steps_if_it_has_a_record(
    recorded: bool, tmp_path: Path
) -> None:
    class Keeping(Tables):
        """A logger of the project's own that keeps observations, and no record."""

        def log_observation(self, observation: dict[str, Any]) -> None:
            pass

    first = RecordLogger("runs", version="one")
    fit(first, steps=3).save_checkpoint(tmp_path / "half.ckpt")
    tables, second = Keeping(), RecordLogger("runs", version="one")
    fit(tables, *([second] if recorded else []), steps=6, ckpt_path=tmp_path / "half.ckpt")
    norms = [value for _, value in read_record(second.folder).metrics["norm_growth/weight_norm"]]
    growth = next(row for row in tables.tables[TRAINING] if row[0] == "Norms grow (Lemma 3)")
    if recorded:
        assert growth[2] == f"‖W‖ × {norms[5] / norms[0]:.4f}"
    else:
        assert growth[2] != f"‖W‖ × {norms[-1] / norms[0]:.4f}"


class Lost(Project):
    """A project whose loss is NaN from a step on."""

    def __init__(self, since: int) -> None:
        super().__init__(sgd())
        self.since = since

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step >= self.since:
            loss = loss * torch.nan
            self.log("loss", loss)
        return loss


@pytest.mark.parametrize("since", [6, 12])
@pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning")
def test_a_training_that_diverged_decides_nothing_with_any_logger(since: int) -> None:
    recorded, alone, record = Tables(), Tables(), RecordLogger("runs")
    for loggers in ([recorded, record], [alone]):
        monitors = OrthogonalityMonitor(), NormGrowthMonitor()
        run = trainer(*monitors, steps=14, max_epochs=5, logger=loggers, log_every_n_steps=1)
        run.fit(Lost(since), images(24))
    assert recorded.tables[TRAINING] == verdict_rows(read_record(record.folder))
    assert recorded.tables[TRAINING][0][2] == f"diverged: loss is not finite from step {since} on"
    for tables in (recorded, alone):
        words = [row[1] for row in tables.tables[TRAINING]]
        assert words == ["diverged", *["undecided"] * 4, "not applicable"]


def test_weight_decay_of_a_later_parameter_group_counts() -> None:
    """Biases without weight decay often come before the weights."""

    def groups(project: Project) -> torch.optim.Optimizer:
        flat = [one for one in project.parameters() if one.ndim < 2]
        weights = [one for one in project.parameters() if one.ndim >= 2]
        settings = [{"params": flat, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.5}]
        return torch.optim.SGD(settings, lr=0.1)

    record = RecordLogger("runs")
    trainer(NormGrowthMonitor(), steps=12, logger=record).fit(Project(groups), images(24))
    found = verdicts(read_record(record.folder))
    assert (found["growth"].word, found["growth"].reason) == ("not applicable", "weight decay 0.5")
    assert found["equation_16"].reason == "weight decay 0.5"


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning")
def test_frozen_gamma_and_beta_approach_nothing(frozen: tuple[str, ...]) -> None:
    project, record = Project(), RecordLogger("runs")
    for layer in project.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for name in frozen:
                getattr(layer, name).requires_grad_(False)
    trainer(AffineConvergenceMonitor(), steps=12, logger=record).fit(project, images(96))
    found = verdicts(read_record(record.folder))
    reasons = {"weight": ("gamma_sigma", "γ is frozen"), "bias": ("beta_mu", "β is frozen")}
    for name, (claim, reason) in reasons.items():
        assert (found[claim].reason == reason) == (name in frozen) == (found[claim].word == "not applicable")


@pytest.mark.filterwarnings("ignore:None of 2 weights is scale invariant")
def test_a_network_without_normalization_has_no_weights_that_the_claims_are_about() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 4))
    record = RecordLogger("runs")
    monitors = OrthogonalityMonitor(), NormGrowthMonitor()
    trainer(*monitors, steps=12, logger=record).fit(Project(net=net), images(96))
    found = verdicts(read_record(record.folder))
    for claim in ("orthogonality", "equation_16", "increments", "growth", "equilibrium"):
        assert (found[claim].word, found[claim].reason) == ("not applicable", "no weight is scale invariant alone")


def test_columns_of_the_layer_table_are_explained() -> None:
    tables = Tables()
    fit(tables, steps=2)
    assert {row[0] for row in tables.tables[KEYS]} >= {"norm_growth/increment", "orthogonality/max_abs_cos"}


def test_the_limit_is_that_of_the_precision_of_the_training() -> None:
    tables, record = Tables(), RecordLogger("runs")
    run = trainer(OrthogonalityMonitor(), steps=2, logger=[tables, record], precision="64-true")
    run.fit(Project(), images(16, dtype=torch.float64))
    assert read_record(record.folder).observed["precision"] == "64-true"
    (row,) = tables.tables[TRAINING]
    assert row[3] == "limit 1e-10"
