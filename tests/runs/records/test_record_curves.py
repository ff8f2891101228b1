"""Curves kept as columns equal the lists of their points, in every order of lines and processes, whole or thinned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.runs.records.record_curves import CurveReader
from lightning_normgeo.runs.records.record_logger import RecordLogger
from lightning_normgeo.runs.records.record_reader import read_record
from lightning_normgeo.utilities import files
from support.tensors import PROPERTY

KEYS = st.sampled_from(["a", "b", "c/layer"])
VALUES = st.dictionaries(KEYS, st.floats(allow_nan=False, width=32), min_size=1)
PROCESSES = st.lists(st.lists(st.tuples(st.integers(0, 30), VALUES), max_size=8), min_size=1, max_size=3)


def trainings_of(processes: Any) -> list[list[tuple[int, dict[str, float]]]]:
    """Return the lines of each training: a process, or a part of it from where steps of the same names go back."""
    found: list[list[tuple[int, dict[str, float]]]] = []
    for lines in processes:
        found.append([])
        for step, values in lines:
            same = [before for before, others in found[-1] if tuple(others) == tuple(values)]
            if same and step < same[-1]:
                found.append([])
            found[-1].append((step, values))
    return found


def lists_of(trainings: Any) -> dict[str, list[tuple[int, float]]]:
    """Return the curves as lists, built training by training as their definition says."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for lines in trainings:
        logged: dict[str, list[tuple[int, float]]] = {}
        for step, values in lines:
            for key, value in values.items():
                logged.setdefault(key, []).append((step, value))
        for key, points in logged.items():
            curve = curves.setdefault(key, [])
            is_an_evaluation = all(step == 0 for step, _ in points)
            if is_an_evaluation and len({step for step, _ in curve}) > 1:
                continue
            curve[:] = [point for point in curve if point[0] < points[0][0]] + points
    return curves


@PROPERTY
@given(PROCESSES)
def test_metrics_are_the_list_of_their_points(processes: Any) -> None:
    reader = CurveReader()
    for lines in processes:
        reader.begin_process()
        for step, values in lines:
            reader.add_metrics(step, values)
    expected = lists_of(trainings_of(processes))
    assert reader.metrics == expected
    for key, points in expected.items():
        curve = reader.metrics[key]
        assert len(curve) == len(points)
        assert (curve[0], curve[-1], curve[1:]) == (points[0], points[-1], points[1:])
        assert list(curve) == points
        assert repr(curve) == repr(points)


@PROPERTY
@given(PROCESSES)
def test_values_by_layer_are_the_list_of_their_points(processes: Any) -> None:
    reader = CurveReader()
    for lines in processes:
        reader.begin_process()
        for step, values in lines:
            reader.add_layers(step, [("norm", list(values))], [list(values.values())])
    whole = lists_of([[(step, {"norm": values}) for step, values in lines] for lines in trainings_of(processes)])
    if whole:
        assert reader.layers == whole
    for layer in ("a", "b", "c/layer"):
        expected = [(step, values[layer]) for step, values in whole.get("norm", []) if layer in values]
        assert not whole or reader.layers["norm"].of_layer(layer) == expected


def values_at(*steps: int, key: str = "val/accuracy", logger: RecordLogger | None = None) -> RecordLogger:
    logger = logger or RecordLogger("out", version="one")
    for step in steps:
        logger.log_metrics({key: float(step)}, step)
    return logger


@pytest.mark.parametrize("in_the_same_process", [True, False])
def test_a_later_evaluation_replaces_no_curve(in_the_same_process: bool) -> None:
    logger = values_at(4, 8)
    values_at(8, key="test/accuracy", logger=logger)
    later = logger if in_the_same_process else RecordLogger("out", version="one")
    later.log_metrics({"val/accuracy": 0.5}, 0)  # trainer.validate and trainer.test of a new Trainer log at step 0
    later.log_metrics({"test/accuracy": 0.25}, 0)
    record = read_record(logger.folder)
    assert record.metrics["val/accuracy"] == [(4, 4.0), (8, 8.0)]
    assert record.metrics["test/accuracy"] == [(0, 0.25)]


def test_a_run_that_begins_anew_replaces_its_curve() -> None:
    values_at(0, 1, 2, 3)
    record = read_record(values_at(0, 1).folder)
    assert record.metrics == {"val/accuracy": [(0, 0.0), (1, 1.0)]}


def test_of_several_trainings_with_one_logger_curves_have_the_last() -> None:
    logger = values_at(0, 1, 2, 3)
    values_at(0, 2, logger=logger)
    with pytest.warns(UserWarning, match=r"curves have the last of several trainings\. Give each a RecordLogger"):
        record = read_record(logger.folder)
    assert record.metrics == {"val/accuracy": [(0, 0.0), (2, 2.0)]}


def logged(steps: int, folder: Path) -> Path:
    logger = RecordLogger(str(folder))
    for step in range(steps):
        logger.log_metrics({"norm": float(step)}, step)
        logger.log_layers({"norm": {"one": float(step), "two": -float(step)}, "angle": {"one": 0.5}}, step)
    logger.finalize("success")
    return Path(logger.log_dir)


@pytest.mark.parametrize("steps", [1, 7, 16, 100, 1000])
@pytest.mark.parametrize("most", [1, 8, 50])
def test_of_long_records_some_steps_are_read_and_the_last_one(steps: int, most: int, tmp_path: Path) -> None:
    folder = logged(steps, tmp_path)
    whole, thinned = read_record(folder), read_record(folder, most_by_layer=most)
    assert thinned.metrics == whole.metrics, "metrics are complete"
    points = list(thinned.layers["norm"])
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert points[-1] == whole.layers["norm"][-1]
    assert all(point in list(whole.layers["norm"]) for point in points)
    assert min(steps, most) <= len(points) <= 2 * most + 1
    gaps = {b[0] - a[0] for a, b in itertools.pairwise(points[:-1])}
    assert len(gaps) <= 1, "evenly spaced"


@pytest.mark.parametrize("fast", [True, False])
def test_lines_are_the_same_without_orjson(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(files, "orjson", None)
    for line in ({"kind": "metrics", "values": {"a": 1.5, "b": "nan"}}, {"text": "\u00e9", "deep": [[{}]]}):
        assert files.parsed(json.dumps(line).encode() + b"\n") == line
    assert files.parsed(b'{"lone": "\\ud800"}') == {"lone": "?"}
    assert files.parsed(b'\xef\xbb\xbf{"a": 1}\0\0') == {"a": 1}
    for broken in (b"[1]", b'{"a": ', b"\xff\xfe", b""):
        with pytest.raises(ValueError, match="no "):
            files.parsed(broken)
