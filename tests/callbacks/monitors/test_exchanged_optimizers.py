"""Optimizers that are exchanged while they train: every step is measured from the first one on, and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_normgeo import NormGrowthMonitor
from support.projects import Fingerprint, Project, images, same, sgd, trainer
from support.witness import Layers, Witness, is_weight, layer

STEPS = 8


def momentum(project: Project, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(project.parameters(), lr=lr, momentum=0.5)


class Exchanging(Project):
    """A project that gets another optimizer at some batches."""

    def exchange(self) -> None:
        self.trainer.optimizers = [momentum(self, 0.05)]


class BeforeTheBatch(Exchanging):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx in (2, 5):
            self.exchange()


class AfterTheBatch(Exchanging):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (2, 5):
            self.exchange()


class ByHand(Exchanging):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx in (2, 5):
            self.exchange()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class EveryStep(Witness):
    """A witness that hooks into all optimizers of the process."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._trainer, self._module = trainer, pl_module
        if not self._handles:
            self._handles.append(register_optimizer_step_pre_hook(self._begins))
            self._handles.append(register_optimizer_step_post_hook(self._ends))


def trained(kind: type[Project], *callbacks: Any, rows: Any = False, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    project = kind(sgd()).double()
    # Lightning does not count the step of an optimizer that is new in training_step
    run = trainer(*callbacks, steps=-1, max_epochs=1, logger=rows, **settings)
    run.fit(project, images(8 * STEPS, dtype=torch.float64))
    return project.state_dict()


KINDS = [BeforeTheBatch, AfterTheBatch, ByHand]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 3])
def test_steps_of_exchanged_optimizers_are_measured(kind: type[Project], every: int) -> None:
    rows, witness = Layers(), EveryStep()
    trained(kind, witness, NormGrowthMonitor(every, layers="*", cumulative=True), rows=rows)
    assert rows.steps == [step for step in range(STEPS) if (step + 1) % every == 0]
    for step in rows.steps:
        found = rows.by_layer(step, "norm_growth") | rows.by_layer(step, "norm_growth_control")
        moved = {layer(n): one for n, one in witness.moved[step].items() if is_weight(n, one.before)}
        assert {name for name, own in found.items() if "increment" in own} == moved.keys()
        for name, one in moved.items():
            assert found[name]["increment"] == pytest.approx(one.increment, rel=1e-9, abs=1e-14)
            assert found[name]["residual"] == pytest.approx(0, abs=1e-13)
            assert found[name]["cumulative_residual"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same(kind: type[Project]) -> None:
    bare, observed = Fingerprint(), Fingerprint()
    trained(kind, bare)
    trained(kind, NormGrowthMonitor(cumulative=True), observed)
    assert same(bare.states, observed.states)


def hooks_of_all_optimizers() -> int:
    return len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)


class Failing(Project):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise ValueError("as a project may fail")


@pytest.mark.parametrize("train", [lambda: trained(Project, NormGrowthMonitor()), lambda: failing()])
def test_no_hook_stays(train: Callable[[], Any]) -> None:
    before = hooks_of_all_optimizers()
    train()
    assert hooks_of_all_optimizers() == before


def failing() -> None:
    with pytest.raises(ValueError, match="as a project may fail"):
        trained(Failing, NormGrowthMonitor())


def test_optimizers_that_are_none_of_the_trainers_are_not_measured() -> None:
    class WithOther(Project):
        """A project that also trains something else."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            other = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
            other.grad = torch.ones_like(other)
            torch.optim.SGD([other], lr=0.1).step()

    rows, plain = Layers(), Layers()
    trained(WithOther, NormGrowthMonitor(layers="*"), rows=rows)
    trained(Project, NormGrowthMonitor(layers="*"), rows=plain)
    assert rows.rows == plain.rows
