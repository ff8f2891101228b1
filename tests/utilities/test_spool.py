"""A full disk does not stop a run: lines wait until there is room, and lost lines are counted."""

from __future__ import annotations

import copy
import errno
import json
import logging
import pickle
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_normgeo import NormGrowthMonitor, RecordLogger, RobustnessEvaluation, read_record
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.robustness import load_decisions
from lightning_normgeo.utilities.files import write_document
from lightning_normgeo.utilities.spool import Outage, Spool
from support.full_disk import PLACES, failing, no_file_beyond
from support.projects import Project, images, trainer

WAITS = r"cannot be written \(.+\)\. Training goes on: what is logged waits in memory, 16 MiB at most"


@pytest.fixture(autouse=True)
def _in_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the time limit for slow writes, so that a busy machine does not count as a slow disk."""
    monkeypatch.setattr("lightning_normgeo.utilities.spool._SLOW", 20.0)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_half_a_line_is_ended_when_there_is_room() -> None:
    """The operating system writes a part of a line before it reports that there is no room."""
    spool = Spool(Path("out/lines"))
    assert spool.append("first")
    with no_file_beyond(10):
        assert not spool.append("second")
        assert not spool.append("third")
        assert Path("out/lines").read_bytes() == b"first\nseco"
    assert (spool.waiting, spool.lost) == (2, 0)
    assert spool.append("fourth")
    assert lines_of(spool.path) == ["first", "second", "third", "fourth"]
    assert spool.ended_outage() == Outage("File too large", 3, 0)
    assert spool.ended_outage() is None
    spool.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(codec="ascii", exclude_characters="\r\n;"), max_size=12), max_size=12),
    rooms=st.lists(st.integers(0, 120) | st.none(), min_size=12, max_size=12),
    most=st.integers(1, 40) | st.just(10**6),
)
def test_lines_are_whole_and_in_order_and_what_is_lost_is_counted(
    texts: list[str], rooms: list[int | None], most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = [f"{number:02d}{text};" for number, text in enumerate(texts)]  # no line is part of another
    path = tmp_path_factory.mktemp("spool") / "lines"
    spool = Spool(path, most)
    for line, room in zip(lines, rooms, strict=False):
        if room is None:
            spool.append(line, spare=True)
            assert not spool.waiting
        else:
            with no_file_beyond(room):
                spool.append(line, spare=True)
    spool.close()
    written = path.read_text().split("\n")[:-1] if lines else []
    whole = [line for line in written if line in lines]
    halves = [line for line in written if line not in lines]
    assert whole == sorted(set(whole))
    assert all(any(line.startswith(half) for line in lines if line not in whole) for half in halves)
    assert len(lines) - spool.lost <= len(whole), "a dropped line may lack its end only"
    assert len(whole) + len(halves) <= len(lines)
    assert spool.waiting == 0


def test_too_much_is_dropped_from_the_oldest_that_can_be_spared(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "lines", most=40)
    with failing("open", tmp_path):
        spool.append("settings")
        for k in range(8):
            spool.append(f"metrics {k}", spare=True)
    assert (spool.waiting, spool.lost) == (4, 5)
    assert spool.append("more")
    assert lines_of(spool.path) == ["settings", "metrics 5", "metrics 6", "metrics 7", "more"]
    assert spool.ended_outage() == Outage("No space left on device", 5, 5)
    spool.close()


def test_slow_errors_take_a_tenth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, tried = [0.0], []

    def stall(self: Spool) -> None:
        tried.append(now[0])
        now[0] += 30.0
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr("lightning_normgeo.utilities.spool.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Spool, "_open", stall)
    spool = Spool(tmp_path / "lines")
    for _ in range(1000):
        now[0] += 1.0
        spool.append("line")
    assert len(tried) == 4
    assert spool.waiting == 1000


def test_a_copy_has_nothing_of_what_waits(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "lines")
    with failing("open", tmp_path):
        spool.append("once")
    for other in (copy.deepcopy(spool), pickle.loads(pickle.dumps(spool))):
        other.append("more")
        other.close()
    spool.close()
    assert lines_of(spool.path) == ["more", "more", "once"]


@pytest.mark.parametrize("place", PLACES)
def test_documents_are_whole_or_what_they_were(place: str, tmp_path: Path) -> None:
    write_document(tmp_path / "a.json", {"value": 1})
    with failing(place, tmp_path), pytest.raises(OSError, match="No space left"):
        write_document(tmp_path / "a.json", {"value": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def log_everything(logger: RecordLogger, step: int) -> None:
    logger.log_hyperparams({"lr": step})
    logger.log_metrics({"a": float(step)}, step=step)
    logger.log_layers({"q": {"conv1": float(step)}}, step=step)
    logger.log_observation({"summary": str(step)})
    logger.log_results("scores", {"step": step})
    logger.log_image("seen", [np.full((2, 2, 3), step, np.uint8)], step=step)


@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_lost_of_a_record(place: str, begun: bool, tmp_path: Path, caplog: Any) -> None:
    logger = RecordLogger(str(tmp_path), version="one")
    if begun:
        log_everything(logger, 0)
        logger._opened().close()  # open files can still be written
    said = place not in ("fsync", "replace")  # calls that writing lines does not need
    expected = pytest.warns(MeasurementWarning, match=WAITS) if said else nullcontext()
    with failing(place, tmp_path), expected:
        log_everything(logger, 1)
        log_everything(logger, 2)
    log_everything(logger, 3)
    with caplog.at_level(logging.INFO):
        logger.finalize("success")
    record = read_record(logger.folder)
    steps = [0, 1, 2, 3] if begun else [1, 2, 3]
    assert record.metrics == {"a": [(step, float(step)) for step in steps]}
    assert record.layers == {"q": [(step, {"conv1": float(step)}) for step in steps]}
    assert record.observations == [{"summary": str(step)} for step in steps]
    assert record.settings == {"lr": 3}
    assert record.environment
    assert (record.complete, record.lost) == (True, 0)
    assert json.loads((logger.folder / "scores.json").read_text()) == {"step": 3} == record.results["scores"]
    assert (logger.folder / record.images["seen"][0][0]).stat().st_size > 50
    assert "had to wait for the disk; all of them are written." in caplog.text or not said


def log_steps(logger: RecordLogger, steps: Iterable[int]) -> None:
    for step in steps:
        logger.log_metrics({"a": float(step)}, step=step)


def test_what_is_lost_is_counted_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_normgeo.runs.records.record_logger.Spool", lambda path: Spool(path, most=1500))
    logger = RecordLogger(str(tmp_path), version="one")
    with failing("open", tmp_path):
        with pytest.warns(MeasurementWarning, match=WAITS) as said:
            log_steps(logger, range(50))
        assert len(said) == 1
        with pytest.warns(MeasurementWarning, match=r"one: \d+ lines, \d+ earlier lines could not be written\."):
            logger.finalize("failed")
    with pytest.warns(MeasurementWarning, match=r"one: \d+ earlier lines could not be written\."):
        logger.finalize("failed")
    record = read_record(logger.folder)
    assert len(record.metrics["a"]) + record.lost == 50
    assert record.metrics["a"][-1] == (49, 49.0)
    assert record.lost > 30
    assert record.environment


def test_files_that_cannot_be_written_at_all_are_named(tmp_path: Path) -> None:
    logger = RecordLogger(str(tmp_path), version="one")
    (logger.folder / "scores.json").mkdir(parents=True)
    assert logger.log_results("scores", {"a": 1}) is False
    assert logger.log_results("others", {"a": 1}) is True
    with pytest.warns(MeasurementWarning, match=r"one: scores\.json \(Is a directory\) could not be written"):
        logger.finalize("success")
    assert read_record(logger.folder).results["scores"] == {"a": 1}


def test_a_training_goes_on_and_its_record_is_whole_later(tmp_path: Path) -> None:
    """Lightning logs the loss, and a monitor logs all layers."""

    class Filling(Project):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                self.full = failing("write", tmp_path)
                logger._opened().close()
                self.full.__enter__()
            elif batch_idx == 6:
                self.full.__exit__(None, None, None)
            return super().training_step(batch, batch_idx)

    found = []
    for folder, project in ((tmp_path / "room", Project), (tmp_path / "full", Filling)):
        torch.manual_seed(0)
        logger = RecordLogger(str(folder), version="one")
        model = project()
        fit = trainer(NormGrowthMonitor(), logger=logger, max_steps=10, log_every_n_steps=1, default_root_dir=folder)
        if project is Filling:
            with pytest.warns(MeasurementWarning, match=WAITS) as said:
                fit.fit(model, images(80, batch_size=8))
            assert sum(one.category is MeasurementWarning for one in said) == 1
        else:
            fit.fit(model, images(80, batch_size=8))
        found.append((read_record(logger.folder), model.state_dict()))
    (whole, weights), (later, others) = found
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert whole.metrics == later.metrics
    assert whole.layers == later.layers
    assert len(later.metrics["loss"]) == 10
    assert later.complete


@pytest.mark.parametrize("place", PLACES)
def test_an_evaluation_that_cannot_be_written_is_told_and_goes_on_from_its_journal(place: str, tmp_path: Path) -> None:
    project, data = Project(), images(24, batch_size=8)
    runs, root = tmp_path / "runs", tmp_path / "root"
    first, second = RobustnessEvaluation(steps=1), RobustnessEvaluation(steps=1)
    logger = RecordLogger(str(runs), version="one")
    with failing(place, runs), pytest.warns(MeasurementWarning) as said:
        trainer(first, logger=logger, default_root_dir=root).test(project, data, verbose=False)
    (told,) = [str(one.message) for one in said if "robustness results cannot be written" in str(one.message)]
    assert "running the same test again resumes from it" in told
    assert all(f"{attack} " in told and f"{100 * r.accuracy:.2f} %" in told for attack, r in first.results.items())
    assert len(list(root.glob("robustness-*.jsonl"))) == 1
    assert not (logger.folder / "robustness.npz").exists()
    again = RecordLogger(str(runs), version="one")
    trainer(second, logger=again, default_root_dir=root).test(project, data, verbose=False)
    assert second.results == first.results
    assert not list(root.glob("robustness-*.jsonl"))
    assert load_decisions(again.folder / "robustness.npz").attacks == list(first.results)
    assert json.loads((again.folder / "robustness.json").read_text())["results"]


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    callback = RobustnessEvaluation(steps=1)
    run = trainer(callback, logger=RecordLogger(str(tmp_path / "runs")), default_root_dir=root)
    with failing("write", root), pytest.warns(MeasurementWarning, match="if it is killed it cannot be resumed") as said:
        run.test(Project(), images(24, batch_size=8), verbose=False)
    assert sum("resumed" in str(one.message) for one in said) == 1
    assert callback.results["clean"].n == 24
    assert not list(root.glob("robustness-*.jsonl"))
