"""The tests and the benchmark for a GPU run on an emulated one, so that their own errors are found without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.gpu import ON_GPU
from support.isolation import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.skipif(ON_GPU, reason="they run on the GPU")]


def test_they_pass_on_an_emulated_gpu() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", "tests/gpu"]
    environment = os.environ | {"EMULATED_GPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in last
    assert "skipped" not in last


def test_the_benchmark_makes_all_tables(tmp_path: Path) -> None:
    file = tmp_path / "tables.md"
    command = [sys.executable, "benchmarks/gpu.py", "--without-tests", "--rehearse", "--rounds", "3", "--write", file]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    tables = file.read_text(encoding="utf-8")
    assert tables.count("| three monitors, every step |") == 2
    assert "| final, bf16, verified |" in tables
