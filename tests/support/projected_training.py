"""Script of tests/callbacks/projection/test_processes.py for two processes; the test imports it for one process."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_normgeo.callbacks import SphereProjection
from lightning_normgeo.geometry.rows import is_sharded
from support.fsdp_models import Divided, Zoo, batch_norms, divided_trainer
from support.processes import leave_group
from support.projects import Project, images, sgd, trainer

EPS = 1e-60


class Stream(nn.Module):
    """A residual stream into which three layers write: one block over parameters of several shards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
        self.norms = nn.ModuleList(nn.LayerNorm(7, eps=EPS) for _ in range(3))
        self.branches = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, branch in zip(self.norms, self.branches, strict=False):
            x = x + branch(norm(x).sigmoid())
        return self.head(self.norms[2](x))


def adamw(module: nn.Module) -> Any:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)


def momentum(module: nn.Module) -> Any:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


SHARDED: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "retract zoo": (Zoo, momentum, ("retract",)),
    "tangent zoo": (Zoo, momentum, ("tangent",)),
    "hyperball zoo": (Zoo, adamw, ("hyperball",)),
    "retract stream": (Stream, adamw, ("retract", 2.0)),
    "retract batch norms": (batch_norms, momentum, ("retract",)),
}
"""Networks, optimizers and arguments of SphereProjection."""


def sharded(devices: int, name: str) -> dict[str, list[float]]:
    """Train, and return all parameters and buffers."""
    make, optimizers, arguments = SHARDED[name]
    parts = {Zoo: ("group", "up", "lengths", ["one_row", "norm"]), Stream: ("stem", "branches.0")}.get(make, ())
    module = Divided(make, parts, optimizers)
    divided_trainer(devices, SphereProjection(*arguments), steps=5).fit(module)
    found = {}
    for key, value in module.net.state_dict().items():
        found[key] = (value.full_tensor() if is_sharded(value) else value).double().flatten().tolist()
    return found


def replicated(devices: int) -> dict[str, Any]:
    """Train by DDP, and return the norms of all filters over those at the start, and all weights."""
    torch.manual_seed(0)
    project = Project(sgd(lr=0.05, momentum=0.9))
    layers = project.net[0], project.net[3]
    start = [layer.weight.detach().double().flatten(1).norm(dim=1) for layer in layers]
    trainer(SphereProjection(), steps=20, strategy="ddp", devices=devices).fit(project, images(320))
    norms = [layer.weight.detach().double().flatten(1).norm(dim=1) for layer in layers]
    weights = torch.cat([p.detach().flatten() for p in project.parameters()])
    return {"ratios": (torch.cat(norms) / torch.cat(start)).tolist(), "weights": weights.tolist()}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {}
    try:
        report["replicated"] = replicated(2)
        for name in SHARDED if hasattr(torch.cpu.Stream, "record_event") else ():
            report[name] = sharded(2, name)
    finally:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
    leave_group()
