"""An isolated folder, environment and random state for the code of a test."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
SUPPORT = REPOSITORY / "tests" / "support"
_WANDB_FOLDERS = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start


@contextmanager
def isolated(folder: Path) -> Iterator[Path]:
    """Work in ``folder`` with W&B offline and inside it; restore everything at the end."""
    environment, argv, here = dict(os.environ), sys.argv, Path.cwd()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.update({name: str(folder / f".{name.lower()}") for name in _WANDB_FOLDERS})
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DISABLE_GIT="true", WANDB_API_KEY="")
    for name in ("WANDB_API_KEY", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    os.chdir(folder)
    sys.argv = ["normgeo"]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state that Lightning seeds
    # torch.manual_seed formats the stack once for each kind of accelerator that has not begun: 3 ms
    seed = torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed
    seed(0)
    try:
        yield folder
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
            sys.modules["wandb"].teardown()  # finish returns before the log is on disk; settings outlive a run
        if "lightning_normgeo.errors" in sys.modules:  # a session that no Trainer has ended
            sys.modules["lightning_normgeo.errors"].remember_warnings(while_training=False)
        os.chdir(here)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
