"""The GPU kernels compile for GPUs of three generations, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support.isolation import SUPPORT


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SUPPORT / "compile_kernels.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 * 9
