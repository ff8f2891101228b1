"""Cadence: each optimizer is measured at its next step after every n steps, however rarely it steps."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.callbacks._monitors.cadence import PATIENCE, Cadence, is_due, measured_steps
from lightning_normgeo.callbacks._monitors.observer import Observer
from lightning_normgeo.errors import MeasurementWarning
from support.projects import Account, Fingerprint, Project, Rows, images, same, sgd, trainer


class Optimizers:
    """Fake optimizers that step in chosen batches."""

    def __init__(self, *gaps: int) -> None:
        self.all = [object() for _ in gaps]
        self.gaps = gaps

    def stepping(self, batch: int) -> list[Any]:
        return [one for one, gap in zip(self.all, self.gaps, strict=True) if batch % gap == 0]


def simulate(cadence: Cadence, optimizers: Optimizers, every: list[int], batches: int) -> tuple[list[Any], list[int]]:
    """Return (batch, optimizer, cadences) of everything measured, and the batches for which the probe was activated."""
    measured: list[Any] = []
    armed: list[int] = []
    for batch in range(1, batches + 1):
        cadence.advance(batch, every, optimizers.all)
        expected = cadence.expected() if cadence.waits else set()
        armed += [batch] * bool(expected)
        seen = set()
        for one in optimizers.stepping(batch):
            cadence.take(one)
            if id(one) in expected:
                seen.add(id(one))
        if seen:
            found = cadence.fulfil(seen)
            measured += [(batch, optimizers.all.index(one), found) for one in optimizers.all if id(one) in seen]
    cadence.finish()
    return measured, armed


@settings(deadline=None, derandomize=True, max_examples=80)
@given(gap=st.integers(1, 12), every=st.integers(1, 60))
def test_an_optimizer_that_steps_rarely_is_measured_about_every_n_steps(gap: int, every: int) -> None:
    cadence, batches = Cadence(), 400
    measured, armed = simulate(cadence, Optimizers(gap), [every], batches)
    at = [batch for batch, _, _ in measured]
    assert all(batch % gap == 0 for batch in at)
    due = [-(-batch // gap) * gap for batch in range(every, batches + 1, every)]  # the next step after each multiple
    assert at == sorted({batch for batch in due if batch <= batches})
    assert all(found == {every} for *_, found in measured)
    assert len(armed) <= (PATIENCE + gap) * max(1, len(at) + 1)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_every_optimizer_gets_its_turn_for_every_cadence(gaps: list[int], every: list[int]) -> None:
    cadence, batches = Cadence(), 200
    measured, _ = simulate(cadence, Optimizers(*gaps), sorted(set(every)), batches)
    for k, gap in enumerate(gaps):
        for n in set(every):
            times = [batch for batch, who, found in measured if who == k and n in found]
            due = {-(-batch // gap) * gap for batch in range(n, batches + 1, n)}
            # and possibly once more, if another optimizer is measured for the same cadence
            assert {batch for batch in due if batch <= batches} <= set(times)
    assert sorted(cadence.taken.values()) == sorted(batches // gap for gap in gaps)
    assert sum(cadence.measured.values()) == len(measured)


@pytest.mark.parametrize("gap", [1, 17, 40, 100])
def test_nothing_is_armed_while_no_step_is_expected(gap: int) -> None:
    """The probe stays inactive once it is known how often an optimizer steps."""
    cadence = Cadence()
    measured, armed = simulate(cadence, Optimizers(gap), [50], 1000)
    assert measured
    late = [batch for batch in armed if batch > 3 * gap + 50]
    for batch in late:
        assert any(batch <= step < batch + PATIENCE for step in range(0, 1200, gap)), batch


def test_a_cadence_of_one_is_armed_all_the_time_and_one_of_zero_never() -> None:
    _, armed = simulate(Cadence(), Optimizers(1), [1], 20)
    assert armed == list(range(1, 21))
    measured, armed = simulate(Cadence(), Optimizers(1), [0], 20)
    assert not measured
    assert not armed


def test_the_same_step_again_changes_nothing() -> None:
    cadence, (one,) = Cadence(), (object(),)
    cadence.advance(2, [2], [one])
    cadence.take(one)
    assert cadence.fulfil({id(one)}) == {2}
    cadence.advance(2, [2], [one])
    assert not cadence.waits


def test_what_nobody_took_is_missed() -> None:
    cadence, (one,) = Cadence(), (object(),)
    for step in range(1, 31):
        cadence.advance(step, [10], [one])
    assert cadence.missed == 2
    cadence.finish()
    assert cadence.missed == 3
    cadence.finish()
    assert cadence.missed == 3


def test_what_is_measured_late_is_not_missed() -> None:
    cadence = Cadence()
    simulate(cadence, Optimizers(7), [10], 70)
    assert cadence.missed == 0


def test_optimizers_that_are_exchanged_are_known_anew() -> None:
    cadence, (first, second) = Cadence(), (object(), object())
    cadence.advance(1, [1], [first])
    cadence.take(first)
    cadence.fulfil({id(first)})
    cadence.advance(2, [1], [second])
    assert cadence.expected() == {id(second)}


# In Trainers


class Wasserstein(Project):
    """Wasserstein GAN: a critic that steps in every batch and a generator that steps in every fifth."""

    automatic_optimization = False
    gap, begin = 5, 0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {
                "generator": nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 12)),
                "critic": nn.Sequential(nn.Linear(12, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)),
            }
        )
        self.stepped: list[int] = []

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[name].parameters(), lr=0.01) for name in ("generator", "critic")]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        made = self.net["generator"](torch.randn(8, 4))
        critic.zero_grad()
        score = self.net["critic"]
        self.manual_backward(score(made.detach()).mean() - score(torch.randn(8, 12)).mean())
        critic.step()
        if batch_idx >= self.begin and (batch_idx + 1) % self.gap == 0:
            generator.zero_grad()
            self.manual_backward(-score(made).mean())
            generator.step()
            self.stepped.append(batch_idx)


def many(batches: int) -> Any:
    return images(batches, batch_size=1)


def observe(project: Any, batches: int, *every: int | None, **settings: Any) -> tuple[Rows, list[Any]]:
    rows = Rows()
    monitors = [NormGrowthMonitor(n, layers="*") for n in every]
    trainer(*monitors, steps=-1, max_epochs=1, logger=rows, **settings).fit(project, many(batches))
    return rows, monitors


def seen(rows: Rows, layer: str) -> list[int]:
    return [step for step, metrics in rows.rows if any(k.endswith(f"/increment/{layer}") for k in metrics)]


@pytest.mark.parametrize(
    ("every", "gap", "batches"), [(50, 5, 160), (7, 5, 60), (1, 5, 20), (10, 7, 60), (50, 60, 250)]
)
def test_a_generator_that_steps_rarely_is_measured(every: int, gap: int, batches: int) -> None:
    project = Wasserstein()
    project.gap = gap
    rows, (monitor,) = observe(project, batches, every)
    after = range(every - 1, batches, every)
    critic, generator = seen(rows, "net.critic.0"), seen(rows, "net.generator.0")
    assert critic == list(after)
    found = sorted({min((s for s in project.stepped if s >= step), default=-1) for step in after} - {-1})
    unknown = 119  # after one step it is unknown how often it steps
    assert generator == [step for step in found if (gap, step) != (60, unknown)]
    assert "no optimizer took a step" not in monitor.left_out


def test_an_optimizer_that_begins_late_is_measured() -> None:
    project = Wasserstein()
    project.begin, project.gap = 60, 3
    rows, _ = observe(project, 150, 50)
    assert seen(rows, "net.critic.0") == [49, 99, 149]
    assert seen(rows, "net.generator.0") == [62, 101, 149]


class InTurns(Wasserstein):
    """Manual optimization: one optimizer steps in even batches and the other in odd ones."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        made = self.net["generator"](torch.randn(8, 4))
        self.manual_backward(self.net["critic"](made).mean())
        optimizer.step()


