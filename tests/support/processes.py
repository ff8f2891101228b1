"""Scripts that run several real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def reports_of(script: Path, folder: Path, *arguments: str, ranks: int = 2, timeout: float = 400) -> list[Any]:
    """Run a script that trains on several processes, and return the content of each rank's ``rank{k}.json``."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(script), str(folder), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def leave_group() -> None:
    """Destroy the process group: a group that still exists at exit can crash a process."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
