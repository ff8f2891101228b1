"""Numbers of runs and benchmarks that several pages give are those of one record."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision

from support.isolation import REPOSITORY
from support.pages import DOCS, PAGES, blocks, named, without_code

QUICKSTART = (DOCS / "records" / "quickstart.txt").read_text(encoding="utf-8")
COST = (DOCS / "reference" / "cost.md").read_text(encoding="utf-8")
PLACES = [REPOSITORY / "README.md", DOCS / "index.md", DOCS / "faq.md"]
"""Pages that give costs beside the page of costs."""


def in_one_line(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split())


def cost(row: str, column: int) -> float:
    """Return a number from the first row of that name in the tables of the costs."""
    line = next(line for line in COST.splitlines() if line.startswith(f"| {row} |"))
    return float(line.split("|")[column].strip().removesuffix(" %"))


def test_the_quick_start_shows_the_summary_of_its_run() -> None:
    _, verdicts, geometry, robustness = (block.code for block in blocks(DOCS / "start" / "quickstart.md", "text"))
    shown = "\n".join([verdicts.partition("\n")[2], geometry, robustness])
    assert shown.split("\n") == QUICKSTART.split("\n")


def test_the_quick_start_reads_its_summary_correctly() -> None:
    text = in_one_line(DOCS / "start" / "quickstart.md")
    first, last = re.search(r"of the other weights +(\S+) +(\S+)", QUICKSTART).groups()
    (removed,) = re.findall(r"epsilon part removed +\S+ +(\S+)", QUICKSTART)
    (share,) = re.findall(r"Fig 2\) +end/start (\S+):", QUICKSTART)[:1]
    (drop,) = re.findall(r" bim .* (\S+) pt", QUICKSTART)
    rounded = f"{float(removed):.0e}".replace("e-0", "e-")
    assert f"have cosines of {float(first):.1f} to {float(last):.1f}" in text
    (raw,) = re.findall(r"largest \|cos\|, scale-invariant +\S+ +(\S+)", QUICKSTART)
    assert f"adds: up to {float(raw):.0e}".replace("e-0", "e-") in text
    assert f"the largest value is {rounded}" in text
    (most,) = re.findall(r"max \|cos\| (\S+) \(limit", QUICKSTART)
    assert f"{most.replace('e-0', 'e-')} in all of them" in text
    rounded = f"{float(most):.0e}".replace("e-0", "e-")
    assert f"(at most {rounded} in the quick start)" in in_one_line(DOCS / "callbacks" / "orthogonality.md")
    assert f"ends at {share} of its start" in text
    assert f"removes {float(drop):.0f} percentage points" in text


@pytest.mark.parametrize("page", PLACES, ids=named)
def test_costs_are_those_of_the_benchmark(page: Path) -> None:
    text = in_one_line(page)
    assert f"{cost('three monitors', 3):.0f} µs" in text
    assert f"{cost('all three monitors, per filter', 5):.2f} % of the training time" in text
    if page.name != "README.md":
        assert f"{cost('all three monitors, per filter', 4):.0f} % of a training step" in text


def test_costs_of_sums_and_without_numba_are_those_of_the_benchmark() -> None:
    rows = [[cell.strip(" %") for cell in line.split("|")] for line in COST.splitlines() if line.startswith("| ")]
    sums = sorted(float(row[4]) for row in rows if row[1].startswith("the same, cumulative"))
    assert f"adds {sums[0]:.0f} to {sums[-1]:.0f} % to every step" in in_one_line(DOCS / "faq.md")
    floors = {row[1]: float(row[3]) for row in rows if row[1].startswith(("SGD with momentum", "AdamW"))}
    factors = sorted(floors[f"{name}, without numba"] / floors[name] for name in ("SGD with momentum", "AdamW"))
    for page in (DOCS / "faq.md", DOCS / "callbacks" / "index.md"):
        assert f"{factors[0]:.0f} to {factors[-1]:.0f} times as long" in in_one_line(page)


def test_the_number_of_filters_is_that_of_the_network() -> None:
    with torch.device("meta"):
        network = torchvision.models.resnet101()
    filters = sum(one.out_channels for one in network.modules() if isinstance(one, torch.nn.Conv2d))
    assert f"each of {filters:,} filters" in " ".join(COST.split())


def test_no_other_page_has_costs() -> None:
    places = [*PLACES, *(DOCS / "reference" / name for name in ("cost.md", "gpu.md", "attacks.md"))]
    for page in PAGES:
        assert page in places or not re.search(r"\d+ µs|% of (the|a) training", without_code(page)), page