@pytest.mark.parametrize("every", [2, 10])
def test_both_of_two_optimizers_in_turn_are_measured(every: int) -> None:
    """Both are measured even if every n-th step always belongs to the same one."""
    rows, _ = observe(InTurns(), 40, every)
    due = list(range(every - 1, 40, every))
    assert seen(rows, "net.critic.0") == due
    assert seen(rows, "net.generator.0") == [step + 1 for step in due if step + 1 < 40]


def test_a_cadence_of_zero_measures_never_and_says_nothing() -> None:
    rows, _ = observe(Project(sgd()), 6, None, log_every_n_steps=0)
    assert not rows.rows


def test_barebones_measures_never() -> None:
    settings: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps")
    )
    monitor = NormGrowthMonitor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", MeasurementWarning)
        trainer(monitor, steps=4, barebones=True, **settings).fit(Project(), many(8))
    assert not monitor.left_out


def test_a_cadence_above_the_run_is_told() -> None:
    with pytest.warns(MeasurementWarning, match=r"Never measured: SGD \(4 steps\). Choose a smaller every_n_steps"):
        rows, _ = observe(Project(sgd()), 4, 100)
    assert not rows.rows


@pytest.mark.parametrize("every", [1, 2, 5])
def test_hooks_exist_in_measured_batches_alone(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[int] = []
    original = Observer.arm
    project = Project(sgd())
    monkeypatch.setattr(
        Observer, "arm", lambda self, *due: (armed.append(project.trainer.global_step), original(self, *due))[1]
    )
    observe(project, 20, every)
    assert armed == list(range(every - 1, 20, every))


# Several batches for one step, by hand


class ByHand(Project):
    """Manual gradient accumulation over batches, the last of them with another scale of the loss."""

    automatic_optimization = False
    window = 4

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y) * (1 + batch_idx % self.window) / self.window**2
        self.manual_backward(loss)
        if (batch_idx + 1) % self.window == 0:
            optimizer.step()
            optimizer.zero_grad()


