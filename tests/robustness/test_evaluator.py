"""The evaluator against attacks by hand on one sample at a time, for any order and batches of samples."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lightning_normgeo.robustness import (
    Ball,
    InputSpace,
    RobustnessEvaluator,
    RobustnessSettings,
    gaussian_noise,
    projected_gradient,
    results_of,
)
from support import reference as ref
from support.small_classifiers import conv_net, pixels

PIXELS = InputSpace(None, None, normalized_data=False)
NET, COUNT = conv_net(3, torch.float64), 14
IMAGES = pixels(COUNT, 3, 8, 8, seed=2)
LABELS = NET(IMAGES).argmax(1)
LABELS[[2, 9]] = (LABELS[[2, 9]] + 1) % 5
ATTACKS = ["gaussian", "bim", "pgd", "bim_l2", "pgd_l2"]
# radii at which about half of the images become wrong
SETTINGS = {"eps": 0.02, "step_size": 0.006, "eps_l2": 0.3, "steps": 5, "noise_std": 0.1, "attacks": ATTACKS, "seed": 8}


def evaluated(parts=(range(COUNT),), net=NET, images=IMAGES, **changes):
    run = RobustnessEvaluator(net, PIXELS, RobustnessSettings(**(SETTINGS | changes)))
    for part in parts:
        part = list(part)
        run.put(images[part], LABELS[part], part)
    return run.finish()


def same(first, second, attack, other=None, tolerance=1e-6):
    """Check that per-sample results are equal, and numbers equal up to float32's rounding."""
    one, two = first.of(attack), second.of(other or attack)
    for k in range(3):
        assert torch.equal(one[k], two[k])
    for k in range(3, 7):
        torch.testing.assert_close(one[k], two[k], rtol=tolerance, atol=1e-9, equal_nan=True)


# --- final ------------------------------------------------------------------------------------------------------------


def by_hand(attack, restarts=1):
    """Return the images that count: those of the first successful start, or else of the last."""
    if attack == "gaussian":
        return gaussian_noise(IMAGES, 0.1, 8, range(COUNT), (0.0, 1.0))
    ball, step = (Ball("l2", 0.3, 0, 1), 0.09) if attack.endswith("l2") else (Ball("linf", 0.02, 0, 1), 0.006)
    if attack.startswith("bim"):
        return projected_gradient(NET, IMAGES, LABELS, ball, step, 5)
    starts = [ball.sample(IMAGES, 8, range(COUNT), r) for r in range(restarts)]
    found = [projected_gradient(NET, IMAGES, LABELS, ball, step, 5, start) for start in starts]
    return torch.stack([next((x for x in tries if wrong(x, k)), tries[-1]) for k, tries in enumerate(zip(*found))])  # noqa: B905


def wrong(image, k):
    return int(NET(image[None]).argmax()) != int(LABELS[k])


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("attack", ATTACKS)
def test_final_decisions_are_those_of_the_attack_by_hand(attack, restarts):
    expected, found = by_hand(attack, restarts), evaluated(restarts=restarts).of(attack)
    scores, change = NET(expected).detach(), (expected - IMAGES).flatten(1)
    assert found.index.tolist() == list(range(COUNT))
    assert torch.equal(found.label, LABELS)
    assert torch.equal(found.prediction, scores.argmax(1))
    assert found.prediction.ne(LABELS).sum() > 2
    for values, wanted in (
        (found.loss, cross_entropy(scores, LABELS, reduction="none")),
        (found.linf, change.abs().amax(1)),
        (found.l2, change.norm(dim=1)),
    ):
        torch.testing.assert_close(values, wanted.float(), rtol=1e-6, atol=1e-9)
    assert torch.isnan(found.gradient).all()


def test_the_gradient_at_the_image_is_kept_where_it_is_known():
    x = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(NET(x), LABELS, reduction="sum"), x)
    clean = evaluated().of("clean")
    torch.testing.assert_close(clean.gradient, gradient.flatten(1).abs().amax(1).float(), rtol=1e-6, atol=0)
    assert (clean.linf == 0).all()
    assert torch.equal(clean.correct, NET(IMAGES).argmax(1) == LABELS)
    assert torch.isnan(evaluated(attacks=["pgd"]).of("clean").gradient).all()


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_a_sweep_is_many_evaluations(semantics):
    sweep = {"eps": [0.01, 0.04], "eps_l2": [0.2, 0.4], "noise_std": [0.05, 0.3]}
    together = evaluated(**sweep, semantics=semantics, restarts=2, step_size=None)
    assert len(together.attacks) == 1 + 2 * len(ATTACKS)
    for k in range(2):
        eps, eps_l2, std = (values[k] for values in sweep.values())
        alone = {"eps": eps, "eps_l2": eps_l2, "noise_std": std, "step_size": None, "semantics": semantics}
        single = evaluated(**alone, restarts=2)
        for attack in ATTACKS:
            value = std if attack == "gaussian" else eps_l2 if attack.endswith("l2") else eps
            same(single, together, attack, f"{attack}_{'std' if attack == 'gaussian' else 'eps'}{value:g}")


