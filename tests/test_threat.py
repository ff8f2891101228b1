"""Threat models, input spaces, and the presets as an evaluation applies them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import (
    PRESETS,
    InputSpace,
    RobustnessEvaluator,
    ThreatModel,
    gaussian_noise,
    threat_model,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
PIXELS, NORMALIZED = InputSpace(MEAN, STD, normalized_data=False), InputSpace(MEAN, STD, normalized_data=True)


def images(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(pixels, inverse=False):
    channels = [
        pixels[:, c] * STD[c] + MEAN[c] if inverse else (pixels[:, c] - MEAN[c]) / STD[c] for c in range(len(MEAN))
    ]
    return torch.stack(channels, 1)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("pixel-8-255", ("pixel", 8 / 255, 2 / 255, 10, 0.05, 0.0, 1.0, True)),
        ("galloway2019", ("normalized", 0.03, 0.003, 20, 0.25, -2.0, 2.0, False)),
    ],
)
def test_presets_are_what_is_documented(preset, expected):
    names = ("space", "eps", "step_size", "steps", "noise_std", "lower", "upper", "clip_noise")
    assert threat_model(preset).settings() == dict(zip(names, expected, strict=True))


def test_there_are_no_undocumented_presets():
    assert set(PRESETS) == {"pixel-8-255", "galloway2019"}


def test_changes_replace_settings_and_none_keeps_them():
    changed = threat_model("galloway2019", eps=0.5, steps=3, step_size=None, clip_noise=True, noise_std=0.0)
    assert changed.settings() == threat_model("galloway2019").settings() | {
        "eps": 0.5,
        "steps": 3,
        "clip_noise": True,
        "noise_std": 0.0,
    }
    assert threat_model("galloway2019").eps == 0.03, "the preset itself stays"
    assert threat_model("galloway2019", eps=1.5).eps == 1.5, "normalized space has no unit range"


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("galloway", {}, r"preset='galloway' is unknown.*'galloway2019'"),
        ("zzz", {}, r"preset='zzz' is unknown.*'galloway2019', 'pixel-8-255'"),
        ("pixel-8-255", {"eps": -0.1}, r"eps=-0\.1 must be at least 0.*pixels"),
        ("galloway2019", {"eps": -0.1}, r"eps=-0\.1 must be at least 0.*standard deviations"),
        ("pixel-8-255", {"eps": math.nan}, r"eps=nan must be at least 0"),
        ("pixel-8-255", {"step_size": -1e-9}, r"step_size=-1e-09 must be at least 0"),
        ("pixel-8-255", {"noise_std": -1}, r"noise_std=-1 must be at least 0"),
        ("pixel-8-255", {"steps": 0}, r"steps=0 must be an integer, at least 1"),
        ("pixel-8-255", {"steps": True}, r"steps=True must be an integer, at least 1"),
        ("pixel-8-255", {"eps": 8}, r"eps=8 is larger than the pixel range.*Did you mean 8/255 = 0\.0314\?"),
        ("pixel-8-255", {"lower": 1.0}, r"lower=1\.0 must be less than upper=1\.0"),
    ],
    ids=lambda value: str(value) if not isinstance(value, str) else None,
)
def test_impossible_settings_are_refused_with_a_reason(preset, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        threat_model(preset, **changes)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), None, "must be given together"),
        (None, (0.5,), "must be given together"),
        ((0.5, 0.5), (0.5,), "one value per channel"),
        ((0.5, 0.5), (0.5, 0.0), r"std=\(0\.5, 0\.0\) must be positive"),
        ((0.5,), (-1.0,), "must be positive"),
    ],
)
def test_impossible_normalizations_are_refused(mean, std, message):
    with pytest.raises(ConfigurationError, match=message):
        InputSpace(mean, std, normalized_data=False)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["pixel", "normalized"]), st.integers(0, 3))
def test_spaces_are_inverses_of_each_other(seed, normalized_data, space, extra_dims):
    pixels = images(2, 3, *[2] * extra_dims, seed=seed)
    inputs = NORMALIZED if normalized_data else PIXELS
    loaded = by_hand(pixels) if normalized_data else pixels
    inside = inputs.to_space(loaded, space)
    torch.testing.assert_close(inside, by_hand(pixels) if space == "normalized" else pixels, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs.from_space(inside, space), loaded, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs.to_pixels(inside, space), pixels, rtol=1e-12, atol=1e-12)


def test_pixels_need_no_normalization_but_the_normalized_space_does():
    inputs, x = InputSpace(None, None, normalized_data=False), images(2, 3, 4, 4)
    assert inputs.to_space(x, "pixel") is x
    assert inputs.to_pixels(inputs.from_space(x, "pixel"), "pixel") is x
    with pytest.raises(ConfigurationError, match=r"RobustnessEvaluation\(mean=…, std=…\)"):
        inputs.to_space(x, "normalized")


@pytest.mark.parametrize("inputs", [PIXELS, NORMALIZED], ids=["loader yields pixels", "loader yields normalized"])
def test_galloways_noise_is_unclipped_and_its_bim_stays_within_two(inputs):
    """In normalized space, whatever the loader yields; the model sees the loader's form."""
    pixels, labels = images(6, 3, 4, 4), torch.tensor([0, 1] * 3)
    pixels[:, :, 0], pixels[:, :, 1] = 0.0, 1.0  # beyond ±2 after normalization
    loaded, seen = by_hand(pixels) if inputs.normalized_data else pixels, []

    def logits(x):
        seen.append(x.detach())
        return x.flatten(1)[:, :2] - x.flatten(1)[:, 2:4]

    evaluator = RobustnessEvaluator(threat_model("galloway2019"), inputs, seed=5)
    result = evaluator.evaluate(logits, loaded, labels, range(6))
    z = by_hand(pixels)
    noisy = by_hand(result.pixels["gaussian"])
    torch.testing.assert_close(noisy, gaussian_noise(z, 0.25, 5, range(6)), rtol=0, atol=1e-12)
    assert noisy.abs().max() > 2.3
    attacked = by_hand(result.pixels["bim"])
    assert attacked.abs().max() <= 2 + 1e-12
    assert ((attacked - z.clamp(-2, 2)).abs() <= 0.03 + 1e-12).all()
    assert (z.abs() > 2).any()
    last = by_hand(seen[-1], inverse=True) if inputs.normalized_data else seen[-1]
    torch.testing.assert_close(last, result.pixels["bim"], rtol=0, atol=1e-12)
    torch.testing.assert_close(result.pixels["clean"], pixels, rtol=0, atol=1e-12)


def test_the_pixel_preset_keeps_everything_within_pixels():
    pixels, labels = images(4, 3, 4, 4), torch.tensor([0, 1, 0, 1])
    evaluator = RobustnessEvaluator(threat_model("pixel-8-255", noise_std=1.0), InputSpace(None, None, False))
    result = evaluator.evaluate(lambda x: x.flatten(1)[:, :2], pixels, labels, range(4))
    for name in ("gaussian", "bim"):
        assert result.pixels[name].min() >= 0
        assert result.pixels[name].max() <= 1
    assert (result.pixels["gaussian"] == 1).any()
    assert (result.pixels["bim"] - pixels).abs().max() == pytest.approx(8 / 255, rel=1e-9)


def test_a_custom_threat_model_is_checked_too():
    with pytest.raises(ConfigurationError, match="steps=-1"):
        ThreatModel("pixel", 0.1, 0.1, -1, 0.0, 0.0, 1.0, clip_noise=True)
