"""Scripts that run several real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.fork_server import lightning_server


def reports_of(script: Path, folder: Path, *arguments: str, ranks: int = 2, timeout: float = 400) -> list[Any]:
    """Run a script that trains on several processes, and return what each of them left in ``rank{k}.json``."""
    done = lightning_server().run(script, str(folder), *arguments, timeout=timeout, MASTER_ADDR="127.0.0.1")
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def leave_group() -> None:
    """Destroy the process group: a group that still exists at exit can crash a process."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
