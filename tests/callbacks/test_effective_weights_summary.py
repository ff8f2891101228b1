"""EffectiveWeightsSummary in real Trainers: what it measures, when, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_normgeo import EffectiveWeightsSummary, RecordLogger, effective_weights, read_record
from lightning_normgeo.callbacks._robustness.progress_bars import named_steps
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.runs.quantities.effective_weights import EFFECTIVE
from lightning_normgeo.runs.summary import summarize
from support.projects import ConvNet, Fingerprint, Project, images, same, sgd, trainer

KEYS = {quantity.key for quantity in EFFECTIVE}


def fitted(*callbacks: Any, project: Any = None, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = Project(sgd(momentum=0.9)) if project is None else project
    running = trainer(*callbacks, **settings)
    running.fit(module, images())
    return running, module


def values(result: Any) -> dict[str, float]:
    return {f"effective/{name}": value for name, value in result.quantities.items()}


def test_after_fit_the_last_weights_are_measured() -> None:
    record, summary = RecordLogger("runs"), EffectiveWeightsSummary()
    running, module = fitted(summary, logger=[record])
    expected = effective_weights(module, next(iter(images()))[0])
    assert summary.result == expected
    found = read_record(record.folder)
    logged = {key: points for key, points in found.metrics.items() if key.startswith("effective/")}
    assert {key: points[-1][1] for key, points in logged.items()} == values(expected)
    assert logged.keys() == KEYS - {"effective/none"}
    assert {step for points in logged.values() for step, _ in points} == {running.global_step}
    assert found.results["effective_weights"] == json.loads(json.dumps(expected.as_dict()))
    assert json.loads(Path(record.folder, "effective_weights.json").read_text())["steps"] == 30
    assert {key: float(value) for key, value in running.callback_metrics.items() if key in KEYS} == pytest.approx(
        values(expected), rel=1e-6
    )
    assert "‖W'‖, effective weights" in summarize(record.folder)


def test_a_test_measures_what_it_tests_and_the_same_weights_only_once() -> None:
    record, summary = RecordLogger("runs"), EffectiveWeightsSummary()
    running, module = fitted(summary, logger=[record])
    first = summary.result
    running.test(module, images(8), verbose=False)
    assert summary.result is first
    with torch.no_grad():
        module.net[8].weight.mul_(2)
    running.test(module, images(8), verbose=False)
    assert summary.result is not first
    norms = [value for _, value in read_record(record.folder).metrics["effective/last_layer_norm"]]
    assert norms == pytest.approx([norms[0], 2 * norms[0]], rel=1e-6)


@pytest.mark.parametrize("loop", ["test", "validate"])
def test_without_fit_the_loop_measures(loop: str) -> None:
    class Validated(Project):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.test_step(batch, batch_idx)

    summary, module = EffectiveWeightsSummary(steps=7), Validated()
    getattr(trainer(summary), loop)(module, images(8), verbose=False)
    assert summary.result == effective_weights(module, next(iter(images()))[0], steps=7)


def test_validation_inside_fit_measures_nothing() -> None:
    class Validated(Project):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert summary.result is None

    summary = EffectiveWeightsSummary()
    trainer(summary).fit(Validated(), images(), images(8))
    assert summary.result is not None


def test_the_training_is_bit_for_bit_the_same() -> None:
    def project() -> Project:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Dropout(0.1), ConvNet())
        return Project(sgd(momentum=0.9, weight_decay=0.01), net)

    states, ends = [], []
    for callbacks in ([], [EffectiveWeightsSummary()]):
        witness, module = Fingerprint(), project()
        running = trainer(*callbacks, witness, max_epochs=2, steps=-1)
        running.fit(module, images())
        running.test(module, images(16), verbose=False)
        running.fit_loop.max_epochs = 3
        running.fit(module, images())
        states.append(witness.states)
        grads = {name: p.grad for name, p in module.named_parameters()}
        modes = [child.training for child in module.modules()]
        ends.append(copy.deepcopy((module.state_dict(), grads, modes, torch.get_rng_state())))
    assert len(states[0]) == 24
    assert same(*states)
    assert same(*ends)


def test_a_batch_costs_nothing_after_the_first() -> None:
    summary = EffectiveWeightsSummary()
    calls: list[int] = []

    class Project_(Project):  # noqa: N801
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(summary.on_train_batch_start is None)
            return super().training_step(batch, batch_idx)

    fitted(summary, project=Project_())
    assert calls == [True] * 4
    assert len(summary._batch[0]) == 2


class Words(Project):
    """A project whose batches hold no images."""

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch["numbers"][0]).square().mean()
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch["numbers"][0])


def words() -> DataLoader[Any]:
    batches = [{"numbers": [torch.randn(5, 4, generator=torch.Generator().manual_seed(k))]} for k in range(4)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def measured(told: Any) -> list[str]:
    return [str(one.message) for one in told if one.category is MeasurementWarning]


def test_batches_of_other_kinds() -> None:
    with pytest.warns(
        MeasurementWarning, match=r"finds no inputs of the model .* Override its inputs\(batch\)"
    ) as told:
        trainer(EffectiveWeightsSummary()).fit(Words(), words())
    assert len(measured(told)) == 1

    class Own(EffectiveWeightsSummary):
        def inputs(self, batch: Any) -> Any:
            return batch["numbers"][0]

    own, example = Own(), EffectiveWeightsSummary()
    trainer(own).fit(Words(), words())
    assert len(own.result) == 2
    project = Words()
    project.example_input_array = torch.randn(3, 4)
    trainer(example).fit(project, words())
    assert example.result["net.0"].effective_norm > 0


def test_models_that_cannot_be_measured_train_on_with_one_warning() -> None:
    class Odd(Project):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            found: Tensor = self.net(x) * scale
            return found

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0], 2.0), batch[1])

    summary = EffectiveWeightsSummary()
    with pytest.warns(MeasurementWarning, match="measures nothing. Odd cannot take the example batch") as told:
        running, _ = fitted(summary, project=Odd())
    assert len(measured(told)) == 1
    assert running.global_step == 4
    assert summary.result is None


def test_a_bug_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lightning_normgeo.callbacks.effective_weights_summary.effective_weights", broken)
    with pytest.warns(MeasurementWarning, match="A measurement failed and is skipped: RuntimeError"):
        running, _ = fitted(EffectiveWeightsSummary())
    assert running.global_step == 4


class Broken(pl.loggers.CSVLogger):
    """A logger whose service fails when it gets effective weights."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key in KEYS for key in metrics):
            raise ConnectionError("service is gone")


