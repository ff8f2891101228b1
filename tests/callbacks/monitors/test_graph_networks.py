"""Monitors on graph networks: the search sees during training that messages are summed into zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.normalization.autograd import zero_constants
from support.projects import Fingerprint, Project, Rows, images, same, sgd, trainer


class Messages(nn.Module):
    """A linear layer whose outputs are summed over neighbors, into a buffer filled with ``start``, and normalized."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(192, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.flatten(1))
        index = torch.arange(len(y)).roll(1).unsqueeze(1).expand_as(y)
        summed = torch.full_like(y, self.start, requires_grad=False).detach().scatter_add(0, index, y)
        return self.head(self.norm(summed.relu()))


class Other(TorchFunctionMode):
    """A torch function mode of the user's own, which has to stay active after a backward pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class InAMode(Project):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        with Other() as mode:
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            assert _get_current_function_mode_stack()[-1] is mode
        optimizer.step()


def observe(project: Project) -> tuple[Rows, Fingerprint]:
    rows, seen = Rows(), Fingerprint()
    monitors = [OrthogonalityMonitor(1, layers="*"), NormGrowthMonitor(1, layers="*")]
    trainer(*monitors, seen, steps=5, logger=rows).fit(project, images())
    return rows, seen


@pytest.mark.parametrize("kind", [Project, InAMode])
def test_sums_into_zeros_are_seen_from_the_second_measured_step_on(kind: type[Project]) -> None:
    torch.manual_seed(0)
    project = kind(sgd(), Messages())
    state = {name: value.clone() for name, value in project.state_dict().items()}
    rows, seen = observe(project)
    where = {key: [step for step, _ in points] for key, points in rows.curves.items() if "increment/net.linear" in key}
    assert where == {"norm_growth_control/increment/net.linear": [0], "norm_growth/increment/net.linear": [1, 2, 3, 4]}
    assert max(value for _, value in rows.curves["orthogonality/max_abs_cos_corrected"]) < 1e-5
    assert _get_current_function_mode_stack() == []
    project.load_state_dict(state)
    plain = Fingerprint()
    trainer(plain, steps=5).fit(project, images())
    keys = ("weights", "gradients", "optimizers", "steps")
    assert all(same(a[key], b[key]) for a, b in zip(plain.states, seen.states, strict=True) for key in keys)


class Written(nn.Module):
    """A network with a normalization that is written out, and a mask that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(192, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.flatten(1))
        y = y.masked_fill(y < 0, 0.0)
        y = y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
        logits: Tensor = self.head(y)
        return logits


def test_constants_that_are_numbers_are_known_in_the_first_measured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    monkeypatch.setattr(zero_constants, "_is_readable", lambda value: bool(read.append(value)))
    torch.manual_seed(0)
    rows, _ = observe(Project(sgd(), Written()))
    where = {key: [step for step, _ in points] for key, points in rows.curves.items() if "increment/net.linear" in key}
    assert where == {"norm_growth/increment/net.linear": [0, 1, 2, 3, 4]}
    assert read == []


def test_sums_into_anything_else_are_none() -> None:
    words = "None of 2 weights is scale invariant.*a tensor that is not known to be zero is in its way"
    with pytest.warns(MeasurementWarning, match=words) as said:
        rows, _ = observe(Project(sgd(), Messages(start=1.0)))
    assert sum("scale invariant" in str(one.message) for one in said) == 1
    assert not [key for key in rows.curves if key.startswith("norm_growth/")]


def test_a_step_that_fails_leaves_no_mode() -> None:
    class Failing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                assert _get_current_function_mode_stack(), "it is watched"
                raise RuntimeError("in the middle")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="in the middle"):
        observe(Failing(sgd(), Messages()))
    assert _get_current_function_mode_stack() == []
