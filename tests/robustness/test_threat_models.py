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
    RobustnessSettings,
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


def box(threat, inputs, dtype=torch.float64):
    return threat.box(inputs, torch.zeros(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("pixel-8-255", ("pixel", 8 / 255, 2 / 255, 10, 0.05, 0.0, 1.0, True, 0.5, False)),
        ("galloway2019", ("normalized", 0.03, 0.003, 20, 0.25, -2.0, 2.0, False, None, True)),
        ("galloway2019-boxed", ("normalized", 0.03, 0.003, 20, 0.25, None, None, False, None, True)),
    ],
)
def test_presets_are_what_is_documented(preset, expected):
    names = ("space", "eps", "step_size", "steps", "noise_std", "lower", "upper", "clip_noise", "eps_l2", "box_first")
    assert threat_model(preset).settings() == dict(zip(names, expected, strict=True))


def test_there_are_no_undocumented_presets():
    assert set(PRESETS) == {"pixel-8-255", "galloway2019", "galloway2019-boxed"}


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
        ("zzz", {}, r"preset='zzz' is unknown.*'pixel-8-255', 'galloway2019', 'galloway2019-boxed'"),
        ("pixel-8-255", {"eps": -0.1}, r"eps=-0\.1 must be at least 0.*pixels"),
        ("galloway2019", {"eps": -0.1}, r"eps=-0\.1 must be at least 0.*standard deviations"),
        ("pixel-8-255", {"eps": math.nan}, r"eps=nan must be at least 0"),
        ("pixel-8-255", {"step_size": -1e-9}, r"step_size=-1e-09 must be at least 0"),
        ("pixel-8-255", {"noise_std": -1}, r"noise_std=-1 must be at least 0"),
        ("pixel-8-255", {"steps": 0}, r"steps=0 must be an integer, at least 1"),
        ("pixel-8-255", {"steps": True}, r"steps=True must be an integer, at least 1"),
        ("pixel-8-255", {"eps": 8}, r"eps=8 is larger than the pixel range.*Did you mean 8/255 = 0\.0314\?"),
        ("pixel-8-255", {"eps": math.inf}, r"eps=inf must be at least 0 and finite"),
        ("pixel-8-255", {"eps_l2": -1}, r"eps_l2=-1 must be at least 0"),
        ("pixel-8-255", {"lower": 1.0}, r"lower=1\.0 must be less than upper=1\.0"),
        ("pixel-8-255", {"lower": (0.0, 1.0)}, r"lower=\(0\.0, 1\.0\) must be less than upper=1\.0"),
        ("pixel-8-255", {"lower": ()}, r"lower=\(\) must be a number, or one for each channel"),
        ("pixel-8-255", {"upper": (1.0, math.nan)}, r"upper=\(1\.0, nan\) must be a number"),
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


# --- the box ----------------------------------------------------------------------------------------------------------


def test_numbers_stay_numbers_and_tuples_become_channels():
    assert box(threat_model("pixel-8-255"), PIXELS) == (0.0, 1.0)
    assert box(threat_model("galloway2019"), NORMALIZED) == (-2.0, 2.0)
    lower, upper = box(threat_model("pixel-8-255", lower=(0.1, 0.2, 0.3)), PIXELS, torch.float32)
    assert (lower.shape, lower.flatten().tolist()) == ((1, 3, 1, 1), pytest.approx([0.1, 0.2, 0.3]))
    assert upper == 1.0
    assert lower.dtype == upper.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [PIXELS, NORMALIZED], ids=["loader yields pixels", "loader yields normalized"])
def test_ends_left_out_are_exactly_where_black_and_white_pixels_are(inputs, dtype):
    lower, upper = box(threat_model("galloway2019-boxed"), inputs, dtype)
    for value, end in ((0.0, lower), (1.0, upper)):
        assert torch.equal(by_hand(torch.full((1, 3, 1, 1), value, dtype=dtype)), end)
    assert box(ThreatModel("pixel", 0.1, 0.1, 1, 0.1, None, None, clip_noise=True), inputs) == (0.0, 1.0)


@pytest.mark.parametrize("lower", [-1.0, (-1.0, -0.5, 0.0), None], ids=str)
@pytest.mark.parametrize("upper", [1.0, (0.5, 1.0, 1.5), None], ids=str)
def test_all_kinds_of_ends_can_be_combined(lower, upper):
    threat = ThreatModel("normalized", 0.1, 0.1, 1, 0.1, lower, upper, clip_noise=True)
    values = torch.linspace(-4, 4, 16, dtype=torch.float64).expand(2, 3, 16).view(2, 3, 4, 4)
    found = values.clamp(*box(threat, NORMALIZED))
    for c in range(3):
        low, high = ((pixel - MEAN[c]) / STD[c] for pixel in (0, 1))
        low = low if lower is None else lower[c] if isinstance(lower, tuple) else lower
        high = high if upper is None else upper[c] if isinstance(upper, tuple) else upper
        ends = found[:, c].min().item(), found[:, c].max().item()
        assert ends == pytest.approx((low, high), rel=1e-14)


