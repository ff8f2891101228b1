"""The lattice of 8-bit images confirms only the right normalization, and reveals it if the lattice is complete."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_normgeo.robustness.inputs.pixel_lattice import confirms, fitted, on_lattice

PROPERTY = settings(deadline=None, derandomize=True, max_examples=120)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def levels(count=4, channels=3, size=16, seed=0, low=0, high=255):
    """Return random 8-bit images with both ends of the range in every channel."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(low, high + 1, (count, channels, size, size), generator=generator)
    drawn[0, :, 0, 0], drawn[-1, :, -1, -1] = low, high
    return drawn


def shaped(values):
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def normalized(raw, mean, std):
    """Normalize as torchvision does: bytes to float32 in [0, 1], then (x - mean) / std in float32."""
    return (raw.float() / 255 - shaped(mean)) / shaped(std)


@st.composite
def constants(draw, count=None):
    count = draw(st.sampled_from([1, 3])) if count is None else count
    return (
        tuple(draw(st.floats(0, 1)) for _ in range(count)),
        tuple(draw(st.floats(0.05, 1.5)) for _ in range(count)),
    )


SEEDS = st.integers(0, 10**6)


# --- what is confirmed ------------------------------------------------------------------------------------------------


@PROPERTY
@given(constants(), SEEDS, st.integers(0, 120), st.integers(150, 255))
def test_the_right_constants_are_confirmed(right, seed, low, high):
    images = normalized(levels(seed=seed, low=low, high=high), *right)
    assert confirms(images, *right) is True
    assert confirms(images.double(), *right) is True
    assert confirms(images, *right, every_level=False) is True


@PROPERTY
@given(constants(3), SEEDS, st.sampled_from([2.0, 3.0, 0.5, 4.0, 1 / 3, 255.0, 1 / 255]), st.booleans())
def test_deviations_that_are_off_by_a_factor_are_not(right, seed, factor, one_channel):
    mean, std = right
    images = normalized(levels(seed=seed), mean, std)
    wrong = (std[0] * factor, *std[1:]) if one_channel else tuple(value * factor for value in std)
    assert confirms(images, mean, wrong) is False


@PROPERTY
@given(constants(), SEEDS, st.floats(0.01, 0.5), st.booleans())
def test_deviations_that_are_off_by_more_than_a_hundredth_are_not(right, seed, by, less):
    mean, std = right
    images = normalized(levels(seed=seed), mean, std)
    assert confirms(images, mean, tuple(value * (1 - by if less else 1 + by) for value in std)) is not True


@PROPERTY
@given(constants(), SEEDS, st.floats(0.15, 0.85), st.integers(-40, 40))
def test_means_that_are_off_by_a_fraction_of_a_level_are_not(right, seed, fraction, whole):
    mean, std = right
    images = normalized(levels(seed=seed), mean, std)
    assert confirms(images, tuple(value + (whole + fraction) / 255 for value in mean), std) is False


@PROPERTY
@given(constants(), SEEDS, st.integers(14, 60), st.booleans())
def test_levels_outside_the_range_of_bytes_are_none(right, seed, by, less):
    """A mean that is off by whole levels stays on the lattice, but exceeds its ends."""
    mean, std = right
    images = normalized(levels(seed=seed, size=32), mean, std)
    assert confirms(images, tuple(value + (-by if less else by) / 255 for value in mean), std) is False


@PROPERTY
@given(constants(3), constants(3), SEEDS)
def test_any_other_constants_are_not(right, other, seed):
    assume(any(abs(a / b - 1) > 0.02 for a, b in zip(right[1], other[1], strict=True)))
    assert confirms(normalized(levels(seed=seed), *right), *other) is not True


@PROPERTY
@given(constants(), SEEDS)
def test_constants_as_they_are_printed_are_enough(right, seed):
    """Four digits of a deviation, as constants are usually written."""
    mean, std = right
    images = normalized(levels(seed=seed), mean, std)
    assume(all(255 * abs(value) * abs(s - round(s, 4)) < 0.09 for s in std for value in images.aminmax()))
    assert confirms(images, mean, tuple(round(value, 4) for value in std)) is True


def test_every_second_level_alone_refutes_unless_it_may():
    mean, std = IMAGENET
    raw = levels(high=127) * 2
    images = normalized(raw, mean, std)
    assert confirms(images, mean, std) is False
    assert confirms(images, mean, std, every_level=False) is True
    dark = normalized(levels(high=100), mean, std)
    doubled = tuple(2 * value for value in std)
    black = tuple(2 * value for value in mean)  # where black stays black
    assert confirms(dark, black, doubled) is False
    assert confirms(dark, black, doubled, every_level=False) is True


