"""The page of BatchGeometryMonitor shows the numbers of its record, and they obey what they must obey."""

from __future__ import annotations

import json

import pytest

from support.pages import DOCS
from support.scripts import load_script

RUNS = json.loads((DOCS / "records" / "batch_geometry.json").read_text(encoding="utf-8"))
PAGE = (DOCS / "callbacks" / "batch_geometry.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_record() -> None:
    assert load_script("docs/batch_geometry.py").with_table(PAGE, RUNS) == PAGE


@pytest.mark.parametrize("batch", RUNS)
def test_ranks_are_at_their_bounds(batch: str) -> None:
    """Layers 1 to 4 have 8², 4², 2² and 1 output positions."""
    for layer, (_, last) in RUNS[batch]["layers"]["rank"].items():
        if last is not None and "layer" in layer:
            block = int(layer.partition("layer")[2][0])
            n = last / RUNS[batch]["layers"]["rank_over_inputs"][layer][1]
            assert last == pytest.approx(min(n, int(batch) * 4 ** (4 - block) - 1), rel=1e-3), layer
