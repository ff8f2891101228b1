"""Each sample counts once under one, two and three processes, however a loader orders, repeats or shards samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.isolation import SUPPORT
from support.processes import reports_of

SCRIPT = SUPPORT / "ddp_robustness.py"
COUNT, DRAWN = 31, 27
"""Numbers of samples in the data set, and of distinct ones among 62 drawn with replacement from seed 3."""
COUNTS = {
    "distributed sampler": COUNT,
    "own batch sampler": COUNT - 1,  # with a sampler that may repeat, a copy cannot be told from a repetition
    "subset in random order": 20,
    "with replacement": DRAWN,
    "repeating sampler": COUNT - 1,
    "stream that shards itself": COUNT - 1,
    "stream that does not": COUNT - 1,
    "dictionary of loaders": COUNT,
    "uneven ends": COUNT,
    "shuffled": COUNT,
    "shuffled, not dealt": COUNT,
    "limited": 12,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[Any]]:
    reports = {}
    for devices in (1, 2, 3):
        (folder / str(devices)).mkdir()
        reports[devices] = reports_of(SCRIPT, folder / str(devices), str(devices), ranks=devices)
    return reports


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("way", COUNTS)
def test_each_sample_counts_once(found: dict[int, list[Any]], way: str, devices: int) -> None:
    for report in found[devices]:
        loaders = report[way]
        assert list(loaders) == (["/a", "/b"] if way == "dictionary of loaders" else [""])
        for attacks in loaders.values():
            for rows in attacks.values():
                assert len(rows) == COUNTS[way]
                assert len({sample for sample, _, _ in rows}) == COUNTS[way]


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("way", [way for way in COUNTS if way != "limited"])
def test_decisions_are_the_same_however_samples_are_divided(
    found: dict[int, list[Any]], way: str, devices: int
) -> None:
    (alone,) = found[1]
    assert all(report[way] == alone[way] for report in found[devices])
    assert any(rows != alone[way][loader]["clean"] for loader in alone[way] for rows in alone[way][loader].values())


def test_decisions_are_the_same_in_whatever_order(found: dict[int, list[Any]]) -> None:
    """Loaders over a data set that has one image twice, in order, shuffled, and sharded."""
    (alone,) = found[1]
    whole = alone["uneven ends"][""]
    for way in ("distributed sampler", "shuffled", "shuffled, not dealt"):
        assert alone[way][""] == whole
    once = {attack: {tuple(row) for row in rows} for attack, rows in whole.items()}
    for way in ("own batch sampler", "repeating sampler", "stream that does not"):
        for attack, rows in alone[way][""].items():
            assert {tuple(row) for row in rows} <= once[attack]


@pytest.mark.parametrize("devices", [2, 3])
def test_no_process_waits_for_one_that_has_no_batch(found: dict[int, list[Any]], devices: int) -> None:
    first, *others = found[devices]
    (reason,) = first["without a batch"]
    assert "allow_zero_length_dataloader_with_multiple_devices lets some be without a batch" in reason
    assert all(report["without a batch"] == [] for report in others), "Lightning has left their loops out"


def test_what_fails_on_one_process_after_fit_is_known_to_all(found: dict[int, list[Any]]) -> None:
    assert found[1][0]["after fit"] == []
    for devices in (2, 3):
        assert all(report["after fit"] == ["OSError: the disk of one process"] for report in found[devices])


def test_no_process_leaves_a_journal(found: dict[int, list[Any]], folder: Path) -> None:
    assert found
    assert not list(folder.rglob("robustness-*.jsonl"))
