"""Corruptions: what each does to an image, growing with the severity, drawn by sample, and their summary."""

import math

import pytest
import torch
from torch.nn.functional import avg_pool2d

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness import InputSpace, RobustnessEvaluator, RobustnessSettings
from lightning_normgeo.robustness.attacks.attack import AttackBatch
from lightning_normgeo.robustness.attacks.corruptions import CORRUPTIONS, SEVERITIES
from lightning_normgeo.robustness.results.statistics.corruption_summary import corruption_summary
from support.small_classifiers import conv_net, pixels

PIXELS = InputSpace(None, None, normalized_data=False)
RANDOM = ("noise", "shot", "impulse", "speckle", "elastic")


def images(n=4, side=32, channels=3, seed=1):
    """Smooth images, as photographs are."""
    rough = pixels(n, channels, side + 8, side + 8, seed=seed, dtype=torch.float32)
    smooth = avg_pool2d(rough, 9, 1)
    return (0.5 + 4 * (smooth - 0.5)).clamp(0, 1)


def corrupted(kind, severity, x, inputs=PIXELS, indices=None, seed=0, **changes):
    """Return corrupted images as pixels."""
    asked = {"name": "corruptions", "kinds": kind, "severities": severity}
    settings = RobustnessSettings(attacks=[asked], seed=seed, **changes)
    (attack,) = settings.all_attacks
    space = settings.threat.space
    labels = torch.zeros(len(x), dtype=torch.long)
    places = range(len(x)) if indices is None else indices
    shown = inputs.to_space(x, space)
    batch = AttackBatch(None, shown, labels, places, (0.0, 1.0), None, inputs, settings.threat, seed)
    return inputs.to_pixels(attack.perturb(batch), space)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_images_change_more_with_the_severity_and_stay_in_range(kind):
    x = images(8)
    distances = []
    for severity in SEVERITIES:
        changed = corrupted(kind, severity, x)
        assert changed.shape == x.shape
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
        distances.append(float((changed - x).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] > 0
    assert distances[-1] > 1.2 * distances[0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_depends_on_seed_and_sample_alone(kind):
    x = images(4)
    together = corrupted(kind, 3, x, indices=[5, 6, 7, 8])
    assert torch.equal(corrupted(kind, 3, x[[2, 0]], indices=[7, 5]), together[[2, 0]])
    other = corrupted(kind, 3, x, indices=[5, 6, 7, 8], seed=1)
    assert torch.equal(other, together) == (kind not in RANDOM)


def test_noises_have_the_deviations_they_are_named_for():
    flat = torch.full((40, 3, 32, 32), 0.5)
    for severity, amount in zip(SEVERITIES, CORRUPTIONS["noise"].amounts, strict=True):
        assert float((corrupted("noise", severity, flat) - 0.5).std()) == pytest.approx(amount, rel=0.02)
    for severity, amount in zip(SEVERITIES, CORRUPTIONS["speckle"].amounts, strict=True):
        assert float((corrupted("speckle", severity, flat) - 0.5).std()) == pytest.approx(0.5 * amount, rel=0.02)
    for severity, amount in zip(SEVERITIES, CORRUPTIONS["shot"].amounts, strict=True):
        shot = corrupted("shot", severity, flat)
        assert float((shot - 0.5).std()) == pytest.approx(math.sqrt(0.5 / amount), rel=0.02)
        assert float(shot.mean()) == pytest.approx(0.5, abs=0.003)
    for severity, amount in zip(SEVERITIES, CORRUPTIONS["impulse"].amounts, strict=True):
        assert float((corrupted("impulse", severity, flat) != 0.5).float().mean()) == pytest.approx(amount, rel=0.05)


def test_blur_keeps_flat_images_and_the_mean_and_contrast_keeps_the_mean():
    flat = torch.full((2, 3, 32, 32), 0.3)
    torch.testing.assert_close(corrupted("blur", 5, flat), flat, rtol=0, atol=1e-6)
    torch.testing.assert_close(corrupted("elastic", 5, flat), flat, rtol=0, atol=1e-5)
    torch.testing.assert_close(corrupted("pixelate", 5, flat), flat, rtol=0, atol=1e-6)
    x = images() * 0.4 + 0.3
    paler = corrupted("contrast", 3, x)
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(paler - mean, 0.4 * (x - mean), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(corrupted("brightness", 2, x), x + 0.1, rtol=0, atol=1e-6)
    gray = corrupted("saturation", 5, x)
    torch.testing.assert_close(gray, x.mean(1, keepdim=True).expand_as(x), rtol=0, atol=1e-6)


def test_an_impulse_response_of_blur_is_a_gaussian():
    point = torch.zeros(1, 1, 33, 33)
    point[..., 16, 16] = 1
    blurred = corrupted("blur", 4, point)[0, 0]
    sigma = 1.0 * 33 / 32
    offset = torch.arange(33) - 16.0
    expected = torch.exp(-offset.square() / (2 * sigma**2))
    torch.testing.assert_close(blurred[16] / blurred[16, 16], expected, rtol=0, atol=2e-3)


def test_normalized_images_are_corrupted_as_pixels():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    inputs = InputSpace(mean, std, normalized_data=True)
    x = images()
    normalized = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    plain = corrupted("jpeg", 3, x)
    for preset in ("pixel-8-255", "galloway2019"):
        torch.testing.assert_close(corrupted("jpeg", 3, normalized, inputs, preset=preset), plain, rtol=0, atol=1e-5)


def test_inputs_that_are_no_images_are_refused():
    x = pixels(3, 7, 8, 8, dtype=torch.float32)
    with pytest.raises(UnsuitableError, match=r"images of one or three channels, not for inputs \(7, 8, 8\)"):
        corrupted("noise", 1, x)


def test_the_summary_is_the_mean_over_kinds_and_severities():
    net, x = conv_net(3), images(40, side=8)
    labels = net(x).argmax(1)
    asked = {"name": "corruptions", "kinds": ["noise", "contrast", "jpeg"], "severities": [1, 5]}
    run = RobustnessEvaluator(net, PIXELS, RobustnessSettings(attacks=[asked]))
    run.put(x, labels, range(40))
    decisions = run.finish()
    names = [f"corruptions-{kind}_s{k}" for kind in asked["kinds"] for k in (1, 5)]
    assert decisions.attacks == ["clean", *names]
    found = corruption_summary(decisions, run.settings.all_attacks)
    by_name = {name: float(decisions.of(name).correct.double().mean()) for name in names}
    assert found.accuracy == pytest.approx(sum(by_name.values()) / 6)
    assert found.ci_low < found.accuracy < found.ci_high <= 1
    assert found.by_kind["jpeg"] == pytest.approx((by_name[names[4]] + by_name[names[5]]) / 2)
    assert found.by_severity[5] == pytest.approx(sum(by_name[name] for name in names[1::2]) / 3)
    assert found.n == 40
    assert corruption_summary(decisions, []) is None