def by_hand(every: int, window: int, batches: int) -> tuple[Rows, Account]:
    project, rows, account = ByHand(), Rows(), Account()
    project.window = window
    monitors = [OrthogonalityMonitor(every, layers="*"), NormGrowthMonitor(every, layers="*", cumulative=True)]
    run = trainer(account, *monitors, steps=-1, max_epochs=1, logger=rows)
    run.fit(project, images(8 * batches))
    return rows, account


@pytest.mark.parametrize("window", [2, 4])
def test_all_batches_of_a_step_taken_by_hand_are_seen(window: int) -> None:
    """The ε part is summed over all batches of the step."""
    rows, _ = by_hand(1, window, 8 * window)
    corrected = rows.curves["orthogonality/max_abs_cos_corrected"]
    assert [step for step, _ in corrected] == rows.steps == list(range(window - 1, 8 * window, window))
    assert max(value for _, value in corrected) < 2e-6
    assert min(value for _, value in rows.curves["orthogonality/max_abs_cos"]) > 1e-5


@pytest.mark.parametrize("window", [2, 4, 20])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_steps_of_several_batches_are_right_wherever_they_are_due(every: int, window: int) -> None:
    """If some batches of a step were not observed, the ε part is omitted, never wrong."""
    rows, account = by_hand(every, window, 5 * window)
    increments = account.increments()
    assert rows.rows
    for step, metrics in rows.rows:
        assert step % window == window - 1, "that a step was taken in"
        assert metrics["norm_growth/increment/net.0"] == pytest.approx(increments[step]["net.0.weight"], rel=1e-9)
        assert abs(metrics["norm_growth/residual"]) <= metrics["norm_growth/storage_floor"]
        assert metrics["norm_growth/eq16_applies"] == 1
        assert metrics.get("orthogonality/max_abs_cos_corrected", 0.0) < 2e-6


def test_steps_by_hand_are_measured_without_a_trace() -> None:
    states = []
    for monitors in ([], [OrthogonalityMonitor(3), NormGrowthMonitor(5, cumulative=True)]):
        torch.manual_seed(0)
        fingerprint = Fingerprint()
        trainer(*monitors, fingerprint, steps=-1, max_epochs=1).fit(ByHand(), images(8 * 24))
        states.append(fingerprint.states)
    assert same(*states)


# --- a cadence that thins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 20])
@pytest.mark.parametrize("steps", [50, 3000, 156_400])
def test_a_thinning_cadence_is_dense_at_first_and_has_a_bounded_number_of_points(n: int, steps: int) -> None:
    due = [step for step in range(1, steps + 1) if is_due(-n, step)]
    dense = [step for step in due if step <= 100 * n]
    assert dense == list(range(n, min(steps, 100 * n) + 1, n))
    bound = 100 + 50 * max(0.0, math.log2(steps / (100 * n)) + 1)
    assert len(due) <= bound + 1
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert gaps == sorted(gaps), "less and less often"
    assert all(gap <= max(n, step / 25) for gap, step in zip(gaps, due, strict=False)), "never far apart"


def test_the_papers_training_has_about_four_hundred_points() -> None:
    """200 epochs of CIFAR-10 in batches of 64, measured every 20 steps at first; 7,820 points without thinning."""
    assert 350 < sum(is_due(-20, step) for step in range(1, 200 * 782 + 1)) < 450


def test_a_monitor_thins_and_a_resumed_training_measures_at_the_same_steps(tmp_path: Any) -> None:
    def measured(steps: int, path: Any = None) -> tuple[list[int], Any]:
        rows = Rows()
        options = {"max_epochs": -1, "max_steps": steps, "log_every_n_steps": 1, "default_root_dir": tmp_path}
        run = trainer(NormGrowthMonitor("auto"), logger=[rows], **options)
        run.fit(Project(), images(64, batch_size=4), ckpt_path=path)
        return [step for step, row in rows.rows if "norm_growth/increment" in row], run

    whole, _ = measured(256)
    first, run = measured(128)
    run.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = measured(256, tmp_path / "half.ckpt")
    assert whole == [step - 1 for step in range(1, 257) if is_due(-1, step)]
    assert len(whole) == 99 + 50 + 15
    assert first + rest == whole


@given(every=st.integers(-30, 30), steps=st.integers(0, 5_000))
def test_the_number_of_measured_steps_is_that_of_the_steps_that_are_due(every: int, steps: int) -> None:
    counted = sum(is_due(every, step) for step in range(1, steps + 1)) if every else 0
    assert measured_steps(every, steps) == counted
