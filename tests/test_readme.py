"""The README's Python code, commands, links and numbers match the package, and the key table what its code logs."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from support.projects import Project, images, sgd, trainer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as a reader would."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {
        "Trainer": lambda callbacks, logger: trainer(*callbacks, logger=logger),
        "model": Project(sgd()),
        "train_loader": images(),
        "test_loader": images(16),
    }
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "README.md", "exec"), scope)
    assert scope["record"].folder.is_relative_to("runs")
    printed = capsys.readouterr().out
    topics = re.findall(r"^(\S.*?)  ", "".join(code for language, code in BLOCKS if language == "text"), re.MULTILINE)
    assert len(topics) > 5
    assert [topic for topic in topics if topic not in printed] == ["Rescaled weights"]  # asked for by rescale=10


def test_the_test_command_is_the_one_ci_runs() -> None:
    commands = [line for language, code in BLOCKS if language == "bash" for line in code.strip().splitlines()]
    (suite,) = [line for line in commands if "pytest" in line]
    assert suite in (ROOT / ".ci" / "run").read_text().splitlines()
    (quick,) = [line for line in commands if line.endswith("normgeo fit --config quickstart")]
    assert '".[report]"' in quick


def test_named_files_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", README)
    assert len(targets) > 25
    for target in targets:
        if not target.startswith(("http", "../../actions/")):  # the repository's own page has the actions
            assert (ROOT / target).exists(), target
    for text in re.findall(r"configs/[\w/+]+\.yaml", README):
        assert yaml.safe_load((ROOT / text).read_text())


def test_it_is_short() -> None:
    assert len(README.split()) <= 800


def recorded() -> dict[str, Any]:
    """Return the runs of the study whose results the README tells, by folder."""
    return json.loads((ROOT / "docs" / "records" / "paper_small.json").read_text())


def test_the_summary_it_shows_is_that_of_the_run() -> None:
    name, block = re.search(r"<!-- summary: (\S+) -->\n```text\n(.*?)```", README, re.DOTALL).groups()
    shown = " ".join(block.split())
    for topic, finding in recorded()[name]["findings"].items():
        if topic in shown:
            assert f"{topic} {finding['number']} {finding['quantity']}" in shown
        else:
            assert topic == "Norm growth"  # the others say more
    details = {finding["detail"] for finding in recorded()[name]["findings"].values()}
    lines = [line.strip() for line in block.splitlines() if line.startswith(" ")]
    assert lines
    assert set(lines) <= details


def test_its_numbers_are_those_of_the_study() -> None:
    runs = recorded()
    found = {name: run["findings"] for name, run in runs.items()}

    def values(topic: str, *, decay: bool | None = None, norm: str = "") -> list[float]:
        chosen = [name for name in found if norm in name and decay in (None, not name.endswith("=0.0"))]
        return [found[name][topic]["value"] for name in chosen if topic in found[name]]

    text = " ".join(README.split())
    controls = [float(re.search(r"(\S+) in other weights", run["W ⟂ ∇W"]["detail"])[1]) for run in found.values()]
    law = f"is at most {max(values('W ⟂ ∇W')):.1e}; other weights reach {max(controls):.1e}"
    eq16 = values("Eq 16", decay=False)
    gammas = [values("γ against σ", decay=decay)[0] for decay in (False, True)]
    rescaled = max(values("Rescaled weights"))
    counts = [runs[f"norm={norm},weight_decay=0.0"]["accuracies"]["bim_eps0.03137"][0] for norm in ("bn", "wn")]
    for said in (
        law,
        f"η²‖∇W‖² is {min(eq16):.5f} to {max(eq16):.5f} times",
        f"at least {100 * min(values('Increments explained', decay=True)):.6f} %",
        f"is {gammas[0]:.2f} without and {gammas[1]:.2f} with weight decay, and 2.51 at the start",
        f"by more than {rescaled:.2f} points",
        f"{counts[0]} of 359 digits stay right with batch normalization, and {counts[1]} with weight normalization",
    ):
        assert said in text, said
    assert len(runs) == 8


def test_the_picture_is_drawn_from_the_study() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "overview.py"))
    for theme, path in script["PICTURES"].items():
        with Image.open(path) as picture:
            assert picture.size[0] == pytest.approx(1.5 * script["WIDTH"], rel=0.03)
            assert picture.size[1] == pytest.approx(1.5 * script["HEIGHT"], rel=0.03)
        panels = script["picture"](recorded(), theme).to_dict()["hconcat"]
        assert len(panels) == 4