def test_ends_that_fit_no_image_are_refused():
    with pytest.raises(ConfigurationError, match=r"lower=\(0\.1, 0\.2\) has 2 values, images have 3 channels"):
        box(threat_model("pixel-8-255", lower=(0.1, 0.2)), PIXELS)
    with pytest.raises(ConfigurationError, match=r"lower=3\.0 must be less than upper=None, where None is"):
        box(threat_model("galloway2019-boxed", lower=3.0), NORMALIZED)
    with pytest.raises(ConfigurationError, match=r"RobustnessEvaluation\(mean=…, std=…\)"):
        box(threat_model("galloway2019-boxed"), InputSpace(None, None, normalized_data=False))


# --- as an evaluation applies them ------------------------------------------------------------------------------------


def evaluated(preset, inputs, pixels, **changes):
    """Return every attack's images as pixels, and the model's last input."""
    loaded, seen = by_hand(pixels) if inputs.normalized_data else pixels, []

    def logits(x):
        seen.append(x.detach())
        return x.flatten(1)[:, :2] - x.flatten(1)[:, 2:4]

    run = RobustnessEvaluator(logits, inputs, RobustnessSettings(preset, **changes), num_images=len(pixels))
    run.put(loaded, torch.arange(len(pixels)) % 2, range(len(pixels)))
    run.finish()
    shown = {name: torch.stack([of[k] for k in range(len(pixels))]) for name, of in run.shown.pixels.items()}
    return shown, seen


@pytest.mark.parametrize("inputs", [PIXELS, NORMALIZED], ids=["loader yields pixels", "loader yields normalized"])
def test_galloways_noise_is_unclipped_and_its_bim_stays_within_two(inputs):
    """In normalized space, for any form of the loader's images; the model gets the loader's form."""
    pixels = images(6, 3, 4, 4)
    pixels[:, :, 0], pixels[:, :, 1] = 0.0, 1.0  # beyond ±2 after normalization
    shown, seen = evaluated("galloway2019", inputs, pixels, seed=5)
    z, noisy, attacked = (by_hand(x) for x in (pixels, shown["gaussian"], shown["bim"]))
    torch.testing.assert_close(noisy, gaussian_noise(z, 0.25, 5, range(6)), rtol=0, atol=1e-12)
    assert noisy.abs().max() > 2.3
    assert attacked.abs().max() <= 2 + 1e-12
    assert ((attacked - z.clamp(-2, 2)).abs() <= 0.03 + 1e-12).all()
    assert (z.abs() > 2).any()
    last = by_hand(seen[-1], inverse=True) if inputs.normalized_data else seen[-1]
    torch.testing.assert_close(last, shown["bim"], rtol=0, atol=1e-12)
    torch.testing.assert_close(shown["clean"], pixels, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", ["bim", "pgd", "bim_l2", "pgd_l2"])
def test_the_boxed_preset_stays_within_pixels_and_within_the_radius(attack):
    pixels = images(6, 3, 4, 4)
    pixels[:, :, 0], pixels[:, :, 1] = 0.0, 1.0
    shown, _ = evaluated("galloway2019-boxed", NORMALIZED, pixels, attacks=[attack])
    assert shown[attack].min() >= -1e-15
    assert shown[attack].max() <= 1 + 1e-15
    change = by_hand(shown[attack]) - by_hand(pixels)
    size, radius = change.abs().max(), 0.03
    if attack.endswith("l2"):
        size, radius = change.flatten(1).norm(dim=1).max(), 0.03 * math.sqrt(48)
    assert radius / 2 < size <= radius + 1e-12


def test_the_l2_radius_of_the_pixel_preset_is_a_half():
    shown, _ = evaluated("pixel-8-255", PIXELS, 0.45 + 0.1 * images(4, 3, 4, 4), attacks=["bim_l2"])
    change = (shown["bim_l2"] - shown["clean"]).flatten(1).norm(dim=1)
    torch.testing.assert_close(change, torch.full_like(change, 0.5), rtol=1e-12, atol=0)


def test_the_pixel_preset_keeps_everything_within_pixels():
    pixels = images(4, 3, 4, 4)
    shown, _ = evaluated("pixel-8-255", PIXELS, pixels, noise_std=0.5)
    for name in ("gaussian", "bim"):
        assert shown[name].min() >= 0
        assert shown[name].max() <= 1
    assert (shown["gaussian"] == 1).any()
    assert (shown["bim"] - pixels).abs().max() == pytest.approx(8 / 255, rel=1e-9)


def test_a_custom_threat_model_is_checked_too():
    with pytest.raises(ConfigurationError, match="steps=-1"):
        ThreatModel("pixel", 0.1, 0.1, -1, 0.0, 0.0, 1.0, clip_noise=True)
    with pytest.raises(ConfigurationError, match="space='rgb' is unknown"):
        ThreatModel("rgb", 0.1, 0.1, 1, 0.0, 0.0, 1.0, clip_noise=True)
