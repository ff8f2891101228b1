"""Curves kept as columns equal the lists of their points, in every order of lines and processes, whole or thinned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.runs.records.record import read_record
from lightning_normgeo.runs.records.record_curves import CurveReader
from lightning_normgeo.runs.records.record_logger import RecordLogger
from lightning_normgeo.utilities import files
from support.tensors import PROPERTY

KEYS = st.sampled_from(["a", "b", "c/layer"])
VALUES = st.dictionaries(KEYS, st.floats(allow_nan=False, width=32), min_size=1)
PROCESSES = st.lists(st.lists(st.tuples(st.integers(0, 30), VALUES), max_size=8), min_size=1, max_size=3)


def lists_of(processes: Any) -> dict[str, list[tuple[int, float]]]:
    """Return the curves as lists, built point by point as their definition says."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for lines in processes:
        earlier = set(curves)
        for step, values in lines:
            for key, value in values.items():
                curve = curves.setdefault(key, [])
                if key in earlier:  # logged again after a checkpoint
                    earlier.discard(key)
                    curve[:] = [point for point in curve if point[0] < step]
                curve.append((step, value))
    return curves


@PROPERTY
@given(PROCESSES)
def test_metrics_are_the_list_of_their_points(processes: Any) -> None:
    reader = CurveReader()
    for lines in processes:
        reader.begin_process()
        for step, values in lines:
            reader.add_metrics(step, values)
    expected = lists_of(processes)
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
    whole = lists_of([[(step, {"norm": values}) for step, values in lines] for lines in processes])
    if whole:
        assert reader.layers == whole
    for layer in ("a", "b", "c/layer"):
        expected = [(step, values[layer]) for step, values in whole.get("norm", []) if layer in values]
        assert not whole or reader.layers["norm"].of_layer(layer) == expected


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
