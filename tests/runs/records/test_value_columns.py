"""Values of measured steps in a record: names once, and everything read back, also from older records."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo import RecordLogger, read_record
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.runs.records.record_lines import as_line
from lightning_normgeo.runs.records.value_columns import LayerColumns
from lightning_normgeo.study.run_progress import RunProgress

LAYERS = st.dictionaries(
    st.text("abc.", min_size=1), st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=5
)


def record_of(folder: Path, steps: list[dict[str, dict[str, float]]]) -> RecordLogger:
    logger = RecordLogger(str(folder), name="r", version="v")
    for step, layers in enumerate(steps):
        logger.log_layers(layers, step=step)
    logger.finalize("success")
    return logger


@contextmanager
def tracing() -> Iterator[list[int]]:
    tracemalloc.start()
    try:
        yield []
    finally:
        tracemalloc.stop()


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    steps=st.lists(st.dictionaries(st.text("qr/", min_size=1), LAYERS, min_size=1, max_size=3), min_size=1, max_size=4)
)
def test_numbers_of_float32_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, dict[str, float]]]
) -> None:
    logger = record_of(tmp_path_factory.mktemp("r"), steps)
    found = read_record(logger.folder).layers
    for step, layers in enumerate(steps):
        for quantity, values in layers.items():
            (back,) = (one for at, one in found[quantity] if at == step)
            assert list(back) == list(values)
            for layer, value in values.items():
                assert np.float32(back[layer]) == np.float32(value) or (math.isnan(value) and math.isnan(back[layer]))
                assert math.isnan(value) or not math.isfinite(value) or abs(back[layer] - value) <= 1e-8 * abs(value)


@pytest.mark.parametrize("value", [0.0, -0.0, 2.5e6, 1.02597835e-4, math.inf, -math.inf, 3])
def test_a_value_that_all_layers_share_is_written_once(tmp_path: Path, value: float) -> None:
    logger = record_of(tmp_path, [{"q": dict.fromkeys("abc", value), "one": {"a": value}, "r": {"a": 1.0, "b": 2.0}}])
    (line,) = (line for line in lines(logger.path) if line["kind"] == "column_values")
    shared = str(value) if math.isinf(value) else value
    assert line["values"] == [shared, [shared], [1.0, 2.0]]
    layers = read_record(logger.folder).layers
    assert str(layers["q"]) == str([(0, dict.fromkeys("abc", float(value)))])
    assert str(layers["one"]) == str([(0, {"a": float(value)})])


def test_zeros_of_both_signs_are_not_one_value(tmp_path: Path) -> None:
    logger = record_of(tmp_path, [{"q": {"a": 0.0, "b": -0.0}}])
    assert str(read_record(logger.folder).layers["q"]) == "[(0, {'a': 0.0, 'b': -0.0})]"


@settings(deadline=None, derandomize=True, max_examples=200)
@given(values=st.lists(st.floats() | st.floats(-1e-3, 1e-3), min_size=16, max_size=16))
def test_aggregates_come_back_with_all_digits(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    metrics = {f"q{k}": value for k, value in enumerate(values)}
    logger = with_metrics(tmp_path_factory.getbasetemp() / "digits", [metrics])
    found = read_record(logger.folder).metrics
    assert str({key: found[key][-1][1] for key in metrics}) == str(metrics)


def test_numbers_are_written_in_few_characters(tmp_path: Path) -> None:
    values = {"a": 1.25e-7, "b": -0.000123, "c": 10.000123, "d": 0.00125, "e": 1e22, "f": -2.5e-12}
    logger = record_of(tmp_path, [{"q": values}])
    (text,) = (text for text in logger.path.read_text().splitlines() if '"column_values"' in text)
    assert text.endswith('"values": [[1.25e-7,-123e-6,10.000123,0.00125,1e+22,-2.5e-12]]}')
    assert read_record(logger.folder).layers["q"] == [(0, values)]


def test_names_are_written_once_for_the_same_columns(tmp_path: Path) -> None:
    one, other = {"q": {"a": 1.0, "b": 2.0}, "r": {"b": 3.0}}, {"q": {"a": 1.0}}
    logger = record_of(tmp_path, [one, one, other, one, other])
    kinds = [line["kind"] for line in lines(logger.path)]
    assert kinds.count("columns") == 2
    assert kinds.count("column_values") == 5
    assert [step for step, _ in read_record(logger.folder).layers["q"]] == [0, 1, 2, 3, 4]
    assert read_record(logger.folder).layers["r"] == [(step, {"b": 3.0}) for step in (0, 1, 3)]


def test_a_process_that_resumes_writes_the_names_again(tmp_path: Path) -> None:
    record_of(tmp_path, [{"q": {"a": 1.0}}])
    logger = RecordLogger(str(tmp_path), name="r", version="v")
    logger.log_layers({"q": {"a": 2.0}}, step=1)
    logger.finalize("success")
    assert [line["kind"] for line in lines(logger.path)].count("columns") == 2
    assert read_record(logger.folder).layers["q"] == [(0, {"a": 1.0}), (1, {"a": 2.0})]


def test_values_whose_names_are_lost_are_left_out_with_a_warning(tmp_path: Path) -> None:
    logger = record_of(tmp_path, [{"q": {"a": 1.0}}, {"q": {"a": 2.0}}])
    kept = [text for text in logger.path.read_text().splitlines() if json.loads(text)["kind"] != "columns"]
    logger.path.write_text("\n".join(kept) + "\n")
    with pytest.warns(
        MeasurementWarning, match="2 of 4 lines are left out .2 of kind column_values with wrong fields."
    ):
        assert read_record(logger.folder).layers == {}


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(as_line("layers", {"step": 7, "values": {"q": {"a": 1.25, "b": math.nan}}}) + "\n")
    ((step, values),) = read_record(tmp_path).layers["q"]
    assert (step, values["a"]) == (7, 1.25)
    assert math.isnan(values["b"])


def test_a_measured_point_of_a_large_network_is_small() -> None:
    """ResNet-101 has 105 weights and 39 quantities by layer: 103 kB a point when names were written each time."""
    columns = LayerColumns()
    generator = np.random.default_rng(0)
    layers = {
        f"norm_growth/q{k}": {f"layer3.{i}.conv2": float(generator.normal()) for i in range(105)} for k in range(39)
    }
    columns.lines(layers, 0)
    ((kind, line),) = columns.lines(layers, 1)
    assert kind == "column_values"
    assert len(line) < 60_000
    assert len(line) / (105 * 39) < 14


def test_layers_that_differ_at_every_step_take_no_memory() -> None:
    """A network whose layers are skipped at random has names of its own at every step."""
    columns, layers = LayerColumns(), [f"blocks.{i}" for i in range(100)]
    with tracing() as traced:
        for step in range(60):
            some = {layer: 1.0 for layer in layers if layer != f"blocks.{step}"}
            kinds = [kind for kind, _ in columns.lines({f"q{k}": some for k in range(20)}, step)]
            assert kinds == ["columns", "column_values"]
            traced.append(tracemalloc.get_traced_memory()[0])
    assert traced[-1] - traced[9] < 50_000, "twenty tuples of 99 names are 17 kB a step"


# Metrics


def with_metrics(folder: Path, steps: list[dict[str, float]]) -> RecordLogger:
    logger = RecordLogger(str(folder), name="r", version="v")
    for step, metrics in enumerate(steps):
        logger.log_metrics(metrics, step=step)
    logger.finalize("success")
    return logger


MANY = {f"group/quantity_{k}": k / 3 for k in range(40)}


def test_names_of_many_metrics_are_written_once(tmp_path: Path) -> None:
    other = {**MANY, "group/another": 5.0}
    logger = with_metrics(tmp_path, [MANY, {"loss": 0.5}, {key: -value for key, value in MANY.items()}, other])
    kinds = [line["kind"] for line in lines(logger.path)]
    assert kinds[1:-1] == ["keys", "key_values", "metrics", "key_values", "keys", "key_values"]
    metrics = read_record(logger.folder).metrics
    assert metrics["group/quantity_2"] == [(0, 2 / 3), (2, -2 / 3), (3, 2 / 3)], "all digits"
    assert metrics["group/another"] == [(3, 5.0)]
    assert metrics["loss"] == [(1, 0.5)]


def test_the_progress_of_a_run_that_logs_many_metrics_at_once_is_followed(tmp_path: Path) -> None:
    logger = with_metrics(tmp_path, [MANY])
    watch = RunProgress(logger.folder)
    watch.look()
    logger.log_metrics({**MANY, "epoch": 3.0, "val/accuracy": 0.5}, step=7)
    logger.log_metrics({**MANY, "epoch": 4.0, "val/accuracy": 0.75}, step=9)
    watch.look()
    assert (watch.epoch, watch.step, watch.accuracy) == (4, 9, 0.75)


def test_metrics_that_are_not_finite_come_back(tmp_path: Path) -> None:
    logger = with_metrics(tmp_path, [{**MANY, "a": math.nan, "b": -math.inf}])
    metrics = read_record(logger.folder).metrics
    assert math.isnan(metrics["a"][0][1])
    assert metrics["b"] == [(0, -math.inf)]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("keys", lambda line: {**line, "names": line["names"][1:]}),
        ("keys", lambda line: {**line, "keys": "others"}),
        ("key_values", lambda line: {**line, "values": line["values"][1:]}),
    ],
)
def test_metrics_whose_names_do_not_fit_are_left_out_with_a_warning(kind: str, change: Any, tmp_path: Path) -> None:
    logger = with_metrics(tmp_path, [MANY])
    changed = [change(line) if line["kind"] == kind else line for line in lines(logger.path)]
    logger.path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    with pytest.warns(MeasurementWarning, match="1 of 4 lines are left out .1 of kind key_values with wrong fields."):
        assert read_record(logger.folder).metrics == {}


def test_names_that_are_no_names_are_left_out_with_a_warning(tmp_path: Path) -> None:
    logger = with_metrics(tmp_path, [MANY])
    for names in (3, ["a", "a"], [1, 2]):
        changed = [{**line, "names": names} if line["kind"] == "keys" else line for line in lines(logger.path)]
        logger.path.write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.warns(MeasurementWarning, match="1 of kind keys with wrong fields, 1 of kind key_values"):
            assert read_record(logger.folder).metrics == {}
