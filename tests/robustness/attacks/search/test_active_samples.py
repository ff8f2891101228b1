"""Attacks that stop at a sample's first error, against one sample at a time; no pass is wasted."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo.robustness import Ball, projected_gradient
from lightning_normgeo.robustness.attacks.search.active_samples import ActiveSet
from lightning_normgeo.robustness.attacks.search.losses import CROSS_ENTROPY
from lightning_normgeo.robustness.attacks.search.projected_gradient import ascent
from lightning_normgeo.robustness.attacks.search.rules import FixedSteps, RandomStart
from support import reference as ref
from support.small_classifiers import conv_net, pixels

NET, COUNT, STEPS, SEED = conv_net(3, torch.float64), 14, 5, 8
IMAGES = pixels(COUNT, 3, 8, 8, seed=2)
LABELS = NET(IMAGES).argmax(1)
LABELS[[2, 9]] = (LABELS[[2, 9]] + 1) % 5  # already wrong before any attack
BALLS = {"linf": (Ball("linf", 0.02, 0.0, 1.0), 0.006), "l2": (Ball("l2", 0.3, 0.0, 1.0), 0.09)}


@dataclass
class Run:
    """An active set, and its results."""

    norm: str
    restarts: int | None
    batch_size: int
    ended: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)

    def __post_init__(self):
        ball, step_size = BALLS[self.norm]
        start = None if self.restarts is None else RandomStart(SEED)
        rule = FixedSteps(ball, CROSS_ENTROPY, STEPS, self.restarts or 1, step_size, start)
        self.active = ActiveSet(rule, self.batch_size, self._ended)

    def _ended(self, ended):
        for k, index in enumerate(ended.indices.tolist()):
            assert index not in self.ended, "a sample ended twice"
            assert torch.equal(ended.images[k], IMAGES[index])
            assert ended.labels[k] == LABELS[index]
            self.ended[index] = ended.adversarial[k], ended.scores[k]

    def logits(self, images):
        self.calls.append((len(images), torch.is_grad_enabled()))
        return NET(images)

    def put(self, which):
        scores, _, gradient = ascent(NET, IMAGES[which], LABELS[which])
        gradient = gradient if self.restarts is None else None
        self.active.put(IMAGES[which], LABELS[which], torch.tensor(which), scores, gradient)

    def all(self, parts):
        for part in parts:
            self.put(part)
            self.active.run(self.logits)
            assert len(self.active._moving or ()) < self.batch_size
            assert len(self.active._arrived or ()) < self.batch_size
        self.active.run(self.logits, everything=True)
        return self


def expected(norm, restarts):
    """Return the result of attacking each sample alone: the last iterate, whether it is wrong, and the cost."""
    ball, step_size = BALLS[norm]
    box = [0.0] * IMAGES[0].numel(), [1.0] * IMAGES[0].numel()
    found = []
    for k, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        starts = [None if restarts is None else ball.sample(image[None], SEED, [k], r)[0] for r in range(restarts or 1)]
        found.append(ref.attacked_until_wrong(NET, image, label, norm, ball.eps, step_size, STEPS, box, starts))
    return found


EXPECTED = {(norm, restarts): expected(norm, restarts) for norm in BALLS for restarts in (None, 1, 3)}
CASES = [pytest.param(*case, id=f"{case[0]} {case[1] or 'BIM'}") for case in EXPECTED]


@pytest.mark.parametrize(("norm", "restarts"), CASES)
def test_the_samples_are_of_all_kinds(norm, restarts):
    """Samples that are wrong from the start, become wrong on the way or at the end, or stay right."""
    costs = [cost for _, _, cost in EXPECTED[norm, restarts]]
    broken = [wrong for _, wrong, _ in EXPECTED[norm, restarts]]
    assert costs.count(0) == 2
    assert len(set(costs)) > 3
    assert 4 < sum(broken) < COUNT - 2


@pytest.mark.parametrize(("norm", "restarts"), CASES)
@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    order=st.permutations(range(COUNT)),
    cuts=st.lists(st.integers(1, COUNT - 1), max_size=4, unique=True),
    batch_size=st.integers(1, COUNT + 3),
)
def test_every_sample_ends_as_it_does_alone(norm, restarts, order, cuts, batch_size):
    """For any batch size and order of samples, also with the same cost."""
    edges = [0, *sorted(cuts), COUNT]
    run = Run(norm, restarts, batch_size).all([order[a:b] for a, b in itertools.pairwise(edges)])
    assert set(run.ended) == set(range(COUNT))
    assert len(run.active._moving) == len(run.active._arrived) == 0
    for k, (last, wrong, _) in enumerate(EXPECTED[norm, restarts]):
        adversarial, scores = run.ended[k]
        assert (scores.argmax() != LABELS[k]) == wrong
        torch.testing.assert_close(adversarial, last, rtol=0, atol=1e-12)
        torch.testing.assert_close(scores, NET(last[None])[0].detach(), rtol=0, atol=1e-9)
    assert run.active.passes == pytest.approx(sum(cost for _, _, cost in EXPECTED[norm, restarts]), rel=1e-12)
    assert run.active.passes == pytest.approx(sum(size if grad else size / 3 for size, grad in run.calls), rel=1e-12)
    assert max(size for size, _ in run.calls) <= batch_size


@pytest.mark.parametrize("norm", BALLS)
def test_robust_samples_end_where_the_whole_attack_does(norm):
    ball, step_size = BALLS[norm]
    run = Run(norm, None, 5).all([list(range(COUNT))])
    final = projected_gradient(NET, IMAGES, LABELS, ball, step_size, STEPS)
    robust = [k for k, (_, wrong, _) in enumerate(EXPECTED[norm, None]) if not wrong]
    assert robust
    for k in robust:
        torch.testing.assert_close(run.ended[k][0], final[k], rtol=0, atol=1e-12)
        assert NET(final[k : k + 1]).argmax() == LABELS[k]


def test_without_the_gradient_at_the_image_one_pass_more_is_made():
    run = Run("linf", None, 4)
    run.active.put(IMAGES, LABELS, torch.arange(COUNT), NET(IMAGES).detach(), None)
    run.active.run(run.logits, everything=True)
    known = sum(cost for _, _, cost in EXPECTED["linf", None])
    assert run.active.passes == pytest.approx(known + COUNT - 2)
    assert [bool(run.ended[k][1].argmax() != LABELS[k]) for k in range(COUNT)] == [e[1] for e in EXPECTED["linf", None]]


def test_batches_are_full_but_for_the_last_ones():
    """Samples that arrive in small parts, one step apart, and all stay right."""
    run = Run("linf", None, 6)
    run.active.rule.ball = Ball("linf", 0.0, 0.0, 1.0)
    which = [k for k in range(COUNT) if k not in (2, 9)][:5]
    scores = NET(IMAGES[which]).detach()
    run.active.put(IMAGES[which[:3]], LABELS[which[:3]], torch.tensor(which[:3]), scores[:3], None)
    run.put(which[3:])
    run.active.run(run.logits)
    assert not run.calls
    run.active.run(run.logits, everything=True)
    assert [size for size, grad in run.calls if not grad] == [5]
    assert set(run.ended) == set(which)


def test_nothing_and_only_wrong_samples_cost_nothing():
    run = Run("l2", None, 4)
    run.active.run(run.logits, everything=True)
    run.all([[2, 9], [9][:0]])
    assert (run.calls, run.active.passes, set(run.ended)) == ([], 0.0, {2, 9})
    assert torch.equal(run.ended[2][0], IMAGES[2])


def test_tensors_of_inference_mode_can_be_attacked():
    with torch.inference_mode():
        x, y = IMAGES + 0, LABELS + 0
    ended = []
    active = ActiveSet(FixedSteps(BALLS["linf"][0], CROSS_ENTROPY, STEPS, 1, 0.006, None), 4, ended.append)
    with torch.no_grad():
        active.put(x, y, torch.arange(COUNT), NET(x), None)
        active.run(NET, everything=True)
    assert sum(len(part.labels) for part in ended) == COUNT
    assert not any(part.adversarial.requires_grad or part.scores.requires_grad for part in ended)
