"""Losses of attacks: against their formulas for one image at a time, invariances, and what they are refused for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.attacks.search.losses import LOSSES, Loss
from support.reference_attacks import loss_of
from support.small_classifiers import draw

NAMES = list(LOSSES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [0, 3])
@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 99), classes=st.integers(4, 9), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_values_and_gradients_are_those_of_the_formula(name, targets, seed, classes, scale):
    scores = (scale * draw(7, classes, seed=seed)).requires_grad_(True)
    labels = draw(7, seed=seed + 1).mul(100).long() % classes
    loss = Loss(name, targets)
    aims = loss.target_of(scores.detach(), labels, torch.arange(7) % 3) if targets else None
    found = loss(scores, labels, aims)
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    for k in range(7):
        row = scores[k].detach().clone().requires_grad_(True)
        expected = loss_of(name, list(row), int(labels[k]), None if aims is None else int(aims[k]))
        (slope,) = torch.autograd.grad(expected, row)
        torch.testing.assert_close(found[k], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient[k], slope, rtol=1e-10, atol=1e-12 / scale)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_without_targets_is_largest_where_the_label_is_least_likely(name):
    scores = torch.tensor([[5.0, 0.0, 1.0, 2.0]])
    by_label = [float(Loss(name)(scores, torch.tensor([k]))) for k in range(4)]
    assert by_label.index(min(by_label)) == 0
    assert by_label.index(max(by_label)) == 1


def test_margin_and_dlr_are_positive_exactly_for_misclassified_images():
    scores, labels = draw(200, 6), torch.arange(200) % 6
    wrong = scores.argmax(1) != labels
    assert 20 < int(wrong.sum()) < 200
    for name in ("margin", "dlr"):
        assert torch.equal(Loss(name)(scores, labels) > 0, wrong)


def test_dlr_does_not_change_with_the_scale_of_the_logits():
    scores, labels = draw(20, 6), torch.arange(20) % 6
    for targets in (0, 2):
        loss = Loss("dlr", targets)
        aims = loss.target_of(scores, labels, torch.zeros_like(labels)) if targets else None
        torch.testing.assert_close(loss(1e4 * scores, labels, aims), loss(scores, labels, aims), rtol=1e-10, atol=0)


def test_targets_are_the_likeliest_wrong_classes_in_turn():
    scores = torch.tensor([[3.0, 9.0, 1.0, 7.0]]).expand(5, 4)
    aims = Loss("margin", 9).target_of(scores, torch.full((5,), 1), torch.arange(5))
    assert aims.tolist() == [3, 0, 2, 3, 0]  # four classes have three wrong ones
    assert Loss("margin", 9).starts(2, 4) == 6
    assert Loss("margin", 2).starts(2, 4) == 4
    assert Loss("margin").starts(2, 4) == 2


@pytest.mark.parametrize(("targets", "classes"), [(0, 2), (1, 3)])
def test_too_few_classes_are_refused(targets, classes):
    with pytest.raises(UnsuitableError, match=rf"'dlr'.* needs at least {classes + 1} classes.* has {classes}.*margin"):
        Loss("dlr", targets)(draw(2, classes), torch.tensor([0, 1]), torch.tensor([1, 0]))
