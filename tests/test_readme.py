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
    block = "".join(code for language, code in BLOCKS if language == "text")
    titles = re.findall(r"^\S+(?: applicable)?  +(\S.*?)  ", block, re.MULTILINE)
    assert len(titles) > 5
    assert [title for title in titles if title not in printed] == ["Long weights as cause"]  # asked for by rescale=10


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
    verdicts = recorded()[name]["verdicts"]
    lines = [" ".join(line.split()) for line in block.splitlines()]
    assert lines == [f"{one['word']} {title} {one['phrase']}" for title, one in verdicts.items()]


def test_its_numbers_are_those_of_the_study() -> None:
    runs = recorded()
    found = {name: run["verdicts"] for name, run in runs.items()}
    law, eq16, gamma = "Lemma 3: W ⟂ ∇W", "Eq 16: Δ‖W‖² = η²‖∇W‖²", "γ² → σ² (Fig 2)"

    def values(title: str) -> list[float]:
        return [abs(one[title]["value"]) for one in found.values() if one.get(title, {}).get("value") is not None]

    def told(title: str, pattern: str) -> list[str]:
        """Return the first group of a pattern in the details of a verdict, one for each run that has it."""
        matches = (re.search(pattern, one[title]["detail"]) for one in found.values() if title in one)
        return [match[1] for match in matches if match]

    text = " ".join(README.split())
    control = max(map(float, told(law, r"(\S+) in other weights")))
    ratios = sorted(map(float, told(eq16, r"(\S+) × the measured")))
    without, decayed = told(gamma, r"γ²/σ² (.+?);")
    explained = min(one["Increments explained"]["value"] for name, one in found.items() if not name.endswith("=0.0"))
    causes = [one["Long weights as cause"]["word"] for one in found.values()]
    counts = [runs[f"norm={norm},weight_decay=0.0"]["accuracies"]["bim_eps0.03137"][0] for norm in ("bn", "wn")]
    for said in (
        f"is at most {max(values(law)):.1e}; other weights reach {control:.1e}",
        f"η²‖∇W‖² is {ratios[0]:.5f} to {ratios[-1]:.5f} times",
        f"at least {100 * explained:.6f} %",
        f"goes {without} without, and {decayed} with weight decay",
        f"{causes.count('refuted')} of {len(causes)} runs",
        f"by more than {100 * max(values('Long weights as cause')):.2f} points",
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
