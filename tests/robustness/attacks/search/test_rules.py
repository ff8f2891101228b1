"""APGD and the square attack: every point against the papers' algorithms for one image, and what holds for both."""

from dataclasses import replace

import pytest
import torch

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness import Ball
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import uniforms
from lightning_normgeo.robustness.attacks.search.active_samples import ActiveSet
from lightning_normgeo.robustness.attacks.search.auto_pgd import AutoSteps, checkpoints
from lightning_normgeo.robustness.attacks.search.ball import lengths
from lightning_normgeo.robustness.attacks.search.losses import Loss
from lightning_normgeo.robustness.attacks.search.projected_gradient import ascent
from lightning_normgeo.robustness.attacks.search.rules import ActiveSamples, RandomStart
from lightning_normgeo.robustness.attacks.search.square import SquareSteps
from support.reference_attacks import auto_pgd, loss_of, squares
from support.small_classifiers import conv_net, pixels

NET, COUNT, SEED = conv_net(3, torch.float64), 6, 5
IMAGES = pixels(COUNT, 3, 8, 8, seed=2)
CLEAN = NET(IMAGES).detach()
LABELS = CLEAN.argmax(1)
BOX = [0.0] * 192, [1.0] * 192


def fresh():
    return ActiveSamples.fresh(IMAGES, LABELS, torch.arange(COUNT) * 7, CLEAN)


def same(found, expected, tolerance):
    return float((found.flatten() - torch.tensor(expected, dtype=torch.float64)).abs().max()) <= tolerance


def points(rule, start=0):
    """Return the points of all samples under a rule, ``(steps + 1, samples, …)``, whether they are wrong or not."""
    samples = rule.begin(replace(fresh(), restart=torch.full_like(LABELS, start)))
    found = [samples.adversarial]
    for _ in range(rule.steps):
        if rule.needs_gradient:
            _, losses, gradient = ascent(NET, samples.adversarial, LABELS, rule.loss, rule.targets(samples))
        else:
            losses, gradient = rule.losses(samples, NET(samples.adversarial).detach()), None
        samples = rule.move(samples, losses, gradient)
        found.append(samples.adversarial)
    return torch.stack(found)


def test_checkpoints_are_the_published_ones():
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(10)) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert checkpoints(1) == {1: 1}
    for steps in (3, 17, 50, 100, 333):
        found = checkpoints(steps)
        assert next(iter(found.values())) == max(int(0.22 * steps), 1)
        assert sum(found.values()) == max(found) <= steps


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targets", [0, 2])
@pytest.mark.parametrize("name", ["cross_entropy", "margin", "dlr"])
@pytest.mark.parametrize("steps", [1, 30])
def test_every_point_of_apgd_is_that_of_the_paper(norm, targets, name, steps):
    ball = Ball(norm, {"linf": 0.05, "l2": 0.6}[norm], 0.0, 1.0)
    loss = Loss(name, targets)
    rule = AutoSteps(ball, loss, steps, 1, RandomStart(SEED, surface=True))
    found = points(rule, start=1)
    aims = loss.target_of(CLEAN, LABELS, torch.ones_like(LABELS)) if targets else None
    for k in range(COUNT):
        aim = None if aims is None else int(aims[k])
        label = int(LABELS[k])
        expected = auto_pgd(
            NET, IMAGES[k], norm, ball.eps, steps, BOX, found[0, k], lambda z, y=label, t=aim: loss_of(name, z, y, t)
        )
        for step, point in enumerate(expected):
            torch.testing.assert_close(
                found[step, k].flatten(), torch.tensor(point, dtype=torch.float64), rtol=0, atol=1e-8
            )


