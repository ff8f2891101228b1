"""The repository passes its own linters and type checker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.isolation import REPOSITORY


@pytest.mark.parametrize(
    "check",
    [["ruff", "check", "--no-cache"], ["ruff", "format", "--check", "--no-cache"], ["mypy", "--cache-dir={cache}"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_repository_is_clean(check: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", *(word.format(cache=tmp_path / "cache") for word in check)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
