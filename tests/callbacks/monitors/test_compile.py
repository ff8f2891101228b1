"""Monitors under torch.compile: parameter names stay clean, numbers are those of the eager run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    SymmetryMonitor,
    read_record,
)
from support.projects import Project, images, trainer

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # operators that the compiler adds
]


def lightning_module(project: Project) -> Any:
    return torch.compile(project, backend="aot_eager")


def submodule(project: Project) -> Any:
    project.net = torch.compile(project.net, backend="aot_eager")
    return project


def in_place(project: Project) -> Any:
    project.net.compile(backend="aot_eager")
    return project


class Loss(Project):
    """Project whose loss is computed by a method of its own."""

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)


GRAPHS: list[Any] = []


def counting(graph: Any, inputs: Any) -> Any:
    GRAPHS.append(graph)
    return graph.forward


@torch.compile(backend=counting)
def squared(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean()


class CompiledClass(Loss):
    """Project with a compiled method."""

    @torch.compile(backend=counting)
    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class CompiledPenalty(Loss):
    """Project that calls a compiled function."""

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) + 1e-3 * squared(self.net[0].weight)


def compiled_network() -> Project:
    project = Project()
    project.net.compile(backend=counting)
    return project


def compiled_attribute(name: str) -> Project:
    project = Loss()
    setattr(project, name, torch.compile(getattr(project, name), backend=counting))
    return project


def compiled_in_a_list() -> Project:
    project = Project()
    project.steps = [torch.compile(Loss.loss, backend=counting)]
    project.training_step = lambda batch, batch_idx: project.steps[0](project, batch)
    project.loss = None
    return project


def compiled_forward() -> Project:
    project = Loss()
    project.net.forward = torch.compile(project.net.forward, backend=counting)
    return project


COMPILED: dict[str, Callable[[], Project]] = {
    "network": compiled_network,
    "training_step": partial(compiled_attribute, "training_step"),
    "method": partial(compiled_attribute, "loss"),
    "forward": compiled_forward,
    "in a list": compiled_in_a_list,
    "class": CompiledClass,
    "function": CompiledPenalty,
}


@pytest.mark.parametrize("project", COMPILED.values(), ids=COMPILED.keys())
def test_measuring_now_and_then_compiles_nothing_again(project: Callable[[], Project]) -> None:
    """Dynamo guards on values that hooks read: a hook that reads a counter would recompile up to the limit."""

    def train(callbacks: list[Any]) -> tuple[int, list[torch.Tensor]]:
        GRAPHS.clear()
        torch._dynamo.reset()
        torch.manual_seed(0)
        made = project()
        trainer(*callbacks, steps=40).fit(made, images(320))
        return len(GRAPHS), [tensor.clone() for tensor in made.state_dict().values()]

    bare, weights = train([])
    monitors = [OrthogonalityMonitor(13), NormGrowthMonitor(11), AffineConvergenceMonitor(17), SymmetryMonitor(7)]
    observed, same = train(monitors)
    assert observed == bare
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_a_wrong_guess_is_refuted_by_the_numbers(tmp_path: Path) -> None:
    class Crossed(nn.Module):
        """Model that registers the normalization behind the first convolution but runs it elsewhere."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3)
            self.norm = nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.first(x).tanh()).amax((2, 3)))

    project = Project(net=Crossed())
    project.net.compile(backend="aot_eager")
    logger = RecordLogger(str(tmp_path))
    with pytest.warns(UserWarning, match=r"^net\.first\.weight: controls from here on.*guessed"):
        trainer(OrthogonalityMonitor(layers="*"), logger=logger, steps=3).fit(project, images(32))
    found = read_record(logger.folder).metrics
    assert "orthogonality/max_abs_cos/net.first" not in found
    assert [step for step, _ in found["orthogonality_control/max_abs_cos/net.first"]] == [0, 1, 2]


def metrics(folder: Path, project: Any) -> dict[str, float]:
    logger = RecordLogger(str(folder))
    monitors = [OrthogonalityMonitor(layers="*"), NormGrowthMonitor(layers="*"), AffineConvergenceMonitor(layers="*")]
    trainer(*monitors, logger=logger, steps=2).fit(project, images(32))
    found = read_record(logger.folder).metrics
    return {key: points[-1][1] for key, points in found.items() if "/" in key}


@pytest.mark.parametrize("compile_it", [lightning_module, submodule, in_place])
def test_same_names_and_numbers_as_eager(compile_it: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    project = Project()
    for norm in (project.net[1], project.net[4]):
        nn.init.uniform_(norm.weight, 0.5, 1)
    state = {name: tensor.clone() for name, tensor in project.state_dict().items()}
    eager = metrics(tmp_path / "eager", project)
    project.load_state_dict(state)
    torch._dynamo.reset()
    compiled = metrics(tmp_path / "compiled", compile_it(project))
    assert compiled.keys() == eager.keys()
    for key, value in eager.items():
        if key.startswith(("affine/", "norm_growth")) and "residual" not in key and "term_gradient" not in key:
            assert compiled[key] == pytest.approx(value, rel=1e-4, abs=1e-9), key
    for key in ("orthogonality/max_abs_cos", "orthogonality_control/max_abs_cos"):
        assert compiled[key] == pytest.approx(eager[key], rel=0.05)
    assert compiled["orthogonality/max_abs_cos_corrected"] < 1e-5
