"""Script of tests/probes/sharded/test_fsdp.py for two processes; the test imports it for one process."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.errors import ConfigurationError
from support import fsdp_scenarios as scenarios
from support.fsdp_models import SAME_AS_ONE, Divided, divided_trainer
from support.processes import leave_group
from support.projects import Rows

Report = dict[str, Any]


def observed(devices: int, name: str) -> Report:
    """Train with every monitor, and return every row and the metrics in callback_metrics."""
    optimizers, settings = SAME_AS_ONE[name]
    every = 2 if name in ("momentum", "adamw") else 1
    rows = Rows()
    monitors = [OrthogonalityMonitor(every, layers="*"), NormGrowthMonitor(every, layers="*", cumulative=every == 2)]
    run = divided_trainer(devices, *monitors, logger=rows, **settings)
    module = Divided(optimizers=optimizers)
    module.val_dataloader, module.validation_step = module.train_dataloader, module.training_step
    run.fit(module)
    watched = {key: float(value) for key, value in run.callback_metrics.items()}
    return {"rows": rows.rows, "watched": watched, "left_out": dict(monitors[0].left_out)}


def resumed(devices: int, folder: Path, distributed: bool) -> Report:
    """Train two epochs without interruption, and again from a checkpoint after the first."""

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(folder / "first.ckpt")

    def rows(*callbacks: Any, **fit: Any) -> list[Any]:
        kept = Rows()
        monitor = NormGrowthMonitor(3, layers="*", cumulative=True)
        settings = {"limit_train_batches": 4, "max_epochs": 2, "steps": -1, "logger": kept}
        run = divided_trainer(devices, monitor, *callbacks, distributed_checkpoint=distributed, **settings)
        run.fit(Divided(optimizers=SAME_AS_ONE["momentum"][0]), **fit)
        return kept.rows

    whole = rows(Save())
    torch.distributed.barrier()
    return {"whole": whole, "resumed": rows(ckpt_path=folder / "first.ckpt")}


def refused(devices: int) -> Report:
    """Try unsupported trainings; every error has to come before the first batch."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def attempt(divide: Callable[[nn.Module], Any] | None, match: str, **settings: Any) -> None:
        module = Divided(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4)), [], **settings)
        module.divide = divide or module.divide  # type: ignore[method-assign]
        module.training_step = lambda batch, index: pytest.fail("too late")  # type: ignore[method-assign]
        with pytest.raises(ConfigurationError, match=match):
            divided_trainer(devices, NormGrowthMonitor()).fit(module)

    def parallel(plan: Any, net: nn.Module) -> None:
        mesh = torch.distributed.init_device_mesh("cpu", (devices,))
        parallelize_module(net, mesh, {"1": plan, "2": plan})

    def but_one(net: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net[1])

    attempt(partial(parallel, RowwiseParallel()), r"net.1.weight: .*Shard\(dim=1\).*Shard the model by fully_shard")
    attempt(partial(parallel, ColwiseParallel()), "net.1.weight: it is sharded, but not by fully_shard")
    attempt(but_one, "net.2.weight: .*not sharded, so each process trains its own copy. .*remove the callback")
    attempt(lambda net: None, "net.1.weight: .*not sharded")
    attempt(None, "bfloat16", dtype=torch.bfloat16)
    return {"refused": 5}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    target = Path(folder)
    every: dict[str, Callable[[], Report]] = {name: partial(observed, 2, name) for name in SAME_AS_ONE}
    for scenario in (*scenarios.ALL, refused):
        every[scenario.__name__] = partial(scenario, 2)
    for name, distributed in {"one file": False, "distributed": True}.items():
        every[name] = partial(resumed, 2, target / name.replace(" ", "_"), distributed)
    report: Report = {}
    try:
        for name, scenario in every.items():
            report[name] = scenario()
    finally:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (target / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
    leave_group()
