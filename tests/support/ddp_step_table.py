"""Script of tests/probes/test_step_table.py: every optimizer of the table in two processes."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from support.processes import leave_group  # noqa: E402
from support.projects import Fingerprint, same  # noqa: E402
from support.step_table import CELLS_OF_TWO, LOOPS, assert_cosines, assert_explained, observe, train  # noqa: E402

DDP: dict[str, Any] = {"strategy": "ddp", "devices": 2}


def check(cell: tuple[str, str]) -> None:
    name, way = cell[0], LOOPS[cell[1]]
    bare = Fingerprint()
    train(name, way, bare, **DDP)
    rows, account, fingerprint = observe(name, way, **DDP)
    assert bare.states
    assert same(bare.states, fingerprint.states)
    assert_explained(rows, account, way.stepped, wide=False)
    assert_cosines(rows, account, way.stepped)
    if way.wide:
        rows, account, _ = observe(name, way, wide=True, **DDP)
        assert_explained(rows, account, way.stepped, wide=True)
        assert_cosines(rows, account, way.stepped)


def failure(cell: tuple[str, str]) -> str:
    """Return a description of the failure, or an empty string."""
    try:
        check(cell)
    except AssertionError:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    failures = {"-".join(cell): failure(cell) for cell in CELLS_OF_TWO}
    rank = torch.distributed.get_rank()
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(failures))
    leave_group()
