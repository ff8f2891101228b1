"""Weights that are renamed or replaced during training, and units whose parts belong to several optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.probes import CumulativeIncrements
from lightning_normgeo.probes.cumulative.increments import SummedWeight
from support.projects import Account, Project, Rows, images, sgd, trainer

SITE = "net.3"


class Edited(Project):
    """Project that edits the second convolution in the middle of a step of three batches."""

    edit: Callable[[Any], None]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            type(self).edit(self)


class Pruned(Edited):
    name = SITE

    def edit(self) -> None:
        prune.custom_from_mask(self.net[3], "weight", torch.ones_like(self.net[3].weight))


class Parametrized(Edited):
    name = SITE

    def edit(self) -> None:
        register_parametrization(self.net[3], "weight", nn.Identity())


def sums_and_increments(project: Project, **settings: Any) -> Rows:
    rows, monitor = Rows(), NormGrowthMonitor(1, layers="*", cumulative=True)
    data = images(96, dtype=torch.float64)
    trainer(monitor, steps=4, logger=rows, **settings).fit(project.double(), data)
    return rows


@pytest.mark.parametrize("kind", [Pruned, Parametrized])
def test_a_weight_that_is_renamed_is_measured_once_and_keeps_its_sums(kind: type[Any]) -> None:
    torch.manual_seed(1)
    plain = sums_and_increments(Project(sgd(momentum=0.9)), accumulate_grad_batches=3)
    torch.manual_seed(1)
    edited = sums_and_increments(kind(sgd(momentum=0.9)), accumulate_grad_batches=3)
    assert edited.steps == plain.steps == [0, 1, 2, 3]
    for (step, expected), (_, found) in zip(plain.rows, edited.rows, strict=True):
        now, before = (kind.name, SITE) if step else (SITE, SITE)
        for key, value in expected.items():
            own = found[key.replace(before, now) if step else key]
            assert own == pytest.approx(value, rel=1e-12, abs=1e-15), f"step {step}: {key}"
        others = {key for key in found if key.endswith(SITE) and step and now != SITE}
        assert not others


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)


def counted(net: TwoNames) -> tuple[CumulativeIncrements, torch.optim.SGD]:
    account, optimizer = (
        CumulativeIncrements(lambda: dict(net.named_parameters())),
        torch.optim.SGD(net.parameters(), lr=1.0),
    )
    account.follow(dict(net.named_parameters()))
    net.a.weight.grad, net.b.weight.grad = torch.ones(2, 3), 2 * torch.ones(2, 3)
    count(account, optimizer)
    return account, optimizer


def count(account: CumulativeIncrements, optimizer: torch.optim.Optimizer) -> None:
    account.open(optimizer)
    account.begin(optimizer, moved=False)
    account.commit([], explained=True)


def predicted(account: CumulativeIncrements, *names: str) -> list[float]:
    entries = [account.entry(name) for name in names]
    return [entry.predicted.item() for entry in entries if entry is not None]


def test_names_that_are_exchanged_take_their_sums_with_them() -> None:
    net = TwoNames()
    account, optimizer = counted(net)
    assert predicted(account, "a.weight", "b.weight") == [6, 24]
    net.a, net.b = net.b, net.a
    account.look_for({"a.weight", "c.weight"})
    assert predicted(account, "a.weight", "b.weight") == [24, 6]
    count(account, optimizer)
    assert predicted(account, "a.weight", "b.weight") == [48, 12]
    assert account.state()["sums"].keys() == {"a.weight", "b.weight"}


def test_a_parameter_of_a_layer_that_is_gone_adds_nothing_to_the_one_in_its_place() -> None:
    net = TwoNames()
    account, optimizer = counted(net)
    net.a = nn.Linear(3, 2, bias=False)
    net.a.weight.grad = 3 * torch.ones(2, 3)
    optimizer.add_param_group({"params": [net.a.weight]})
    count(account, optimizer)
    assert predicted(account, "a.weight", "b.weight") == [6 + 54, 48]


def test_a_weight_that_rests_is_looked_up_by_its_name_of_now() -> None:
    net = TwoNames()
    account, _ = counted(net)
    account.members = {"a.weight": SummedWeight(False), "b.weight": SummedWeight(False)}
    net.a.weight = nn.Parameter(5 * torch.ones(2, 3))
    prune.identity(net.b, "weight")
    account.look_for({"a.weight", "b.weight"})
    assert account.parameters.keys() == {"a.weight", "b.weight"}, "nothing is looked up while all move"
    account.look_for({"a.weight"})
    assert account.members.keys() == {"a.weight", "b.weight_orig"}
    norms = account.norms_sq(["a.weight", "b.weight_orig"])
    assert norms["a.weight"] == 150
    assert norms["b.weight_orig"] == pytest.approx(net.b.weight_orig.square().sum().item(), rel=1e-6)


def test_a_name_that_is_taken_is_not_given_twice() -> None:
    net = TwoNames()
    account, _ = counted(net)
    account.follow({"b.weight": net.a.weight})
    assert predicted(account, "a.weight", "b.weight") == [6, 24]


class Thawed(Edited):
    """Project that trains only the bias until the middle of a step."""

    def __init__(self) -> None:
        super().__init__(
            net=nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.LayerNorm(6, eps=1e-30), nn.Linear(6, 4))
        )
        self.net[1].weight.requires_grad_(False)

    def edit(self) -> None:
        self.net[1].weight.requires_grad_(True)


@pytest.mark.filterwarnings("ignore:None of . weights is scale invariant")
def test_a_weight_thawed_while_its_bias_gathers_gradients_is_a_control_for_that_step_only() -> None:
    rows, monitor = Rows(), OrthogonalityMonitor(1, layers="*")
    data = images(96, dtype=torch.float64)
    trainer(monitor, steps=4, logger=rows, accumulate_grad_batches=3).fit(Thawed().double(), data)
    _, second, *later = [metrics for _, metrics in rows.rows]
    assert second["orthogonality_control/max_abs_cos/net.1"] > 0.01
    assert all(metrics["orthogonality/max_abs_cos/net.1"] < 1e-10 for metrics in later)
    assert len(later) == 2


class Apart(Project):
    """Matrices in one optimizer, vectors in another; units of the first convolution include its bias."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__(
            net=nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.LayerNorm(6, eps=1e-30), nn.Linear(6, 4))
        )

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim == 1]
        return torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()


