"""Units over whole steps: a weight is invariant if every graph behind its gradient and the numbers say so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, RecordLogger, read_record
from lightning_normgeo.callbacks._monitors.units import unit_tracker
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.normalization.autograd.graph import Graph
from support.projects import Account, ConvNet, Fingerprint, Project, Rows, images, same, sgd, trainer

GROUPS = ("norm_growth", "norm_growth_control")


class ByHand(Project):
    """Manual optimization."""

    automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def penalty(self) -> Tensor:
        """Return a penalty on the first weight, which no normalization makes scale invariant."""
        return self.net[0].weight.square().sum()

    def passes(self, batch: Any, optimizer: Any) -> None:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.passes(batch, optimizer)
        optimizer.step()


def observe(project: Project, steps: int = 4, every: int = 1, **settings: Any) -> tuple[Rows, Account, list[str]]:
    """Train with both monitors; return rows, reference copies of the weights, and warnings."""
    rows, account = Rows(), Account()
    monitors = [OrthogonalityMonitor(every, layers="*"), NormGrowthMonitor(every, layers="*", cumulative=True)]
    run = trainer(account, *monitors, steps=steps, logger=rows, **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.fit(project, images())
    return rows, account, [str(one.message) for one in said if one.category is MeasurementWarning]


def kinds(rows: Rows, layer: str) -> list[str]:
    """Return the group of a layer at each row: exactly one, with the increment that the layer really had."""
    found = []
    for _, metrics in rows.rows:
        present = [group for group in GROUPS if f"{group}/increment/{layer}" in metrics]
        assert len(present) <= 1
        found += present or [""]
    return [{"norm_growth": "invariant", "norm_growth_control": "control"}.get(group, "none") for group in found]


def check(rows: Rows, account: Account, layers: tuple[str, ...] = ("net.0", "net.3", "net.8")) -> None:
    """Compare rows of any group with copies of the weights; residuals have to be rounding."""
    increments = account.increments()
    for step, metrics in rows.rows:
        for group in GROUPS:
            names = [layer for layer in layers if f"{group}/increment/{layer}" in metrics]
            if names:
                own = {key: metrics[f"{group}/{key}"] for key in ("increment", "residual", "storage_floor")}
                truth = sum(increments[step][f"{layer}.weight"] for layer in names)
                assert own["increment"] == pytest.approx(truth, rel=1e-8, abs=1e-11)
                assert abs(own["residual"]) <= own["storage_floor"]


# Several losses


class LossThenPenalty(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        self.manual_backward(self.penalty())


class PenaltyThenLoss(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.penalty())
        self.manual_backward(self.loss(batch))


class PenaltyDiscarded(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.penalty())
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))


class LossDiscarded(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch) + self.penalty())


class Zeroed(ByHand):
    """Project that zeroes gradients in place: their graphs are then unknown, so the earlier ones still count."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.penalty())
        optimizer.zero_grad(set_to_none=False)
        self.manual_backward(self.loss(batch))


class TwiceTheSame(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)


class TwoHalves(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        for half in (slice(None, 4), slice(4, None)):
            self.manual_backward(self.loss([part[half] for part in batch]))


class Summed(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch) + self.penalty())