def test_a_sample_is_robust_only_if_it_withstands_every_start():
    many = evaluated(restarts=4, attacks=["pgd_l2"], eps_l2=0.06).of("pgd_l2").correct
    ball, robust = Ball("l2", 0.06, 0, 1), torch.ones(COUNT, dtype=torch.bool)
    singles = []
    for r in range(4):
        start = ball.sample(IMAGES, 8, range(COUNT), r)
        last = projected_gradient(NET, IMAGES, LABELS, ball, 0.006 * 0.06 / 0.02, 5, start)
        singles.append(NET(last).argmax(1) == LABELS)
        robust &= singles[-1]
    assert torch.equal(many, robust)


# --- any --------------------------------------------------------------------------------------------------------------


def alone(attack, restarts):
    ball, step = (Ball("l2", 0.3, 0, 1), 0.09) if attack.endswith("l2") else (Ball("linf", 0.02, 0, 1), 0.006)
    box = [0.0] * 192, [1.0] * 192
    found = []
    for k, (x, y) in enumerate(zip(IMAGES, LABELS, strict=True)):
        starts = [ball.sample(x[None], 8, [k], r)[0] for r in range(restarts)] if "pgd" in attack else [None]
        found.append(ref.attacked_until_wrong(NET, x, y, ball.norm, ball.eps, step, 5, box, starts))
    return found


ALONE = {attack: alone(attack, 2) for attack in ATTACKS[1:]}


@settings(deadline=None, derandomize=True, max_examples=6)
@given(st.permutations(range(COUNT)), st.integers(1, COUNT), st.none() | st.integers(1, COUNT + 2))
def test_any_decides_as_one_sample_at_a_time_would(order, cut, batch_size):
    settings = RobustnessSettings(**(SETTINGS | {"semantics": "any", "restarts": 2, "batch_size": batch_size}))
    run = RobustnessEvaluator(NET, PIXELS, settings)
    for part in (order[:cut], order[cut:]):
        run.put(IMAGES[part], LABELS[part], part)
    decisions = run.finish()
    for attack, expected in ALONE.items():
        rows = decisions.of(attack)
        assert rows.index.tolist() == list(range(COUNT))
        assert rows.correct.tolist() == [not broken for _, broken, _ in expected]
        last = torch.stack([x for x, _, _ in expected])
        torch.testing.assert_close(rows.l2, (last - IMAGES).flatten(1).norm(dim=1).float(), rtol=1e-6, atol=1e-9)
        assert run.attacks._stages[attack, IMAGES.shape[1:]].passes == pytest.approx(
            sum(cost for *_, cost in expected), rel=1e-12
        )


def test_whoever_withstands_any_iterate_withstands_the_last():
    strict, last = evaluated(semantics="any"), evaluated()
    for attack in ATTACKS:
        robust = strict.of(attack).correct
        assert not (robust & ~last.of(attack).correct).any()
        assert torch.equal(strict.of(attack).loss[robust], last.of(attack).loss[robust])
        same(strict, last, "clean")


# --- however samples come ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("semantics", ["final", "any"])
@settings(deadline=None, derandomize=True, max_examples=8)
@given(
    order=st.permutations(range(COUNT)),
    cuts=st.lists(st.integers(0, COUNT), max_size=4),
    batch_size=st.none() | st.integers(1, COUNT + 2),
)
def test_every_split_into_batches_decides_the_same(semantics, order, cuts, batch_size):
    edges = [0, *sorted(cuts), COUNT]
    parts = [order[a:b] for a, b in itertools.pairwise(edges)]  # some are empty
    found = evaluated(parts, semantics=semantics, restarts=2, batch_size=batch_size)
    expected = evaluated(semantics=semantics, restarts=2)
    for attack in expected.attacks:
        same(found, expected, attack)


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_accuracy_under_noise_is_the_normal_integral_on_a_linear_model(std):
    """Class 1 wins where w·(x + noise) > b: with probability Φ((w·x - b)/(σ‖w‖))."""
    count, w = 4000, torch.linspace(-1, 2, 12, dtype=torch.float64)
    x = pixels(count, 3, 2, 2, seed=4)
    margins = x.flatten(1) @ w - 2.5
    inputs = InputSpace((0.0,) * 3, (1.0,) * 3, normalized_data=False)
    changes = {"noise_std": std, "attacks": ["gaussian"], "batch_size": 500}
    run = RobustnessEvaluator(
        lambda z: torch.stack([torch.zeros(len(z), dtype=z.dtype), z.flatten(1) @ w - 2.5], 1),
        inputs,
        RobustnessSettings("galloway2019", **changes),
    )
    run.put(x, torch.ones(count, dtype=torch.long), range(count))
    chances = torch.special.ndtr(margins / (std * w.norm()))
    error = math.sqrt(float((chances * (1 - chances)).sum())) / count
    accuracy = results_of(run.finish())["gaussian"].accuracy
    assert abs(accuracy - float(chances.mean())) < 3 * error
    assert abs(accuracy - float((margins > 0).double().mean())) > 3 * error or std < 0.1
