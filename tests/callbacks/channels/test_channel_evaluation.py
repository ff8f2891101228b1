"""ChannelEvaluation in real Trainers."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_normgeo import ChannelEvaluation, RecordLogger, masking, read_record
from lightning_normgeo.channels.table import COLUMNS
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from support.isolation import SUPPORT
from support.module_states import equal, fingerprint
from support.processes import reports_of
from support.projects import Project, images, sgd, trainer
from support.small_models import worn

FEW: dict[str, Any] = {"criteria": ["gamma", "pairs", "random"], "ratios": [0.2, 0.5]}


class WithTestData(Project):
    def test_dataloader(self) -> Any:
        return images(40)


def used(project: Project | None = None) -> Project:
    project = project or Project()
    torch.manual_seed(0)
    for layer in project.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    worn(project)
    return project


def test_the_test_loop_equals_the_library_function(tmp_path: Path) -> None:
    project, callback = used(), ChannelEvaluation(**FEW)
    logger = RecordLogger(str(tmp_path))
    (logged,) = trainer(callback, logger=logger).test(project, images(40), verbose=False)
    expected = masking(project, images(40), progress=False, **FEW)
    assert callback.report is not None
    assert callback.report.results == expected.results
    assert len({result.correct for result in expected.results}) > 2
    for result in expected.results:
        key = f"channels/{result.criterion}/{result.replace}/{result.ratio:g}/accuracy"
        assert logged[key] == pytest.approx(result.accuracy)
    assert logged["channels/clean/accuracy"] == pytest.approx(expected.clean.accuracy)
    record = read_record(logger.folder)
    document = record.results["channels"]
    assert document == json.loads((logger.folder / "channels.json").read_text())
    assert [row["correct"] for row in document["results"]] == [result.correct for result in expected.results]
    assert document["settings"]["data"] == "test"
    assert document["clean"]["n"] == 40
    assert "channels/pairs/zero/0.5/accuracy" in record.metrics
    with (logger.folder / "channels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 1 + 14
    assert [float(row[2]) for row in rows[1:7]] == pytest.approx(project.net[1].weight.tolist())


def test_the_project_sees_the_same_state_random_numbers_and_batches() -> None:
    class Changing(Project):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            batch[0].mul_(0)  # a step may do anything with its batch

    seen: dict[bool, list[Any]] = {}
    for observed in (False, True):
        project = used(Changing())
        project.net[1].eval()
        states: list[Any] = []

        class Look(pl.Callback):
            def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
                self.states.append(fingerprint(pl_module)[:3] + fingerprint(pl_module)[4:])

            def __init__(self, states: list[Any]) -> None:
                self.states = states

        callbacks = [ChannelEvaluation(**FEW)] if observed else []
        trainer(*callbacks, Look(states)).test(project, images(24), verbose=False)
        states.append(fingerprint(project)[1])
        seen[observed] = states
    assert len(seen[True]) == 4
    assert equal(seen[False], seen[True])


def trained(observed: bool) -> Any:
    pl.seed_everything(3)
    project = WithTestData(sgd(momentum=0.9))
    callbacks = [ChannelEvaluation(after_fit=True, **FEW)] if observed else []
    run = trainer(*callbacks, steps=5)
    run.fit(project, DataLoader(images(40).dataset, 8, shuffle=True))
    optimizer = copy.deepcopy(run.optimizers[0].state_dict()["state"])
    return fingerprint(project)[:3], list(optimizer.values()), torch.get_rng_state(), torch.rand(3)


def test_a_training_is_the_same_with_and_without() -> None:
    without, observed = trained(False), trained(True)
    assert equal(without[0], observed[0])
    assert all(equal(list(a.values()), list(b.values())) for a, b in zip(without[1], observed[1], strict=True))
    assert equal(without[2:], observed[2:])


def test_after_fit_on_test_data_with_the_last_weights(tmp_path: Path) -> None:
    callback, project, logger = ChannelEvaluation(after_fit=True, **FEW), WithTestData(), RecordLogger(str(tmp_path))
    run = trainer(callback, logger=logger, steps=3)
    run.fit(project, images())
    expected = masking(project, images(40), progress=False, **FEW)
    assert callback.report is not None
    assert callback.report.results == expected.results
    assert read_record(logger.folder).metrics["channels/clean/accuracy"][0][0] == 3
    assert float(run.callback_metrics["channels/clean/accuracy"]) == pytest.approx(expected.clean.accuracy)


@pytest.mark.parametrize("found", ["no hook", None, []], ids=str)
def test_after_fit_on_validation_data_without_test_data(found: Any) -> None:
    class Validated(Project):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    if found != "no hook":
        Validated.test_dataloader = lambda self: found  # type: ignore[method-assign,assignment]
    callback = ChannelEvaluation(after_fit=True, limit_batches=2, **FEW)
    trainer(callback, steps=2).fit(Validated(), images(), images(40))
    assert callback.report is not None
    assert callback.report.settings["data"] == "validation"
    assert callback.report.clean.n == 16


def test_validate_evaluates_and_validation_inside_fit_does_not() -> None:
    class Validated(Project):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    callback, project = ChannelEvaluation(**FEW), Validated()
    run = trainer(callback, steps=2)
    run.fit(project, images(), images(40))
    assert callback.report is None
    (logged,) = run.validate(project, images(24), verbose=False)
    assert callback.report.clean.n == 24
    assert logged["channels/clean/accuracy"] == pytest.approx(callback.report.clean.accuracy)


@pytest.mark.parametrize(
    ("net", "data", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), images(16), "no batch normalization with γ and β"),
        (None, DataLoader(TensorDataset(torch.rand(16, 3, 8, 8), torch.rand(16)), 8), "not whole numbers"),
        (None, DataLoader(TensorDataset(torch.rand(16, 3, 8, 8)), 8), "ChannelEvaluation expects batches"),
    ],
)
def test_what_cannot_be_evaluated_steps_aside_with_one_warning(
    net: Any, data: Any, reason: str, tmp_path: Path
) -> None:
    class Quiet(Project):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", 1.0)

    callback, logger = ChannelEvaluation(), RecordLogger(str(tmp_path))
    with pytest.warns(MeasurementWarning, match="Channels are not evaluated") as told:
        (logged,) = trainer(callback, logger=logger).test(Quiet(net=net), data, verbose=False)
    messages = [str(one.message) for one in told if one.category is MeasurementWarning]
    assert [reason in message for message in messages] == [True]
    assert logged == {"seen": 1.0}
    assert reason in read_record(logger.folder).results["channels"]["not_evaluated"]
    assert callback.report is not None
    assert callback.report.results == []


def test_one_cause_has_one_warning() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    project = used(Project(net=net))
    with pytest.warns(MeasurementWarning, match="Channels are not ranked by") as told:
        trainer(ChannelEvaluation(ratios=0.2)).test(project, images(8), verbose=False)
    (message,) = (str(one.message) for one in told if one.category is MeasurementWarning)
    assert message.startswith("Channels are not ranked by product, share, share_shuffled: known for 0 of 4")
    assert "its scale does not pass: Hardtanh" in message


def test_other_models_and_batches_by_overriding() -> None:
    class Own(ChannelEvaluation):
        def logits(self, pl_module: Any, images: Any) -> Any:
            return pl_module(images)["found"]

        def unpack(self, batch: Any) -> Any:
            return batch["a"], batch["b"]

    class Odd(Project):
        def forward(self, x: Any) -> Any:
            return {"found": self.net(x), "x": x, "y": x}

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    data = [{"a": x, "b": y} for x, y in images(16).dataset]
    callback = Own(**FEW)
    trainer(callback).test(used(Odd()), DataLoader(data, 8), verbose=False)
    assert callback.report.clean.n == 16
    assert all(layer.product.isfinite().all() for layer in callback.report.table.layers.values())


def test_two_evaluations_are_refused_and_so_are_wrong_settings() -> None:
    with pytest.raises(ConfigurationError, match="several ChannelEvaluations"):
        trainer(ChannelEvaluation(), ChannelEvaluation()).test(Project(), images(8), verbose=False)
    with pytest.raises(ConfigurationError, match="after_fit='yes' must be True or False"):
        ChannelEvaluation(after_fit="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"ratios=\[2\.0\]"):
        ChannelEvaluation(ratios=2)
    assert repr(ChannelEvaluation(criteria="gamma")).startswith(
        "ChannelEvaluation(ratios=[0.1, 0.3, 0.5], criteria=['ga"
    )


def test_a_failure_in_the_middle_stops_no_test() -> None:
    class Failing(ChannelEvaluation):
        def logits(self, pl_module: Any, images: Any) -> Any:
            if len(images) == 4:
                raise RuntimeError("out of memory")
            return pl_module(images)

    callback = Failing(**FEW)
    with pytest.warns(MeasurementWarning, match="RuntimeError: out of memory"):
        (logged,) = trainer(callback).test(used(), images(20), verbose=False)
    assert "test_loss" in logged
    assert callback.report.not_evaluated == "RuntimeError: out of memory"


@pytest.mark.parametrize("own", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("length", [True, False])
def test_progress_is_shown(own: Any, length: bool) -> None:
    seen: list[str] = []

    class Watched(ChannelEvaluation):
        def logits(self, pl_module: Any, images: Any) -> Any:
            bar = self._run._bar
            if bar is not None:
                task = getattr(bar, "_task", None)
                seen.append(str(bar._bar) if task is None else bar._progress.tasks[task].description)
            return super().logits(pl_module, images)

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from images(16).dataset

    data = images(16) if length else DataLoader(Endless(), 8)
    trainer(Watched(**FEW), own(), enable_progress_bar=True).test(used(), data, verbose=False)
    assert any("pairs/mean/0.5" in line and "%" in line for line in seen)


class Tables(pl.loggers.CSVLogger):
    """A logger with tables, as W&B's."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.tables: dict[str, tuple[list[str], list[Any]]] = {}

    def log_table(self, key: str, columns: list[str], data: list[Any]) -> None:
        assert all(len(row) == len(columns) for row in data)
        self.tables[key] = columns, data


