"""SphereProjection in two real processes: replicas stay equal, and shards give the results of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.isolation import SUPPORT
from support.processes import reports_of
from support.projected_training import SHARDED, sharded


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("projected")
    return reports_of(SUPPORT / "projected_training.py", folder)


def test_replicas_hold_their_radii_and_stay_equal(two: list[dict[str, Any]]) -> None:
    first, second = (report["replicated"] for report in two)
    assert first == second
    assert np.abs(np.array(first["ratios"]) - 1).max() < 2e-7


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 does not run on CPUs")
@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_projected_as_the_whole(two: list[dict[str, Any]], name: str) -> None:
    if name == "retract batch norms":  # each process normalizes with its own batch: only the norms are those of one
        found = np.array(two[0][name]["0.weight"]).reshape(6, -1), np.array(two[0][name]["3.weight"]).reshape(5, -1)
        torch.manual_seed(0)
        start = SHARDED[name][0]().double()
        for values, layer in zip(found, (start[0], start[3]), strict=True):
            expected = layer.weight.detach().flatten(1).norm(dim=1).numpy()
            np.testing.assert_allclose(np.linalg.norm(values, axis=1), expected, rtol=1e-13)
        return
    alone = sharded(1, name)
    for report in two:
        assert report[name].keys() == alone.keys()
        for key, values in alone.items():
            np.testing.assert_allclose(report[name][key], values, rtol=1e-9, atol=1e-10, err_msg=key)