class FrozenStatistics(ByHand):
    """Project whose second pass normalizes with running statistics."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        self.net[1].eval()
        self.manual_backward(self.loss(batch))
        self.net[1].train()


CASES: dict[type[ByHand], str] = {
    LossThenPenalty: "control",
    PenaltyThenLoss: "control",
    PenaltyDiscarded: "invariant",
    LossDiscarded: "control",
    Zeroed: "control",
    TwiceTheSame: "invariant",
    TwoHalves: "invariant",
    Summed: "control",
    FrozenStatistics: "control",
}


@pytest.mark.parametrize("project", CASES, ids=lambda project: project.__name__)
@pytest.mark.parametrize("every", [1, 2])
def test_a_weight_is_invariant_if_all_of_its_gradient_is(project: type[ByHand], every: int) -> None:
    rows, account, said = observe(project(), steps=-1, every=every, max_epochs=1)
    assert rows.steps == list(range(every - 1, 8, every))
    assert set(kinds(rows, "net.0")) == {CASES[project]}
    assert set(kinds(rows, "net.3")) == {"invariant"}
    assert set(kinds(rows, "net.8")) == {"control"}
    assert not said
    check(rows, account)
    assert max(value for _, value in rows.curves["orthogonality/max_abs_cos"]) < 0.05
    corrected = [value for _, value in rows.curves["orthogonality/max_abs_cos_corrected"]]
    assert max(corrected) < 2e-6


@pytest.mark.parametrize("project", [LossThenPenalty, PenaltyDiscarded, TwiceTheSame, FrozenStatistics])
def test_training_is_the_same(project: type[ByHand]) -> None:
    states = []
    for monitors in ([], [OrthogonalityMonitor(2), NormGrowthMonitor(3, cumulative=True)]):
        torch.manual_seed(0)
        fingerprint = Fingerprint()
        trainer(*monitors, fingerprint, steps=-1, max_epochs=1).fit(project(), images())
        states.append(fingerprint.states)
    assert same(*states)


# Micro-batches


class EveryOther(Project):
    """Project that normalizes every second micro-batch with running statistics."""

    odd = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net[1].train(batch_idx % 2 != self.odd)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("every", [1, 2])
def test_micro_batches_with_different_graphs(odd: int, every: int) -> None:
    project = EveryOther()
    project.odd = odd
    rows, account, said = observe(project, steps=4, every=every, accumulate_grad_batches=2)
    assert set(kinds(rows, "net.0")) == {"control"}
    assert set(kinds(rows, "net.3")) == {"invariant"}
    assert not said
    check(rows, account)


def test_steps_with_different_graphs() -> None:
    rows, account, said = observe(EveryOther(), steps=6)
    assert kinds(rows, "net.0") == ["invariant", "control"] * 3
    assert not said
    check(rows, account)


# Two networks


class Adversarial(ByHand):
    """GAN whose generator loss goes through the critic, whose gradients from it are discarded."""

    way = "zero_grad"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {
                "generator": nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 12)),
                "critic": nn.Sequential(nn.Linear(12, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)),
            }
        )

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[name].parameters(), lr=0.01) for name in ("generator", "critic")]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        score = self.net["critic"]
        made = self.net["generator"](torch.randn(8, 4))
        if self.way == "toggle":
            self.toggle_optimizer(generator)
        # with statistics of its own it would not be invariant, but none of this affects the critic's step
        score.eval()
        loss = -score(made).mean()
        generator.zero_grad()
        if self.way == "inputs":
            self.manual_backward(loss, inputs=list(self.net["generator"].parameters()))
        else:
            self.manual_backward(loss)
        generator.step()
        if self.way == "toggle":
            self.untoggle_optimizer(generator)
        score.train()
        critic.zero_grad()
        self.manual_backward(score(made.detach()).mean() - score(torch.randn(8, 12)).mean().square())
        critic.step()


@pytest.mark.parametrize("way", ["zero_grad", "toggle", "inputs"])
def test_gradients_that_are_discarded_do_not_count(way: str) -> None:
    project = Adversarial()
    project.way = way
    rows, account, said = observe(project, steps=-1, max_epochs=1)
    assert set(kinds(rows, "net.critic.0")) == {"invariant"}
    assert set(kinds(rows, "net.generator.0")) == {"invariant"}
    assert not said
    check(rows, account, ("net.critic.0", "net.critic.3", "net.generator.0", "net.generator.2"))
    assert max(value for _, value in rows.curves["orthogonality/max_abs_cos_corrected"]) < 2e-6


# Refuted by the numbers


class Hooked(Project):
    """Project that adds a component along W to a gradient, from the third step on."""

    def __init__(self, net: nn.Module | None = None, begin: int = 2) -> None:
        super().__init__(net=net)
        self.begin = begin
        weight = self.net[0].weight
        weight.register_hook(lambda gradient: gradient + 10 * weight.detach() * (self.trainer.global_step >= begin))


@pytest.mark.parametrize("begin", [0, 2])
def test_units_that_the_numbers_refute_are_controls(begin: int) -> None:
    rows, account, said = observe(Hooked(begin=begin), steps=6)
    assert kinds(rows, "net.0") == ["invariant"] * begin + ["control"] * (6 - begin)
    assert set(kinds(rows, "net.3")) == {"invariant"}
    assert len(said) == 1
    assert said[0].startswith("net.0.weight: controls from here on")
    check(rows, account)
    for step, metrics in rows.rows:
        assert metrics["orthogonality/max_abs_cos"] < 1e-2
        assert ("orthogonality_control/max_abs_cos/net.0" in metrics) is (step >= begin)
        assert metrics["norm_growth/weight_norm"] == pytest.approx(
            sum(metrics.get(f"norm_growth/weight_norm/{layer}", 0.0) ** 2 for layer in ("net.0", "net.3")) ** 0.5
        )
    assert rows.rows[-1][1]["orthogonality_control/max_abs_cos/net.0"] > 0.1


def test_sums_of_what_is_refuted_move_to_the_controls() -> None:
    rows, account, _ = observe(Hooked(begin=2), steps=6)
    total = sum(step["net.0.weight"] for step in account.increments())
    last = rows.rows[-1][1]
    assert "norm_growth/cumulative_increment/net.0" not in last
    assert last["norm_growth_control/cumulative_increment/net.0"] == pytest.approx(total, rel=1e-8)
    whole = {g: last[f"{g}/cumulative_increment"] for g in GROUPS}
    truth = sum(step[f"net.{k}.weight"] for step in account.increments() for k in (0, 3, 8))
    assert sum(whole.values()) == pytest.approx(truth, rel=1e-8)


def group_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def test_joint_units_that_are_refuted_are_looked_at_row_by_row_from_the_next_step_on() -> None:
    rows, account, said = observe(Hooked(group_net(), begin=1), steps=5)
    assert kinds(rows, "net.0") == ["invariant", "none", "control", "control", "control"]
    assert len(said) == 1
    increments = account.increments()
    for step, metrics in rows.rows[1:]:
        assert metrics["norm_growth/increment"] == pytest.approx(increments[step]["net.3.weight"], rel=1e-8)
    for step, metrics in rows.rows[2:]:
        truth = increments[step]["net.0.weight"]
        assert metrics["norm_growth_control/increment/net.0"] == pytest.approx(truth, rel=1e-8)


def test_training_with_refuted_units_is_the_same() -> None:
    states = []
    for monitors in ([], [OrthogonalityMonitor(2), NormGrowthMonitor(1, cumulative=True)]):
        torch.manual_seed(0)
        fingerprint = Fingerprint()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MeasurementWarning)
            trainer(*monitors, fingerprint, steps=6).fit(Hooked(), images())
        states.append(fingerprint.states)
    assert same(*states)


# Cosines that ε explains


class LargeEpsilon(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))


@pytest.mark.parametrize("kind", [Project, LargeEpsilon])
def test_a_large_epsilon_explains_the_cosine(kind: type[Project]) -> None:
    rows, account, said = observe(kind(net=ConvNet(eps=0.8)), steps=6)
    assert set(kinds(rows, "net.0")) == set(kinds(rows, "net.3")) == {"invariant"}
    assert max(value for _, value in rows.curves["orthogonality/max_abs_cos"]) > 0.1
    assert max(value for _, value in rows.curves["orthogonality/max_abs_cos_corrected"]) < 2e-6
    assert len(said) == 1
    assert said[0].startswith("The ε of the normalization behind net.")
    assert [value for _, value in rows.curves["norm_growth/eq16_applies"]] == [0.0] * 6
    check(rows, account)


def test_a_large_epsilon_that_cannot_be_taken_off_is_refuted_with_the_reason() -> None:
    """Group normalization has no corrected key."""
    net = group_net()
    net[1].eps = 0.8
    _, _, said = observe(Project(net=net), steps=3)
    assert len(said) == 1
    assert said[0].startswith("net.0.weight: controls from here on")
    assert "another normalization's ε" in said[0]


# Clipping by value


def test_clipping_by_value_that_lightning_does_is_known() -> None:
    rows, account, said = observe(Project(sgd()), steps=4, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert not said
    assert set(kinds(rows, "net.0")) == {"invariant"}
    assert [value for _, value in rows.curves["norm_growth/eq16_applies"]] == [0.0] * 4
    assert "orthogonality/max_abs_cos_corrected" not in rows.curves
    check(rows, account)


class ClipsBeforeStep(Project):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 1e-3)


class ClipsItself(Project):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 1e-3)


class ClipsByHand(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="value")


@pytest.mark.parametrize("kind", [ClipsBeforeStep, ClipsItself, ClipsByHand])
def test_clipping_by_value_that_nobody_knows_of_is_refuted(kind: type[Project]) -> None:
    rows, account, said = observe(kind(), steps=4)
    assert set(kinds(rows, "net.0")) == set(kinds(rows, "net.3")) == {"control"}
    assert len(said) == 1
    assert "clipping by value" in said[0]
    assert "orthogonality/max_abs_cos_corrected" not in rows.curves
    check(rows, account)


@pytest.mark.parametrize("pair", [("loss", "constant"), ("constant", "loss")], ids="-".join)
def test_a_loss_without_a_graph_to_weights_is_no_obstacle(pair: tuple[str, ...]) -> None:
    class Mixed(ByHand):
        def passes(self, batch: Any, optimizer: Any) -> None:
            for name in pair:
                constant = (self.net[8].bias * 1).sum()
                self.manual_backward(self.loss(batch) if name == "loss" else constant)

    rows, account, said = observe(Mixed(), steps=3)
    assert set(kinds(rows, "net.0")) == {"invariant"}
    assert not said
    check(rows, account)


class Tokens(Project):
    """Texts of different lengths, in a network with a residual stream."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        super().__init__(net=nn.Sequential(nn.Embedding(50, 16), block, nn.LayerNorm(16), nn.Linear(16, 4)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        text = (batch[0].flatten(1)[:, : 5 + batch_idx] * 50).long()
        return nn.functional.cross_entropy(self.net(text).mean(1), batch[1])