def test_the_step_size_is_halved_somewhere_and_points_return_to_the_best():
    """So that the comparison with the paper's algorithm covers it."""
    rule = AutoSteps(Ball("linf", 0.05, 0.0, 1.0), Loss("dlr"), 30, 1, RandomStart(SEED, surface=True))
    samples = rule.begin(fresh())
    for _ in range(rule.steps):
        _, losses, gradient = ascent(NET, samples.adversarial, LABELS, rule.loss)
        samples = rule.move(samples, losses, gradient)
    sizes = samples.state["step_size"] / 0.1
    assert len(set(sizes.tolist())) > 1
    assert bool((sizes < 1).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_on_the_surface_of_the_ball_and_differ(norm):
    ball = Ball(norm, 0.1, -9.0, 9.0)
    rule = AutoSteps(ball, Loss(), 5, 3, RandomStart(SEED, surface=True))
    starts = [rule.begin(replace(fresh(), restart=torch.full_like(LABELS, k))).adversarial for k in range(3)]
    for start in starts:
        torch.testing.assert_close(lengths(start - IMAGES, norm), torch.full((COUNT,), 0.1).double())
    assert not torch.allclose(starts[0], starts[1])


@pytest.mark.parametrize("share", [0.8, 0.05])
def test_every_point_of_the_square_attack_is_that_of_the_paper(share):
    steps, ball = 25, Ball("linf", 0.05, 0.0, 1.0)
    found = points(SquareSteps(ball, Loss("margin"), steps, 1, SEED, share))
    for k in range(COUNT):
        index = torch.tensor([7 * k])

        def drawn(step, count, index=index):
            return uniforms(SEED, index, torch.tensor([step]), count)[0].tolist()

        expected = squares(NET, IMAGES[k], int(LABELS[k]), 0.05, steps, BOX, share, drawn)
        for step, point in enumerate(expected):
            torch.testing.assert_close(
                found[step, k].flatten(), torch.tensor(point, dtype=torch.float64), rtol=0, atol=1e-12
            )


def test_sides_of_squares_are_the_published_ones():
    rule = SquareSteps(Ball("linf", 0.05, 0.0, 1.0), Loss("margin"), 5000, 1, 0, 0.8)
    queries = torch.tensor([0, 5, 6, 25, 26, 100, 101, 250, 251, 500, 501, 1000, 1001, 2000, 2001, 3000, 3001, 4999])
    shares = [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    shares += [0.0125, 0.0125, 0.00625, 0.00625, 0.003125, 0.0015625]
    assert rule.side(queries, 32, 32).tolist() == [max(round((p * 1024) ** 0.5), 1) for p in shares]


def test_the_square_attack_needs_images():
    samples = ActiveSamples.fresh(pixels(2, 9), torch.zeros(2, dtype=torch.long), torch.arange(2), pixels(2, 4))
    rule = SquareSteps(Ball("linf", 0.05, 0.0, 1.0), Loss("margin"), 5, 1, 0)
    with pytest.raises(UnsuitableError, match=r"images \(channels, height, width\), not inputs of shape \(9,\)"):
        rule.begin(samples)


@pytest.mark.parametrize("kind", [AutoSteps, SquareSteps])
def test_points_stay_in_the_ball_and_the_box(kind):
    ball = Ball("linf", 0.05, 0.1, 0.9)
    last = RandomStart(SEED, surface=True) if kind is AutoSteps else SEED
    found = points(kind(ball, Loss("margin"), 12, 1, last))
    inside = IMAGES.clamp(0.1, 0.9)
    assert float((found - IMAGES).abs().amax()) <= float((inside - IMAGES).abs().amax().clamp_min(0.05)) + 1e-12
    assert 0.1 <= float(found.min()) <= float(found.max()) <= 0.9


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_results_do_not_depend_on_the_batch(batch_size):
    rules = [
        AutoSteps(Ball("linf", 0.03, 0.0, 1.0), Loss("dlr", 2), 10, 2, RandomStart(SEED, surface=True)),
        SquareSteps(Ball("linf", 0.03, 0.0, 1.0), Loss("margin"), 20, 2, SEED),
    ]
    for rule in rules:
        ended = {}
        for size in (batch_size, COUNT):
            parts = ended.setdefault(size, {})

            def keep(done, parts=parts):
                for k, index in enumerate(done.indices.tolist()):
                    parts[index] = done.adversarial[k], done.scores[k].argmax()

            active = ActiveSet(rule, size, keep)
            for part in (slice(0, 2), slice(2, COUNT)):
                active.put(IMAGES[part], LABELS[part], torch.arange(COUNT)[part], CLEAN[part])
                active.run(NET)
            active.run(NET, everything=True)
        assert set(ended[batch_size]) == set(range(COUNT))
        for index, (point, found) in ended[batch_size].items():
            torch.testing.assert_close(point, ended[COUNT][index][0], rtol=0, atol=1e-12)
            assert found == ended[COUNT][index][1]