def test_a_unit_whose_bias_another_optimizer_moves_is_a_control() -> None:
    torch.manual_seed(1)
    rows, account = Rows(), Account()
    monitors = NormGrowthMonitor(1, layers="*", cumulative=True), OrthogonalityMonitor(1, layers="*")
    with pytest.warns(MeasurementWarning) as said:
        trainer(account, *monitors, steps=6, logger=rows).fit(Apart().double(), images(24, dtype=torch.float64))
    texts = [str(one.message) for one in said if "its bias" in str(one.message)]
    assert texts == [
        "net.1.weight: a control, since it is scale invariant only with its bias, which SGD does not move. "
        "Give both to one optimizer, or the layer no bias."
    ]
    assert not any("refute" in str(one.message) for one in said)
    increments = account.increments()
    assert len(rows.rows) == 3
    for step, metrics in rows.rows:
        truth = increments[step]["net.1.weight"]
        assert metrics["norm_growth_control/increment/net.1"] == pytest.approx(truth, rel=1e-9)
        assert abs(metrics["norm_growth_control/residual/net.1"]) <= 1e-12
        assert metrics["orthogonality_control/max_abs_cos/net.1"] > 1e-3
        assert not any(key.startswith("norm_growth/") for key in metrics)


def test_lazy_layers_are_measured_from_their_first_batch_on() -> None:
    net = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    rows = Rows()
    monitors = [OrthogonalityMonitor(1), AffineConvergenceMonitor(1), NormGrowthMonitor(1, cumulative=True)]
    trainer(*monitors, steps=3, logger=rows).fit(Project(sgd(), net), images())
    assert rows.steps == [0, 1, 2]
    for key in ("orthogonality/max_abs_cos_corrected", "affine/abs_gamma2_minus_sigma2_mean"):
        assert all(values[key] >= 0 for _, values in rows.rows), key
