"""W&B projects of other owners: downloaded files stay inside the chosen folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo.report.wandb.downloaded_records import _decisions, _download, _named, _names, _safe, _stays

LEADING_OUT = [
    "../x.npz",
    "a/../../x.npz",
    "/tmp/x.npz",
    "..",
    "C:\\x.npz",
    "c:/x.npz",
    "..\\x.npz",
    "\\\\host\\x",
    "a\0",
]


@dataclass
class File:
    """A file that a run at W&B claims to have."""

    name: str
    size: int = 3
    ref: str | None = None

    @property
    def path(self) -> str:
        return self.name

    def download(self, root: str, replace: bool = True) -> Any:
        path = Path(root) / self.name
        assert path.resolve().is_relative_to(Path(root).resolve()), "left the folder"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"abc")
        return path.open() if replace is True and self.ref is None and not self.name.endswith(".npz") else str(path)


@dataclass
class Project:
    """A run with any content that its owner chooses."""

    given: Sequence[File]
    id: str = "run"
    name: str = "run"
    config: dict[str, Any] = field(default_factory=dict)

    def files(self, names: list[str]) -> Sequence[File]:
        return self.given  # other files than requested

    def logged_artifacts(self) -> list[Any]:
        entries = {file.name: file for file in self.given}
        artifact = SimpleNamespace(name="run-robustness:v0", type="evaluation", version="v0", get_entry=entries.get)
        artifact.manifest = SimpleNamespace(entries=entries)
        return [artifact]


def test_files_stay_in_their_folder(tmp_path: Path) -> None:
    run = Project([*map(File, LEADING_OUT), File("media/a.png"), File("huge.png", 2**40)])
    assert _download(run, tmp_path / "in", ["media/a.png"]) == {"media/a.png"}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.png"]


def test_decisions_stay_in_their_folder_and_references_are_not_fetched(tmp_path: Path) -> None:
    elsewhere = [File(f"r{k}.npz", ref=ref) for k, ref in enumerate(("file:///etc/passwd", "https://x/y", "s3://a/b"))]
    run = Project([*map(File, LEADING_OUT), *elsewhere, File("robustness.npz"), File("big.npz", 2**40)])
    assert [path.name for path in _decisions(run, tmp_path / "in")] == ["robustness.npz"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["robustness.npz"]


@given(st.text(st.sampled_from("./\\a:~ \0\u202e=,é"), max_size=9))
@settings(deadline=None, derandomize=True)
def test_names_of_runs_are_names_of_folders(name: str) -> None:
    assert "/" not in _safe(name)
    assert _safe(name) not in (".", "..")
    for found in _names([SimpleNamespace(name=name, id=f"../{name}"), SimpleNamespace(name=name, id="b")]):
        assert "/" not in found
        assert found not in (".", "..")
    if _stays(name):
        assert Path("/in", name).is_relative_to("/in")
        assert ".." not in Path(name).parts


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"id": "run"}),
        ({"wandb": {"project": "p"}}, {"project": "p", "id": "run"}),
        ({"wandb": True}, {"wandb": True, "id": "run"}),
    ],
)
def test_a_hyperparameter_called_wandb_is_not_lost(own: dict[str, Any], expected: dict[str, Any]) -> None:
    assert _named(Project([], config=own)) == expected
