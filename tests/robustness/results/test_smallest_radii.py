"""Smallest radii: closed forms on linear models, what is counted, and the interval of the median."""

import math

import pytest
import torch
from scipy.stats import binom

from lightning_normgeo.robustness import InputSpace, RobustnessEvaluator, RobustnessSettings
from lightning_normgeo.robustness.results.statistics.smallest_radii import radii_of, smallest_radii, summary_of
from support.small_classifiers import conv_net, draw, pixels

PIXELS = InputSpace(None, None, normalized_data=False)
COUNT, BISECTIONS = 24, 9
WEIGHT = draw(12, seed=3)
IMAGES = 0.5 + 0.08 * draw(COUNT, 3, 2, 2, seed=4)
OFFSET = float((IMAGES.flatten(1) @ WEIGHT).median())


def linear(images):
    """Return logits (0, w·x − b), of which the distance of an image from the boundary is known."""
    rise = images.flatten(1) @ WEIGHT - OFFSET
    return torch.stack([torch.zeros_like(rise), rise], 1)


def evaluated(asked, net=linear, images=IMAGES, labels=None, batches=1, **changes):
    labels = net(images).argmax(1) if labels is None else labels
    run = RobustnessEvaluator(net, PIXELS, RobustnessSettings(attacks=asked, **changes))
    for part in torch.arange(len(images)).chunk(batches):
        run.put(images[part], labels[part], part.tolist())
    decisions = run.finish()
    return decisions, smallest_radii(decisions, run.settings.all_attacks)


@pytest.mark.parametrize("attack", ["bim", "pgd", "apgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_distance_from_the_boundary_of_a_linear_model(attack, norm):
    eps = 0.2 if norm == "linf" else 0.7
    asked = {"name": "x", "attack": attack, "norm": norm, "eps": eps, "bisections": BISECTIONS, "loss": "margin"}
    decisions, found = evaluated([asked], steps=20)
    (name,) = found
    margins = (IMAGES.flatten(1) @ WEIGHT - OFFSET).abs()
    distances = margins / (WEIGHT.abs().sum() if norm == "linf" else WEIGHT.norm())
    radii = radii_of(decisions.of(name), norm)
    within = distances < eps
    assert 5 < int(within.sum()) <= COUNT
    assert torch.equal(radii.isfinite(), within)
    assert bool((radii >= distances - 1e-6)[within].all()), "no perturbation is shorter"
    # the attack at a radius ends at its surface, so bisection finds the distance up to its last interval
    assert bool((radii - distances <= eps / 2**BISECTIONS + 1e-6)[within].all())


def test_misclassified_images_count_as_zero_and_unbroken_ones_as_infinite():
    labels = linear(IMAGES).argmax(1)
    labels[:3] = 1 - labels[:3]
    asked = {"name": "x", "attack": "bim", "eps": 1e-4, "bisections": 3}
    decisions, found = evaluated([asked], labels=labels)
    radii = radii_of(decisions.of("x"), "linf")
    assert radii[:3].tolist() == [0.0] * 3
    assert bool(radii[3:].isinf().any())
    assert found["x"].n == COUNT
    assert found["x"].median == math.inf


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_radii_do_not_depend_on_batches(batch_size):
    net, images = conv_net(3, torch.float64), pixels(14, 3, 8, 8, seed=2)
    asked = [
        {"name": name, "eps": 0.05, "bisections": 5, **more}
        for name, more in (("bim", {}), ("apgd", {"steps": 4}), ("square", {"queries": 10}))
    ]
    once, found = evaluated(asked, net, images, steps=5)
    again, _ = evaluated(asked, net, images, steps=5, batches=3, batch_size=batch_size)
    for name in ("bim", "apgd", "square"):
        torch.testing.assert_close(again.of(name).linf, once.of(name).linf, rtol=1e-6, atol=1e-8)
        assert len({round(value, 5) for value in once.of(name).linf.tolist()}) > 4
        assert found[name].broken > 2


def test_a_radius_that_was_found_breaks_the_sample_and_rows_are_those_at_it():
    net, images = conv_net(3, torch.float64), pixels(14, 3, 8, 8, seed=2)
    labels = net(images).argmax(1)
    decisions, _ = evaluated([{"name": "bim", "eps": 0.05, "bisections": 6}], net, images, steps=5)
    whole, _ = evaluated(["bim"], net, images, eps=0.05, steps=5, semantics="any")
    assert torch.equal(decisions.of("bim").correct, whole.of("bim").correct)
    radii = radii_of(decisions.of("bim"), "linf")
    for k in radii.isfinite().nonzero()[:, 0].tolist():
        at, _ = evaluated(
            [{"name": "bim", "eps": float(radii[k]) + 1e-6}],
            net,
            images[k : k + 1],
            labels[k : k + 1],
            steps=5,
            semantics="any",
        )
        assert not bool(at.of("bim").correct)


@pytest.mark.parametrize("n", [1, 5, 6, 17, 100, 101])
def test_the_interval_of_a_median_encloses_it_with_95_percent(n):
    ordered = torch.arange(1.0, n + 1).double()
    found = summary_of(ordered.flip(0), "l2")
    assert found.median == (n + 1) / 2
    if found.ci_low == 0.0:
        assert 2 * 0.5**n > 0.05, "no two order statistics would do"
        assert found.ci_high == math.inf
        return
    k = int(found.ci_low)
    assert found.ci_high == n + 1 - k
    missed = [2 * binom.cdf(j - 1, n, 0.5) for j in (k, k + 1)]
    assert missed[0] <= 0.05 < missed[1]


def test_the_curve_is_the_accuracy_at_each_radius():
    radii = torch.tensor([0.0, 0.1, 0.3, math.inf]).double()
    found = summary_of(radii, "linf")
    for edge, accuracy in found.curve:
        assert accuracy == sum(float(r) > edge for r in radii) / 4
    assert [found.curve[0], found.curve[-1]] == [(0.0, 0.75), (pytest.approx(0.3), 0.25)]


def test_cw_and_deepfool_have_medians_in_l2():
    net, images = conv_net(3, torch.float32), pixels(6, 3, 8, 8, seed=2, dtype=torch.float32)
    _, found = evaluated(["torchattacks.DeepFool", "bim", "torchattacks.FGSM"], net, images)
    assert list(found) == ["torchattacks.DeepFool"]
    assert 0 < found["torchattacks.DeepFool"].median < 2