# --- what says nothing ------------------------------------------------------------------------------------------------


@PROPERTY
@given(constants(3), constants(3), SEEDS, st.integers(1, 15))
def test_images_with_few_levels_say_nothing(right, other, seed, count):
    palette = torch.randperm(256, generator=torch.Generator().manual_seed(seed))[:count]
    raw = palette[levels(seed=seed) % count]
    images = normalized(raw, *right)
    assert confirms(images, *right) is None
    assert confirms(images, *other) is None
    assert fitted(images) is None


def test_a_channel_with_few_levels_leaves_it_to_the_others():
    raw = levels()
    raw[:, 1] = 7
    mean, std = IMAGENET
    images = normalized(raw, mean, std)
    assert confirms(images, mean, std) is True
    assert confirms(images, mean, (std[0], 9.0, std[2])) is True, "nothing tells"
    assert confirms(images, mean, (std[0], std[1], 2 * std[2])) is False
    assert fitted(images) is None


@PROPERTY
@given(constants(), SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_images_that_are_no_bytes_are_refuted(right, seed, dtype):
    images = torch.rand(4, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    assert confirms(images, (0.0,), (1.0,)) is False
    assert confirms(images, *right) is False
    assert fitted(images) is None
    soft = torch.nn.functional.avg_pool2d(levels(seed=seed).to(dtype) / 255, 3, 1)
    assert confirms(soft, (0.0,), (1.0,)) is False
    assert fitted(soft) is None


@PROPERTY
@given(constants(3), SEEDS, st.sampled_from([0.0, 0.3217, 17.3]), st.integers(1, 6))
def test_padding_that_was_added_afterwards_does_not_matter(right, seed, value, width):
    mean, std = right
    images = torch.nn.functional.pad(normalized(levels(seed=seed), mean, std), [width] * 4, value=value)
    assert confirms(images, mean, std) is True
    assert confirms(images, mean, tuple(2 * part for part in std)) is not True


# --- shapes -----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(constants(3), SEEDS, st.sampled_from([8, 16, 20, 32]))
def test_channels_may_be_last(right, seed, size):
    mean, std = right
    images = normalized(levels(seed=seed, size=size), mean, std).movedim(1, -1)
    assert confirms(images, mean, std) is True
    assert confirms(images, mean, (std[0], std[1], std[2] * 2)) is False
    assert confirms(images, (mean[0], mean[1], mean[2] + 0.4 / 255), std) is False


@PROPERTY
@given(constants(1), SEEDS, st.sampled_from([(1, 28), (3, 16), (3, 32), (20, 8)]), st.booleans())
def test_one_value_is_for_every_channel(right, seed, shape, last):
    channels, size = shape
    images = normalized(levels(channels=channels, size=size, seed=seed), *right)
    images = images.movedim(1, -1) if last else images
    assert confirms(images, *right) is True
    assert confirms(images, right[0], (right[1][0] * 2,)) is False
    assert confirms(images, right[0] * channels, right[1] * channels) is True


@PROPERTY
@given(constants(1), SEEDS)
def test_images_may_be_flat(right, seed):
    images = normalized(levels(channels=1, seed=seed), *right).flatten(1)
    assert confirms(images, *right) is True
    assert confirms(images, right[0], (right[1][0] * 2,)) is False
    mean, std = fitted(images)
    assert mean == pytest.approx(right[0], abs=1e-4)
    assert std == pytest.approx(right[1], abs=1e-4)


@pytest.mark.parametrize("size", [150, 224])
def test_large_images_are_looked_at_in_part(size):
    images = normalized(levels(count=3, size=size), *IMAGENET)
    assert confirms(images, *IMAGENET) is True
    assert confirms(images, IMAGENET[0], tuple(2 * value for value in IMAGENET[1])) is False
    mean, std = fitted(images)
    assert (*mean, *std) == pytest.approx((*IMAGENET[0], *IMAGENET[1]), abs=1e-4)


def test_values_may_be_kept_from_0_to_255():
    images = levels().float()
    assert confirms(images, (0.0,), (1 / 255,)) is True
    assert confirms(images, (0.0,) * 3, (1 / 255,) * 3) is True
    assert confirms(images, (0.0,), (1.0,)) is False
    mean, std = fitted(images)
    assert mean == pytest.approx((0.0,) * 3, abs=1e-6)
    assert std == pytest.approx((1 / 255,) * 3, rel=1e-4)


def test_volumes_have_a_lattice_too():
    raw = levels(count=2, channels=2, size=16)[:, :, None].expand(-1, -1, 4, -1, -1)
    images = (raw.float() / 255 - 0.3) / 0.7
    assert confirms(images, (0.3,), (0.7,)) is True
    assert confirms(images, (0.3, 0.3), (0.7, 1.4)) is False


def test_gradients_and_devices_are_left_alone():
    images = normalized(levels(), *IMAGENET).requires_grad_()
    before = images.detach().clone()
    assert confirms(images, *IMAGENET) is True
    assert fitted(images) is not None
    assert on_lattice(images.detach()).tolist() == [False] * 4
    assert torch.equal(images.detach(), before)
    assert images.grad is None


# --- fits -------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(constants(3), SEEDS)
def test_constants_are_found_where_black_and_white_occur(right, seed):
    images = normalized(levels(seed=seed), *right)
    mean, std = fitted(images)
    assert mean == pytest.approx(right[0], abs=1e-4)
    assert std == pytest.approx(right[1], abs=1e-4)
    assert confirms(images, mean, std) is True


@PROPERTY
@given(constants(3), SEEDS, st.integers(0, 60), st.integers(190, 255), st.integers(0, 2))
def test_constants_are_not_found_where_an_end_is_missing(right, seed, low, high, channel):
    assume((low, high) != (0, 255))
    raw = levels(seed=seed)
    raw[:, channel] = levels(channels=1, seed=seed + 1, low=low, high=high)[:, 0]
    assert fitted(normalized(raw, *right)) is None


@PROPERTY
@given(constants(3), SEEDS)
def test_constants_of_channels_behind_are_found(right, seed):
    mean, std = fitted(normalized(levels(seed=seed, size=32), *right).movedim(1, -1))
    assert mean == pytest.approx(right[0], abs=1e-4)
    assert std == pytest.approx(right[1], abs=1e-4)


@PROPERTY
@given(constants(3), SEEDS)
def test_constants_have_five_digits_that_do_not_depend_on_the_batch(right, seed):
    first, second = (fitted(normalized(levels(seed=seed + k, count=k + 2), *right)) for k in range(2))
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, rel=2e-5, abs=1e-6)
        assert one == tuple(float(f"{value:.5g}") for value in one)


def test_constant_images_have_no_constants():
    assert fitted(torch.full((4, 3, 8, 8), 0.7)) is None
    assert fitted(torch.zeros(4, 1, 8, 8)) is None


# --- one image at a time ----------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, st.integers(1, 6), st.data())
def test_each_image_is_on_the_lattice_or_not(seed, count, data):
    pixels = levels(count=count, seed=seed).float() / 255
    moved = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    by = data.draw(st.sampled_from([0.01, -0.01, 0.3, 0.5]))
    for k, is_moved in enumerate(moved):
        if is_moved:
            pixels[k, k % 3, 3, 4] = (100 + by) / 255
    assert on_lattice(pixels).tolist() == [not is_moved for is_moved in moved]
    assert on_lattice(pixels.double()).tolist() == [not is_moved for is_moved in moved]


@PROPERTY
@given(constants(3), SEEDS)
def test_what_normalizing_and_back_costs_leaves_images_on_the_lattice(right, seed):
    mean, std = right
    back = normalized(levels(seed=seed), mean, std) * shaped(std) + shaped(mean)
    assert on_lattice(back).tolist() == [True] * 4


@pytest.mark.parametrize(
    ("level", "inside"),
    [(0, True), (255, True), (-1, False), (256, False), (-0.001, True), (255.001, True), (254.5, False), (1e6, False)],
)
def test_the_lattice_ends_at_black_and_white(level, inside):
    pixels = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    pixels[1, 0, 2, 2] = level / 255
    assert on_lattice(pixels).tolist() == [True, inside]


def test_what_is_not_finite_is_on_no_lattice():
    pixels = torch.zeros(3, 1, 4, 4)
    pixels[0, 0, 0, 0], pixels[1, 0, 1, 1] = torch.nan, torch.inf
    assert on_lattice(pixels).tolist() == [False, False, True]


def test_flat_images_are_on_the_lattice_too():
    pixels = levels(channels=1).flatten(1).double() / 255
    pixels[2, 7] += 0.1 / 255
    assert on_lattice(pixels).tolist() == [True, True, False, True]
