"""Runs of a report: their selection, the settings in which they differ, and the points of their curves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo import RecordLogger, read_record
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.compared_runs import compare_runs, load_runs
from lightning_normgeo.report.figures.curves import ALL, Curves, last_by_layer, layer_curve
from lightning_normgeo.report.run_settings import MISSING, flat
from lightning_normgeo.runs.records.record import Record


def record(name: str = "one", **settings: Any) -> Record:
    """Return a record with the settings of a run of ``normgeo fit``."""
    values = {"run": f"runs/s/{name}", "trainer": {"logger": [{"init_args": {"version": name}}]}, **settings}
    values["test_after_fit"] = True  # a key that no other project's configuration has
    return Record(Path("runs") / "s" / name, settings={"config": values})


def config(norm: str, decay: float, seed: int = 0) -> dict[str, Any]:
    """Return settings with a normalization, weight decay and seed."""
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "weight_decay": decay}}
    return {"seed_everything": seed, "model": {"norm": norm, "optimizer": optimizer}, "optimizer": optimizer}


def test_a_run_of_its_own_differs_in_nothing() -> None:
    (run,) = compare_runs([record(**config("bn", 0.0))])
    assert (run.panel, run.series, run.repeat, run.differing) == ("", "", "", {})
    assert (run.name, run.group) == ("one", "one")
    assert run.settings["optimizer.init_args.lr"] == "0.1"


def test_panels_are_normalizations_and_colors_are_what_else_differs() -> None:
    grid = [(norm, decay, seed) for norm in ("bn", "gn") for decay in (0.0, 0.0005) for seed in (0, 1)]
    runs = compare_runs([record(str(i), **config(*options)) for i, options in enumerate(grid)])
    assert [(run.panel, run.series, run.repeat) for run in runs] == [
        (norm, "weight decay 0.0005" if decay else "no weight decay", f"seed {seed}") for norm, decay, seed in grid
    ]
    assert runs[3].name == "bn, weight decay 0.0005, seed 1"
    assert runs[2].group == runs[3].group == "bn, weight decay 0.0005"
    assert list(runs[0].differing) == ["seed_everything", "model.norm", "optimizer.init_args.weight_decay"]


def test_without_several_normalizations_there_is_one_panel() -> None:
    runs = compare_runs([record(name, **config("bn", 0.0), width=width) for name, width in (("a", 8), ("b", None))])
    assert [(run.panel, run.series) for run in runs] == [("", "width 8"), ("", f"width {MISSING}")]


def test_what_every_run_has_of_its_own_is_no_difference() -> None:
    runs = compare_runs([record(name, **config("bn", 0.0), ckpt_path=name) for name in ("a", "b")])
    assert [run.differing for run in runs] == [{}, {}]
    assert [run.name for run in runs] == ["a", "b"], "equal runs are told apart by their folders"
    assert runs[0].group == runs[1].group


def test_settings_of_other_projects() -> None:
    runs = compare_runs([Record(Path(name), settings={"lr": lr}) for name, lr in (("a", 0.1), ("b", 0.2))])
    assert [run.series for run in runs] == ["lr 0.1", "lr 0.2"]


def test_settings_become_flat() -> None:
    nested = {"a": {"b": 1, "c": None}, "d": [{"e": "x"}, {"e": [1, 2]}], "f": True}
    assert flat(nested) == {"a.b": "1", "d.0.e": "x", "d.1.e": "[1, 2]", "f": "true"}


def logged(folder: str, version: str, **metrics: float) -> Path:
    """Write a small record and return its folder."""
    logger = RecordLogger(folder, version=version)
    logger.log_metrics(metrics or {"a": 1.0}, step=0)
    logger.finalize("success")
    return logger.folder


def test_runs_come_from_folders_records_and_studies_once_each() -> None:
    one, other = logged("out", "one"), logged("out", "other")
    index = one.parent / "study.json"
    index.write_text(json.dumps({"runs": [{"name": "one"}, {"name": "other"}, {"name": "not begun"}]}))
    for sources in ([one, other], [one / "record.jsonl", other], [index], [index.parent], [index.parent, one, other]):
        assert [run.record.folder.name for run in load_runs(sources)] == ["one", "other"]


@pytest.mark.parametrize("content", ["{", '{"runs": 3}', '{"runs": [{}]}', "[]"])
def test_an_index_that_is_none(content: str) -> None:
    Path("study.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"study\.json is not the index of a study"):
        load_runs(["study.json"])


def test_a_study_that_has_not_begun() -> None:
    Path("study.json").write_text('{"runs": [{"name": "a"}]}')
    with pytest.raises(ConfigurationError, match=r"No run of study\.json has begun"):
        load_runs(["study.json"])


def test_no_runs() -> None:
    with pytest.raises(ConfigurationError, match="There is no run to report"):
        load_runs([])


@pytest.mark.parametrize("source", ["missing", "/missing/run", "a/b/c/d"])
def test_a_run_that_does_not_exist(source: str) -> None:
    with pytest.raises(ConfigurationError, match=r"does not exist(; / has .*)?\. Give the folder of a run"):
        load_runs([source])


def test_a_truncated_record_gives_what_it_has() -> None:
    folder = logged("out", "one")
    path = folder / "record.jsonl"
    path.write_text(path.read_text()[:-40])
    (run,) = load_runs([folder])
    assert not run.record.complete
    assert run.record.metrics == {"a": [(0, 1.0)]}


def curve(count: int) -> Record:
    return Record(Path("one"), metrics={"norm_growth/weight_norm": [(3 * i, i / 7) for i in range(count)]})


@given(st.integers(1, 3000), st.integers(1, 60))
def test_thinned_curves_keep_their_ends_and_stay_small(count: int, runs: int) -> None:
    (first, *_) = rows = Curves(compare_runs([curve(count)] * runs)).of({"norm_growth/weight_norm": "‖W‖"})
    assert len(rows) == runs
    steps = first["step"]
    assert (steps[0], steps[-1]) == (0, 3 * (count - 1))
    assert steps == sorted(set(steps))
    assert len(steps) <= 152
    assert len(steps) == count or len(steps) >= 24
    assert first["value"] == [float(f"{step / 3 / 7:.5g}") for step in steps]


def test_thinned_curves_keep_their_extremes() -> None:
    values = [1.0] * 5000
    values[1234], values[4321] = -9.0, 1e-6
    record = Record(Path("one"), metrics={"norm_growth/residual": list(enumerate(values))})
    (row,) = Curves(compare_runs([record])).of({"norm_growth/residual": "residual"})
    assert {(1234, -9.0), (4321, 1e-6)} <= set(zip(row["step"], row["value"], strict=True))
    assert len(row["step"]) == 152


def test_layers_take_no_points_from_the_curve_over_all_of_them() -> None:
    layers = {"q": [(step, dict.fromkeys(map(str, range(9)), 1.0)) for step in range(500)]}
    known = {"norm_growth/weight_norm": layers["q"], **layers}
    record = Record(Path("one"), metrics={"q": [(step, 1.0) for step in range(500)]}, layers=known)
    lengths = {row["layer"]: len(row["step"]) for row in Curves(compare_runs([record] * 8)).of({"q": "q"})}
    assert lengths.pop(ALL) == 150
    assert set(lengths.values()) == {34}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["x/one/bn", "x/two/bn"], ["one/bn", "two/bn"]),
        (["x/one/bn", "x/one/gn", "y/one/gn"], ["bn", "x/one/gn", "y/one/gn"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_runs_with_everything_in_common_are_told_apart_by_their_folders(folders: list[str], names: list[str]) -> None:
    runs = compare_runs([Record(Path(folder), settings={"config": config("bn", 0.0)}) for folder in folders])
    assert [run.name for run in runs] == names


def test_runs_that_differ_in_many_settings_are_named_by_their_folders() -> None:
    few = compare_runs([Record(Path(f"x/run{k}"), settings={"a": k}) for k in range(3)])
    assert [run.name for run in few] == ["a 0", "a 1", "a 2"]
    bits = [{name: (k >> i) & 1 for i, name in enumerate("abcde")} for k in range(32)]
    many = compare_runs([Record(Path(f"x/run{k}"), settings=one) for k, one in enumerate(bits)])
    assert [run.name for run in many] == [f"run{k}" for k in range(32)]
    assert all(run.differing.keys() == set("abcde") for run in many)


@pytest.mark.parametrize(("status", "complete"), [("success", True), ("failed", False), ("aborted", True)])
def test_a_run_that_an_error_or_a_signal_ended_is_not_complete(status: str, complete: bool) -> None:
    logger = RecordLogger("out", version="one")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize(status)
    assert read_record(logger.folder).complete is complete


def test_a_layer_has_its_curve_from_the_record_or_from_its_key() -> None:
    layers = {"q": [(0, {"conv1": 1.0, "fc": 2.0}), (5, {"conv1": 3.0})]}
    keyed = {"q/conv1": [(0, 1.0), (5, 3.0)], "q/fc": [(0, 2.0)], "q": [(0, 9.0)]}
    for one in (Record(Path("a"), layers=layers), Record(Path("a"), metrics=keyed)):
        (run,) = compare_runs([one])
        assert layer_curve(run, "q", "conv1") == [(0, 1.0), (5, 3.0)]
        assert layer_curve(run, "q", "fc") == [(0, 2.0)]
        assert layer_curve(run, "q", "none") == []
    (run,) = compare_runs([Record(Path("a"), metrics=keyed)])
    assert last_by_layer(run, "q") == {"conv1": 3.0, "fc": 2.0}


def deep(layers: int) -> Record:
    names = [f"layer{i:03d}" for i in range(layers)]
    values = dict.fromkeys(names, 1.0)
    metrics = {f"norm_growth/weight_norm/{name}": [(0, 1.0)] for name in names[:2]}
    return Record(Path("a"), metrics=metrics, layers={"norm_growth/weight_norm": [(0, values)]})


def test_all_layers_of_one_run_can_be_chosen_and_of_many_those_with_keys_and_some_between_the_ends() -> None:
    assert len(Curves(compare_runs([deep(104)])).layers) == 104
    layers = Curves(compare_runs([deep(104)] * 16)).layers
    assert layers[:2] == ["layer000", "layer001"]
    assert layers == sorted(layers)
    assert 15 <= len(layers) <= 17
    assert max(int(b[-3:]) - int(a[-3:]) for a, b in itertools.pairwise(layers)) <= 7


def test_layers_are_paired_also_where_their_names_had_to_be_made_safe_to_show() -> None:
    name, safe = "a\u202e.conv", "a\\u202e.conv"
    record = Record(
        Path("run"),
        layers={"norm_growth/weight_norm": [(0, {name: 1.0})]},
        observations=[{"normalizations": {name: "a.bn"}}],
    )
    assert list(Curves(compare_runs([record])).titles.values()) == [f"{safe} + a.bn"]


def test_a_layer_and_the_batch_normalization_behind_it_are_one_choice() -> None:
    record = Record(
        Path("run"),
        layers={
            "norm_growth/weight_norm": [(0, {"a.conv": 1.0, "a.other": 2.0, "head": 3.0})],
            "affine/abs_gamma2_minus_sigma2_mean": [(0, {"a.bn": 4.0, "free.bn": 5.0})],
        },
        observations=[{"normalizations": {"a.conv": "a.bn", "a.other": "b.bn"}}],
    )
    curves = Curves(compare_runs([record]))
    assert list(curves.titles.values()) == ["a.conv + bn", "a.other + b.bn", "head", "free.bn"]
    rows = curves.of({"norm_growth/weight_norm": "‖W‖", "affine/abs_gamma2_minus_sigma2_mean": "gap"})
    found = {(row["layer"], row["quantity"]): row["value"] for row in rows}
    assert found[("a.conv + bn", "‖W‖")] == [1.0]
    assert found[("a.conv + bn", "gap")] == [4.0]
    assert found[("free.bn", "gap")] == [5.0]
    assert Curves(compare_runs([record]), ["*.bn"]).layers == ["a.conv", "a.other", "free.bn"]


def test_layers_can_be_asked_for() -> None:
    curves = Curves(compare_runs([deep(104)]), ["*05?", "layer003"])
    assert curves.layers == ["layer003", *(f"layer{i:03d}" for i in range(50, 60))]
    rows = curves.of({"norm_growth/weight_norm": "‖W‖"})
    assert [row["layer"] for row in rows] == curves.layers
    assert ALL not in curves.layers