def test_tables_have_a_row_for_each_channel(tmp_path: Path) -> None:
    logger = Tables(str(tmp_path))
    trainer(ChannelEvaluation(**FEW), logger=logger).test(used(), images(16), verbose=False)
    columns, rows = logger.tables["channels/table"]
    assert tuple(columns) == COLUMNS
    assert len(rows) == 14
    assert len(logger.tables["channels/results"][1]) == 12
    assert (Path(logger.log_dir) / "channels.json").is_file()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    reports = {}
    for devices in (1, 2):
        folder = tmp_path_factory.mktemp(f"channels{devices}")
        reports[devices] = reports_of(SUPPORT / "ddp_channels.py", folder, str(devices), ranks=devices)
    return reports


def test_two_processes_have_one_result_and_each_sample_once(found: dict[int, list[Any]]) -> None:
    (alone,), (first, second) = found[1], found[2]
    for report in (alone, first, second):
        del report["logged"]["test_loss"]  # each process logs its own
    assert first == second
    assert first["clean"] == alone["clean"] == 31
    assert first["after fit"] == alone["after fit"] == 31
    for one, other in zip(alone["results"], first["results"], strict=True):
        if one["criterion"] != "pairs":  # measured on the first batch, which is another one
            assert one == other
    assert all(first["masks"][name] == masks for name, masks in alone["masks"].items() if "pairs" not in name)


def test_a_process_that_fails_makes_no_other_wait(found: dict[int, list[Any]]) -> None:
    assert found[1][0]["fragile"] == 31
    assert all("the disk of one process" in report["fragile"] for report in found[2])
