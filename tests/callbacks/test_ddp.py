"""DDP with two real gloo processes: every rank can monitor the same numbers, samples are counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo import read_record
from support.isolation import SUPPORT
from support.processes import reports_of

SCRIPT = SUPPORT / "ddp_training.py"


def run(folder: Path, devices: int) -> list[dict[str, Any]]:
    folder.mkdir()
    return reports_of(SCRIPT, folder, str(devices), ranks=devices, timeout=300)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ddp") / "two"
    return folder, run(folder, 2)


def test_every_rank_can_watch_the_same_numbers(two: Any) -> None:
    _, (first, second) = two
    keys = {"norm_growth/weight_norm", "orthogonality/max_abs_cos", "symmetry/max_charge"}
    assert first["watched"].keys() == second["watched"].keys() >= keys
    for key in first["watched"]:
        if key.startswith(("norm_growth", "orthogonality", "symmetry")):
            assert first["watched"][key] == second["watched"][key], key
    own = ("affine", "batch_geometry")
    assert not [key for key in first["watched"] if key.startswith(own)], "each rank has a batch of its own"
    assert first["weights"] == second["weights"]


def test_increments_are_explained_and_only_one_rank_records(two: Any) -> None:
    folder, _ = two
    metrics = read_metrics(folder)
    residual, floor = metrics["norm_growth/residual"], metrics["norm_growth/storage_floor"]
    assert [step for step, _ in residual] == [0, 1, 2, 3]
    assert all(abs(value) <= bound for (_, value), (_, bound) in zip(residual, floor, strict=True))
    assert metrics["orthogonality/max_abs_cos"][-1][1] < 1e-3
    assert metrics["symmetry/max_charge"][-1][1] < 1e-3
    assert {"affine/abs_beta_minus_mu_mean", "batch_geometry/rank"} <= metrics.keys()
    vectors = 4 * 8 * 8  # of the four images of rank zero
    assert metrics["batch_geometry/samples_over_inputs/net.0"] == [(step, vectors / 27) for step in range(4)]


def test_increments_of_all_steps_add_up(two: Any) -> None:
    folder, _ = two
    metrics = {key: [value for _, value in points] for key, points in read_metrics(folder).items()}
    for group in ("norm_growth", "norm_growth_control"):
        for key in ("increment", "predicted", "explained"):
            total = metrics[f"{group}/cumulative_{key}"][-1]
            assert total == pytest.approx(sum(metrics[f"{group}/{key}"]), rel=1e-9)
        residual, floor = (metrics[f"{group}/cumulative_{key}"][-1] for key in ("residual", "storage_floor"))
        assert abs(residual) <= floor


def test_one_rank_measures_effective_weights_for_all(two: Any) -> None:
    folder, (first, second) = two
    measured, again = first["effective"]
    assert measured == again
    assert second["effective"][0] is None
    for name, value in measured.items():
        key = f"effective/{name}"
        assert read_metrics(folder)[key][-1][1] == value
        assert first["watched"][key] == second["watched"][key] == pytest.approx(value, rel=1e-6)


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return read_record(folder / "normgeo" / "run").metrics


def test_padding_duplicates_are_not_counted(two: Any, tmp_path: Path) -> None:
    _, (first, second) = two
    (alone,) = run(tmp_path / "one", 1)
    assert first["counts"] == second["counts"]
    everything = dict.fromkeys(("clean", "gaussian", "bim", "any"), 1003)
    expected = {**everything, "one": 1, "undealt": 23, "after_fit": 21}
    assert {name: n for name, (_, n) in first["counts"].items()} == expected
    assert alone["counts"].keys() == first["counts"].keys()