def test_a_logger_that_fails_stops_nothing_and_no_other_logger() -> None:
    record = RecordLogger("runs")
    with pytest.warns(MeasurementWarning, match="Broken failed to log the effective weights: ConnectionError") as told:
        fitted(EffectiveWeightsSummary(), logger=[Broken("logs"), record])
    assert len(measured(told)) == 1
    assert "effective_weights" in read_record(record.folder).results


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="steps=0"):
        EffectiveWeightsSummary(steps=0)
    averaging = type("WeightAveraging", (EffectiveWeightsSummary,), {})
    with pytest.raises(ConfigurationError, match="EffectiveWeightsSummary comes before WeightAveraging"):
        trainer(EffectiveWeightsSummary(), averaging()).fit(Project(), images())
    assert repr(EffectiveWeightsSummary(steps=5)) == "EffectiveWeightsSummary(steps=5)"


def test_a_trial_run_measures_nothing() -> None:
    summary = EffectiveWeightsSummary()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(summary, fast_dev_run=True).fit(Project(), images())
    assert summary.result is None


class Bar:
    """Stand-in for a Trainer's rich progress bar."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.hidden = 0

    def add_task(self, title: str, total: int) -> int:
        self.lines.append(f"{title} of {total}")
        return 1

    def update(self, task: int, advance: int = 0, description: str = "", visible: bool = True) -> None:
        self.hidden += not visible
        if description:
            self.lines.append(description)


def test_progress_is_shown_beside_the_trainers_own() -> None:
    bar = Bar()
    own = type("Own", (), {"is_enabled": True, "progress": bar})
    with named_steps(type("Trainer", (), {"progress_bar_callback": own}), "effective weights", 2) as step:
        step("conv1")
    assert bar.lines == ["effective weights of 2", "effective weights: conv1"]
    assert bar.hidden == 1
    summary = EffectiveWeightsSummary()
    fitted(summary, pl.callbacks.TQDMProgressBar(), enable_progress_bar=True)
    assert summary.result is not None
