"""Script of tests/callbacks/test_ddp.py: training and robustness evaluation, on any number of processes."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from lightning_normgeo import (  # noqa: E402
    AffineConvergenceMonitor,
    BatchGeometryMonitor,
    EffectiveWeightsSummary,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    RobustnessEvaluation,
    SymmetryMonitor,
    effective_weights,
)
from support.processes import leave_group  # noqa: E402
from support.projects import Project, images, sgd, trainer  # noqa: E402


def main(folder: str, devices: int) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(0)
    project = Project(sgd(momentum=0.9))
    type(project).test_dataloader = lambda self: images(21, batch_size=4)  # type: ignore[method-assign]
    after = RobustnessEvaluation(attacks=[], after_fit=True, num_images=0)
    geometry = [
        OrthogonalityMonitor(),
        NormGrowthMonitor(cumulative=True),
        AffineConvergenceMonitor(),
        SymmetryMonitor(),
        BatchGeometryMonitor(),
    ]
    effective = EffectiveWeightsSummary(steps=5)
    monitors = [*geometry, effective, after]
    logger = RecordLogger(folder, version="run")
    spread: dict[str, Any] = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
    run = trainer(*monitors, steps=4, logger=logger, **spread)
    run.fit(project, images(64, batch_size=8 // devices))
    watched = {key: float(value) for key, value in run.callback_metrics.items()}
    after_fit = after.results["clean"].n
    measured = None if effective.result is None else dict(effective.result.quantities)
    again = dict(effective_weights(project, torch.rand(2, 3, 8, 8), steps=5).quantities)
    counts = {}
    robustness = RobustnessEvaluation(steps=2, eps=0.1)
    broken = RobustnessEvaluation(attacks=["bim"], steps=2, eps=0.1, semantics="any", batch_size=50, name="any")
    one = RobustnessEvaluation(attacks=[], max_samples=1, name="one")
    test = trainer(robustness, one, broken, logger=logger, **spread)
    test.test(project, images(1003, batch_size=16), verbose=False)
    counted = {**robustness.results, "one": one.results["clean"], "any": broken.results["bim"]}
    for name, result in counted.items():
        counts[name] = (result.correct, result.n)
    undealt = RobustnessEvaluation(attacks=[])
    trainer(undealt, logger=logger, use_distributed_sampler=False, **spread).test(
        project, images(23, batch_size=4), verbose=False
    )
    counts["undealt"] = (undealt.results["clean"].correct, undealt.results["clean"].n)
    counts["after_fit"] = (0, after_fit)
    weights = {name: tensor.tolist() for name, tensor in project.named_parameters()}
    report = {"watched": watched, "counts": counts, "weights": weights, "effective": [measured, again]}
    Path(folder, f"rank{run.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    leave_group()
