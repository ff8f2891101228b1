"""Evaluations of models that FSDP2 or FSDP divides over two processes, of uneven shares, and of a slow process.

Decisions are those of one process, sample by sample; no process waits forever, nor longer than collectives may take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.isolation import SUPPORT
from support.processes import reports_of

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 does not run on CPUs"
)
SCRIPT = SUPPORT / "sharded_robustness.py"
COUNT = 11
ALONE = ("even", "uneven", "undealt")
"""Scenarios that one process can run too."""
WAYS = [
    "parts",
    "never reshards",
    "two copies",
    "mesh of two dimensions",
    "mixed precision",
    "tied",
    "method",
    "attention",
]
FLAT_WAYS = [
    "layers",
    "one flat parameter",
    "without original parameters",
    "only gradients",
    "not sharded",
    "mixed precision",
    "parts",
]


def reports(folder: Path, devices: int, *scenarios: str, shards: str = "fully_shard") -> list[Any]:
    place = folder / f"{shards}{devices}"
    place.mkdir()
    return reports_of(SCRIPT, place, str(devices), shards, *scenarios, ranks=devices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    return reports(folder, 2, *ALONE, "training")


@pytest.fixture(scope="module")
def more(folder: Path) -> list[Any]:
    (folder / "more").mkdir()
    return reports(folder / "more", 2, "slow", "stepping_aside", "every_way")


@pytest.fixture(scope="module")
def flat(folder: Path) -> list[Any]:
    return reports(folder, 2, *ALONE, "training", "stepping_aside", "every_flat_way", shards="flat")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    return reports(folder, 1, *ALONE)[0]


def test_decisions_of_a_sharded_model_are_those_of_one_process(two: list[Any], alone: Any) -> None:
    """The test step of the project calls the model too, in which all processes take part."""
    assert alone["even"]["final"]["not evaluated"] == alone["even"]["any"]["not evaluated"] == {}
    for found in two:
        assert found["even"] == alone["even"]
    for rows in alone["even"].values():
        assert len(rows["clean"]) == COUNT
        assert len({str(rows[attack]) for attack in ("clean", "gaussian", "bim")}) == 3, "attacks change predictions"


@pytest.mark.parametrize("name", ["strong", "weak", "channels", "ddp"])
def test_processes_may_have_different_numbers_of_batches(two: list[Any], alone: Any, name: str) -> None:
    for found in two:
        assert found["uneven"][name] == alone["uneven"][name]


@pytest.mark.parametrize("name", ["all", "others", "limited"])
def test_samples_that_every_process_gets_are_divided(two: list[Any], alone: Any, name: str) -> None:
    """Also where data sets differ behind equal first batches, which no process knows before the end."""
    for found in two:
        assert found["undealt"][name] == alone["undealt"][name]
        assert len(found["undealt"][name]["bim"]) == (6 if name == "limited" else COUNT)
    if name == "all":
        passes, both = (report["undealt"]["all: passes"] for report in (alone, two[0]))
        assert sum(report["undealt"]["all: passes"] for report in two) < 1.6 * passes, "checks are made on each process"
        assert both < passes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "ddp"])
def test_a_process_may_take_longer_than_collectives_wait(more: list[Any], name: str) -> None:
    for found in more:
        assert found["slow"][name]["not evaluated"] == {}
        assert len(found["slow"][name]["bim"]) == COUNT


@pytest.mark.slow
def test_what_fails_on_one_process_is_known_to_all(more: list[Any]) -> None:
    for found in more:
        aside = found["stepping_aside"]
        assert aside["one fails"]["not evaluated"] == {"all attacks": "OSError: the disk of one process"}
        (reason,) = aside["one has no memory"]["not evaluated"].values()
        assert reason.startswith("Each process needs the weights of the whole model, 0.0 GiB, and there is no memory")
        assert "Save a checkpoint and test it on one device" in reason
        assert aside["channels"] == reason


@pytest.mark.slow
def test_a_process_without_samples_takes_part(more: list[Any]) -> None:
    """Also with several evaluations in one Trainer, whose exchanges have one order on all processes."""
    for report in more:
        found = report["stepping_aside"]
        for of in ("", "second, ", "ddp, ", "second of ddp, "):
            name = f"{of}one has no sample"
            assert found[name]["not evaluated"] == {}
            assert len(found[name]["bim"]) == COUNT
        assert set(found["channels, one has no sample"]) == {COUNT}


@pytest.mark.slow
def test_tensor_parallelism_is_refused(more: list[Any]) -> None:
    for found in more:
        (reason,) = found["stepping_aside"]["tensor parallel"]["not evaluated"].values()
        assert reason.startswith("net.8.weight is divided by tensor parallelism")


def test_training_goes_on_as_without_an_evaluation(two: list[Any]) -> None:
    for found in two:
        assert found["training"] == {"same": True, "steps": 4, "not evaluated": {}, "n": COUNT}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_whole_weights_need_no_other_process_and_leave_no_trace(more: list[Any], way: str) -> None:
    for found in more:
        check(found["every_way"][way])
        assert list(found["every_way"]) == WAYS


@pytest.mark.slow
def test_compiled_models_run_without_other_processes(tmp_path: Path) -> None:
    for found in reports(tmp_path, 2, "compiled"):
        assert list(found["compiled"]) == ["compiled in part", "compiled"]
        for way in found["compiled"].values():
            check(way)


@pytest.mark.slow
def test_decisions_under_fsdp_are_those_of_one_process(flat: list[Any], alone: Any) -> None:
    """Weights are in flat parameters of FullyShardedDataParallel."""
    passes = alone["undealt"]["all: passes"]
    for found in flat:
        for scenario in ALONE:
            for name, expected in alone[scenario].items():
                if "passes" not in name:
                    assert found[scenario][name] == expected, (scenario, name)
        assert found["undealt"]["all: passes"] < passes
        assert found["training"] == {"same": True, "steps": 2, "not evaluated": {}, "n": COUNT}


@pytest.mark.slow
def test_what_fails_under_fsdp_is_known_to_all(flat: list[Any]) -> None:
    for found in flat:
        aside = found["stepping_aside"]
        assert aside["one fails"]["not evaluated"] == {"all attacks": "OSError: the disk of one process"}
        assert aside["one has no sample"]["not evaluated"] == {}
        assert len(aside["one has no sample"]["bim"]) == COUNT
        (reason,) = aside["one has no memory"]["not evaluated"].values()
        assert reason.startswith("Each process needs the weights of the whole model")
        assert aside["channels"] == reason


@pytest.mark.slow
@pytest.mark.parametrize("way", FLAT_WAYS)
def test_whole_flat_weights_need_no_other_process_and_leave_no_trace(flat: list[Any], way: str) -> None:
    for found in flat:
        assert list(found["every_flat_way"]) == FLAT_WAYS
        assert found["every_flat_way"][way] == {
            "unchanged": True,
            "weights": True,
            "requires_grad": True,
            "logits": True,
            "collectives": 0,
            "kinds": True,
        }


def check(found: dict[str, Any]) -> None:
    assert found == {
        "unchanged": True,
        "weights": True,
        "requires_grad": True,
        "logits": [True, True],
        "collectives": 0,
        "kinds": True,
        "objects": True,
    }