def test_texts_of_different_lengths_have_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Any] = []
    original = unit_tracker.search
    monkeypatch.setattr(
        unit_tracker, "search", lambda *args, **settings: (searched.append(args), original(*args, **settings))[1]
    )
    logger = RecordLogger(str(tmp_path))
    trainer(NormGrowthMonitor(layers="*"), logger=logger, steps=10).fit(Tokens(), images(80))
    metrics = read_record(logger.folder).metrics
    assert len(searched) <= 3  # without and with constants, and for as many tokens as a head has features
    assert [step for step, _ in metrics["norm_growth/increment"]][-8:] == list(range(2, 10))


def test_sizes_that_follow_from_the_batch_are_no_part_of_a_graph() -> None:
    torch.manual_seed(0)
    network = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    lengths = {n: Graph(network(torch.randn(4, n, 16)).sum()).signature for n in (7, 9, 1, 16)}
    assert lengths[7] == lengths[9]
    assert lengths[7] != lengths[1]  # one token is broadcast
    assert lengths[7] != lengths[16]  # as many tokens as features: views may join either
    conv, norm = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)
    before = Graph(norm(conv(torch.randn(2, 3, 8, 8))).sum()).signature
    norm.num_groups = 8
    assert Graph(norm(conv(torch.randn(2, 3, 8, 8))).sum()).signature != before
