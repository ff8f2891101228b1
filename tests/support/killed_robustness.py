"""Script of tests/callbacks/robustness/test_resume.py: a test loop that can be killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from lightning_normgeo import RobustnessEvaluation  # noqa: E402
from support.projects import Project, images, trainer  # noqa: E402


class Killed(RobustnessEvaluation):
    """An evaluation that kills its own process at a given call of the model."""

    def __init__(self, calls: int, **settings: Any) -> None:
        super().__init__(eps=0.1, steps=3, **settings)
        self.calls, self.images = calls, 0

    def logits(self, pl_module: Any, images: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        self.images += len(images)
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().logits(pl_module, images)


def main(folder: str, calls: int, semantics: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    callback = Killed(calls, semantics=semantics, batch_size=16, attacks=["gaussian", "bim", "pgd"])
    project, data = Project(), images(100, batch_size=16)
    trainer(callback, default_root_dir=folder).test(project, data, verbose=False)
    print(json.dumps({"calls": calls - callback.calls, "images": callback.images}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
