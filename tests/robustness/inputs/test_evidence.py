"""The normalization of a loader's images is found in every common set-up, or reported as unknown, or refused."""

import functools
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from lightning_normgeo import evaluate_robustness
from lightning_normgeo.errors import ConfigurationError, UnsuitableError
from lightning_normgeo.robustness.inputs import declared_inputs, input_space

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
EXACT = ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))
OTHER = ((0.31, 0.4, 0.6), (0.21, 0.19, 0.33))
HALF = ((0.5,), (0.5,))
HALVES = ((0.5,) * 3, (0.5,) * 3)
BYTES = ((0.0,), (1 / 255,))
NONE = (None, None)
COUNT = 24


def raw_images(seed=0, channels=3, size=8, low=0, high=255):
    """8-bit images with black and white in every channel."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(low, high + 1, (COUNT, channels, size, size), generator=generator)
    drawn[:8, :, 0, 0], drawn[:8, :, -1, -1] = low, high
    return drawn.to(torch.uint8)


def shaped(values):
    return torch.tensor(values).view(-1, 1, 1)


def by(constants):
    """Normalize by hand, which nothing in the data pipeline shows."""
    return lambda x: (x - shaped(constants[0])) / shaped(constants[1])


def sharp(x):
    return x.float() / 255


def soft(x):
    """Return images after a resize in floating point, with values between the 8-bit levels."""
    return F.avg_pool2d(sharp(x), 3, 1, padding=1, count_include_pad=False)


def standardized(x):
    """Normalize each image by its own mean and deviation, as some projects do."""
    x = sharp(x)
    return (x - x.mean()) / x.std()


class Data(Dataset):
    """A data set that applies an opaque function to pixels, and then a visible transform."""

    def __init__(self, hidden=sharp, transform=None, raw=None, **seen):
        images = raw_images() if raw is None else raw
        self._images = torch.stack([hidden(x) for x in images])
        self.transform = transform
        for name, value in seen.items():
            setattr(self, name, value)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = self._images[index]
        return (image if self.transform is None else self.transform(image)), index % 3


class Wrapper(Dataset):
    def __init__(self, base, tf):
        self.base, self.tf = base, tf

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image, label = self.base[index]
        return self.tf(image), label


class Like:
    """A transform of another library: a class with its name, attributes and effect."""

    def __new__(cls, name, act, **attributes):
        made = type(name, (), {"__call__": staticmethod(lambda x: act(x))})()
        made.__dict__.update(attributes)
        return made


def then(hidden, after):
    return lambda x: after(hidden(x))


def seen(constants, hidden=sharp):
    return Data(hidden, v1.Normalize(*constants))


def normalized(constants, hidden=sharp):
    return Data(then(hidden, by(constants)))


def lists(constants):
    return {"mean": list(constants[0]), "std": list(constants[1])}


def scaled(constants, factor):
    return {"mean": constants[0], "std": tuple(factor * value for value in constants[1])}


class Inside(nn.Module):
    """A model that normalizes."""

    def __init__(self, constants):
        super().__init__()
        self.normalize = v1.Normalize(*constants)

    def forward(self, x):
        return self.normalize(x).mean((2, 3))


class Prefetch:
    """Loader like timm's, which normalizes images in batches."""

    def __init__(self, loader, mean, std):
        self.loader = loader
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (mean, std))

    def __iter__(self):
        for x, y in self.loader:
            yield (x * 255 - self.mean) / self.std, y


Prefetch.__name__ = "PrefetchLoader"


def collated(samples, how):
    return how(torch.stack([x for x, _ in samples])), torch.tensor([y for _, y in samples])


LITTLE_CONTRAST = r"once it is undone, the first images are pixels in .* alone.*normalized_by='data'"
MODELS_OWN = r"they are 8-bit pixels as they are\. It is taken for the model's own.*normalized_by='model'"
REFUTED = r"is refuted by the images, which are 8-bit pixels with mean=.*Declare these, or nothing"
PIXELS_ALREADY = r"is refuted: images are 8-bit pixels as they are, and are evaluated as such\. Leave it out"

VISIBLE = v1.Normalize(*OTHER)

CASES = [
    # id, data or loader, model, declared, (mean, std), normalized_data, confirmed, said
    ("pixels", Data(), None, {}, NONE, False, True, ""),
    ("v1 Normalize", seen(IMAGENET), None, {}, IMAGENET, True, True, ""),
    ("v1 Normalize of odd constants", seen(OTHER), None, {}, OTHER, True, True, ""),
    ("v1 Normalize, one value", seen(HALF), None, {}, HALF, True, True, ""),
    ("v1 Compose", Data(transform=v1.Compose([v1.Normalize(*CIFAR)])), None, {}, CIFAR, True, True, ""),
    ("v2 Compose", Data(transform=v2.Compose([v2.Normalize(*CIFAR)])), None, {}, CIFAR, True, True, ""),
    ("v2 in nn.Sequential", Data(transform=nn.Sequential(v2.Normalize(*OTHER))), None, {}, OTHER, True, True, ""),
    ("v2 RandomApply", Data(transform=v2.RandomApply([v2.Normalize(*OTHER)], p=1.0)), None, {}, OTHER, True, True, ""),
    (
        "v1 Lambda",
        Data(transform=v1.Lambda(lambda x, how=VISIBLE: how(x))),
        None, {}, OTHER, True, True, "",
    ),
    ("wrapper", Wrapper(Data(), v1.Normalize(*OTHER)), None, {}, OTHER, True, True, ""),
    ("Subset of ConcatDataset", Subset(ConcatDataset([seen(OTHER)]), range(COUNT)), None, {}, OTHER, True, True, ""),
    (
        "collate function",
        DataLoader(Data(), batch_size=8, collate_fn=functools.partial(collated, how=v1.Normalize(*OTHER))),
        None, {}, OTHER, True, True, "",
    ),
    ("albumentations", Data(transform=Like("Normalize", by(OTHER), mean=OTHER[0], std=OTHER[1], max_pixel_value=255.0,
                                           normalization="standard")), None, {}, OTHER, True, True, ""),
    ("kornia", Data(soft, Like("Normalize", by(OTHER), flags={k: torch.tensor(v) for k, v in lists(OTHER).items()})),
     None, {}, OTHER, True, False, ""),
    ("MONAI", Data(soft, Like("NormalizeIntensity", by(OTHER), subtrahend=OTHER[0], divisor=OTHER[1])),
     None, {}, OTHER, True, False, ""),
    ("transformers", Data(soft, Like("ViTImageProcessor", by(OTHER), do_normalize=True, image_mean=list(OTHER[0]),
                                     image_std=list(OTHER[1]))), None, {}, OTHER, True, False, ""),
    ("timm's loader", Prefetch(DataLoader(Data(), batch_size=8), *OTHER), None, {}, OTHER, True, True, ""),
    ("timm's loader, no lattice", Prefetch(DataLoader(Data(soft), batch_size=8), *OTHER), None, {}, OTHER, True, False,
     ""),
    ("by hand, ImageNet's", normalized(IMAGENET), None, {}, IMAGENET, True, True, ""),
    ("by hand, CIFAR-10's", normalized(CIFAR), None, {}, CIFAR, True, True, ""),
    ("by hand, odd constants", normalized(OTHER), None, {}, OTHER, True, True, ""),
    ("by hand, [-1, 1]", Data(lambda x: sharp(x) * 2 - 1), None, {}, HALF, True, True, ""),
    ("by hand, 0…255", Data(lambda x: x.float()), None, {}, BYTES, True, True, ""),
    ("by hand, MNIST's", normalized(((0.1307,), (0.3081,))), None, {}, ((0.1307,), (0.3081,)), True, True, ""),
    ("by hand, no white", Data(then(sharp, by(CIFAR)), raw=raw_images(high=200)), None, {}, CIFAR, True, True, ""),
    # the model normalizes
    ("in the model", Data(), Inside(IMAGENET), {}, IMAGENET, False, True, ""),
    ("in the model, declared so", Data(), Inside(IMAGENET), lists(IMAGENET) | {"normalized_by": "model"}, IMAGENET,
     False, True, ""),
    ("in the model, declared without saying so", Data(), Inside(IMAGENET), lists(IMAGENET), IMAGENET, False, True,
     MODELS_OWN),
    ("in the model, only said", Data(), Inside(IMAGENET), {"normalized_by": "model"}, IMAGENET, False, True, ""),
    ("in the model, no lattice", Data(soft), Inside(IMAGENET), {}, IMAGENET, False, False, ""),
    ("in the model, no lattice, declared", Data(soft), Inside(IMAGENET), lists(IMAGENET), IMAGENET, False, False,
     r"they lie within \[0, 1\] as they are\. It is taken for the model's own normalization"),
    ("both", seen(IMAGENET), Inside(CIFAR), {}, IMAGENET, True, True, ""),
    ("both, the model's declared", seen(IMAGENET), Inside(CIFAR), lists(CIFAR), IMAGENET, True, True, REFUTED),
    ("both, declared the model's", seen(IMAGENET), Inside(IMAGENET), {"normalized_by": "model"}, IMAGENET, True, True,
     r"normalized_by='model' says that images are pixels, but they are 8-bit pixels after .*Leave it out"),
    # declared
    ("right ones", normalized(OTHER), None, lists(OTHER), OTHER, True, True, ""),
    ("right ones, by the data", normalized(OTHER), None, lists(OTHER) | {"normalized_by": "data"}, OTHER, True, True,
     ""),
    ("right ones, another in the pipeline", Data(then(sharp, by(OTHER)), other=v1.Normalize(*CIFAR)), None,
     lists(OTHER), OTHER, True, True, ""),
    ("rounded ones", seen(EXACT), None, lists(CIFAR), CIFAR, True, True, ""),
    ("rounded ones, by hand", normalized(EXACT), None, lists(CIFAR), CIFAR, True, True, ""),
    ("wrong ones for pixels", Data(), None, lists(CIFAR), CIFAR, False, True, MODELS_OWN),
    ("wrong ones for pixels, by the data", Data(), None, lists(CIFAR) | {"normalized_by": "data"}, CIFAR, False, True,
     PIXELS_ALREADY),
    ("wrong ones", seen(IMAGENET), None, lists(CIFAR), IMAGENET, True, True, REFUTED),
    ("wrong ones, by hand", normalized(IMAGENET), None, lists(CIFAR), IMAGENET, True, True, REFUTED),
    ("wrong ones, odd constants", normalized(OTHER), None, lists(CIFAR), OTHER, True, True, REFUTED),
    ("deviation doubled", seen(IMAGENET), None, scaled(IMAGENET, 2), IMAGENET, True, True, REFUTED),
    ("deviation halved", seen(IMAGENET), None, scaled(IMAGENET, 0.5), IMAGENET, True, True, REFUTED),
    ("deviation doubled, by hand", normalized(OTHER), None, scaled(OTHER, 2), OTHER, True, True, REFUTED),
    ("deviation halved, by hand", normalized(OTHER), None, scaled(OTHER, 0.5), OTHER, True, True, REFUTED),
    ("mean of another", seen(IMAGENET), None, {"mean": HALVES[0], "std": IMAGENET[1]}, IMAGENET, True, True, REFUTED),
    ("range [-1, 1]", Data(lambda x: sharp(x) * 2 - 1), None, {"value_range": [-1, 1]}, HALF, True, True, ""),
    ("range [0, 255]", Data(lambda x: x.float()), None, {"value_range": [0, 255]}, BYTES, True, True, ""),
    ("range [-3, 5]", Data(lambda x: sharp(x) * 8 - 3), None, {"value_range": [-3, 5]}, ((3 / 8,), (1 / 8,)), True,
     True, ""),
    ("range [0, 255] of pixels", Data(), None, {"value_range": [0, 255]}, NONE, False, True, PIXELS_ALREADY),
    ("range [-1, 1] of 0…255", Data(lambda x: x.float()), None, {"value_range": [-1, 1]}, BYTES, True, True, REFUTED),
    ("range [0, 1] of pixels", Data(), None, {"value_range": [0, 1]}, ((0.0,), (1.0,)), True, True, ""),
    # found, but not used
    ("unused attribute", Data(other=v1.Normalize(*CIFAR)), None, {}, NONE, False, True, ""),
    ("another found first", Data(then(sharp, by(OTHER)), transform_b=v1.Normalize(*CIFAR)), None, {}, OTHER, True, True,
     ""),
    ("three found, the last is right", Wrapper(Data(transform_b=v1.Normalize(*CIFAR), transform_c=v1.Normalize(*OTHER)),
                                               by(OTHER)), None, {}, OTHER, True, True, ""),
    ("another's albumentations", Data(transform=Like("Normalize", nn.Identity(), mean=CIFAR[0],
                                                     std=CIFAR[1], normalization="min_max")), None, {}, NONE, False,
     True, ""),
    # no lattice
    ("no lattice", Data(soft), None, {}, NONE, False, False, ""),
    ("no lattice, in the pipeline", seen(IMAGENET, soft), None, {}, IMAGENET, True, False, ""),
    ("no lattice, declared", normalized(IMAGENET, soft), None, lists(IMAGENET), IMAGENET, True, False, ""),
    ("no lattice, declared and in the pipeline", seen(IMAGENET, soft), None, lists(IMAGENET), IMAGENET, True, False,
     ""),
    ("no lattice, contradicting", seen(HALVES, soft), None, lists(IMAGENET), IMAGENET, True, False,
     r"is not what is found in the data pipeline, mean=\(0\.5, 0\.5, 0\.5\).*do not tell which is right"),
    ("no lattice, declared by the data of pixels", Data(soft), None, lists(HALVES) | {"normalized_by": "data"}, HALVES,
     True, False, r"is not confirmed: images lie within \[0, 1\] as they are.*normalized_by='model'"),
    ("no lattice, unused attribute", Data(soft, other=v1.Normalize(*CIFAR)), None, {}, NONE, False, False, ""),
    ("no lattice, one out of range found first", Data(then(soft, by(IMAGENET)), transform_b=v1.Normalize(*HALVES),
                                                      other=v1.Normalize(*IMAGENET)), None, {}, IMAGENET, True, False,
     ""),
    ("beyond [0, 1], declared the model's", Data(then(soft, lambda x: x * 2 - 0.5)), Inside(IMAGENET),
     lists(IMAGENET), IMAGENET, True, False, LITTLE_CONTRAST),
    ("[-1, 1], declared the model's", Data(then(soft, lambda x: x * 2 - 1)), Inside(IMAGENET), lists(IMAGENET),
     IMAGENET, True, False, LITTLE_CONTRAST),
    ("little contrast, declared by the data", normalized(IMAGENET, lambda x: soft(x) * 0.4), None,
     lists(IMAGENET) | {"normalized_by": "data"}, IMAGENET, True, False, ""),
    ("little contrast, in the pipeline", seen(IMAGENET, lambda x: soft(x) * 0.4), None, lists(IMAGENET), IMAGENET, True,
     False, ""),
    ("no lattice, range that the model takes", Data(then(soft, lambda x: x * 255)), None,
     {"value_range": [0, 255], "normalized_by": "model"}, BYTES, True, False, ""),
    ("no lattice, range", Data(then(soft, lambda x: x * 8 - 3)), None, {"value_range": [-3, 5]}, ((3 / 8,), (1 / 8,)),
     True, False, ""),
    ("noise", Data(raw=torch.rand(COUNT, 3, 8, 8) * 255), None, {}, NONE, False, False, ""),
]  # fmt: skip


def loader_of(data):
    return DataLoader(data, batch_size=8) if isinstance(data, Dataset) else data


def found(data, model=None, space="pixel", **declared):
    loader = loader_of(data)
    images, _ = next(iter(loader))
    return input_space(model, loader, images, declared_inputs(**declared), space)


@pytest.mark.parametrize(
    ("data", "model", "declared", "constants", "normalized_data", "confirmed", "said"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_images_are_taken_for_what_they_are(data, model, declared, constants, normalized_data, confirmed, said):
    inputs = found(data, model, **declared)
    assert (inputs.normalized_data, inputs.confirmed) == (normalized_data, confirmed)
    if constants == NONE:
        assert (inputs.mean, inputs.std) == NONE
    else:
        for got, expected in zip((inputs.mean, inputs.std), constants, strict=True):
            count = max(len(got), len(expected))
            assert got * (count // len(got)) == pytest.approx(expected * (count // len(expected)), abs=1e-4)
    if said:
        assert re.search(said, inputs.said), inputs.said
    else:
        assert inputs.said == ""
    assert inputs.source


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_what_is_found_brings_images_back_to_pixels(case):
    """If the images cannot confirm it, the result says so."""
    _, data, _, declared, _, _, confirmed, said = case
    inputs = found(data, **declared)
    images, _ = next(iter(loader_of(data)))
    pixels = inputs.to_space(images, "pixel").double()
    if confirmed:
        assert (255 * pixels - (255 * pixels).round()).abs().max() < 0.11
    elif not said:
        truth = torch.stack([soft(x) for x in raw_images()])[: len(images)]
        assert pixels.min() >= -1e-3
        assert pixels.max() <= 1 + 1e-3
        if case[0] != "noise" and not case[0].startswith("little contrast"):
            torch.testing.assert_close(pixels, truth.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "declared", "source"),
    [
        (seen(EXACT), lists(CIFAR), "declared"),
        (seen(IMAGENET), lists(IMAGENET), "declared"),
        (normalized(IMAGENET, soft), lists(IMAGENET), "declared"),
        (seen(IMAGENET), {}, "Normalize of the data pipeline"),
        (seen(IMAGENET, soft), {}, "Normalize of the data pipeline"),
        (normalized(IMAGENET), {}, "ImageNet's constants, fitted"),
        (normalized(OTHER), {}, "fitted to the images"),
        (Data(), {}, "pixels"),
        (Data(soft), {}, "pixels"),
        (Data(), lists(IMAGENET), "pixels"),
    ],
)
def test_the_first_that_fits_is_taken_and_named(data, declared, source):
    """Declared normalizations come first, then those found in the pipeline, then known constants."""
    inputs = found(data, **declared)
    assert inputs.source == source
    if source == "declared":
        assert (inputs.mean, inputs.std) == (tuple(declared["mean"]), tuple(declared["std"]))


def test_cases_have_names_of_their_own():
    assert len({case[0] for case in CASES}) == len(CASES) > 40


@pytest.mark.parametrize(
    ("data", "declared", "message"),
    [
        (Data(standardized), {}, r"Images are expected to be pixels in \[0, 1\] but span \[-.*mean=… and std=…"),
        (Data(standardized, raw=raw_images(channels=1)), {}, r"but span \[-"),
        (Data(then(soft, by(OTHER))), {}, r"but span \[-1\..*no normalization is found.*value_range=\[low, high\]"),
        (Data(then(soft, by(IMAGENET)), other=v1.Normalize(*HALVES)), {}, r"but span \[-"),
        (Data(then(soft, lambda x: x * 255)), {}, r"but span \[.*value_range=\[0, 255\]"),
        (Data(then(soft, by(IMAGENET))), lists(HALVES), r"With the declared mean=\(0\.5.* are pixels in \[-"),
        (seen(IMAGENET, soft), lists(HALVES), r"With the declared mean=\(0\.5.*Declare the mean and std"),
        (seen(IMAGENET, soft), {"normalized_by": "model"}, r"but span \[-"),
        (Data(then(soft, lambda x: x * 8 - 3)), {"value_range": [-1, 1]}, r"are pixels in \[-"),
        (Data(soft, raw=raw_images(channels=1)), lists(IMAGENET) | {"normalized_by": "data"}, "3 values.* 1 channels"),
        (Data(lambda x: sharp(x) * torch.nan), {}, r"span \[nan, nan\]"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:40],
)
def test_what_nothing_explains_is_refused_with_its_span(data, declared, message):
    with pytest.raises(UnsuitableError, match=message):
        found(data, **declared)


def test_the_span_that_is_named_is_that_of_the_images():
    images = torch.linspace(-1.25, 2.75, 8 * 3 * 16).pow(3).view(8, 3, 4, 4) / 10
    low, high = (f"{value:.7g}" for value in (images.min().item(), images.max().item()))
    with pytest.raises(UnsuitableError, match=rf"span \[{re.escape(low)}, {re.escape(high)}\]"):
        input_space(None, None, images)


# --- without images, and the normalized space -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "declared", "constants", "normalized_data"),
    [
        (Data(), {}, NONE, False),
        (seen(IMAGENET), {}, IMAGENET, True),
        (seen(IMAGENET), lists(CIFAR), CIFAR, True),
        (seen(IMAGENET), lists(CIFAR) | {"normalized_by": "model"}, CIFAR, False),
        (seen(IMAGENET), {"normalized_by": "model"}, NONE, False),
        (Data(), {"value_range": [-1, 1]}, HALF, True),
    ],
)
def test_without_images_what_is_declared_or_found_counts(data, declared, constants, normalized_data):
    inputs = input_space(None, DataLoader(data), None, declared_inputs(**declared))
    assert (inputs.mean, inputs.std) == constants
    assert inputs.normalized_data == normalized_data
    assert not inputs.confirmed


@pytest.mark.parametrize(
    ("data", "model", "declared", "constants"),
    [
        (Data(), Inside(IMAGENET), {}, IMAGENET),
        (Data(), Inside(IMAGENET), lists(CIFAR) | {"normalized_by": "model"}, CIFAR),
        (Data(), None, lists(CIFAR) | {"normalized_by": "model"}, CIFAR),
        (Data(other=v1.Normalize(*CIFAR)), None, {}, CIFAR),
        (Data(other=v1.Normalize(*CIFAR)), Inside(IMAGENET), {}, IMAGENET),
        (seen(IMAGENET), None, {}, IMAGENET),
        (normalized(OTHER), None, {}, OTHER),
    ],
)
def test_the_normalized_space_has_the_constants_of_whoever_normalizes(data, model, declared, constants):
    inputs = found(data, model, "normalized", **declared)
    images, _ = next(iter(loader_of(data)))
    expected = torch.stack([by(constants)(x.double() / 255) for x in raw_images()[: len(images)]])
    torch.testing.assert_close(inputs.to_space(images, "normalized").double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("hidden", [sharp, soft])
def test_the_normalized_space_needs_constants(hidden):
    inputs = found(Data(hidden), nn.Flatten(), "normalized")
    assert inputs.mean is None
    with pytest.raises(UnsuitableError, match="normalized space needs the input normalization"):
        inputs.to_space(torch.zeros(1, 3, 8, 8), "normalized")


# --- declarations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"mean": [0.5]}, "must be given together"),
        ({"std": [0.5]}, "must be given together"),
        ({"mean": [0.5, 0.5], "std": [0.5]}, "one value per channel"),
        ({"mean": [0.5], "std": [0]}, "must be positive"),
        ({"normalized_by": "both"}, r"normalized_by='both' is unknown; choose 'data' or 'model'"),
        ({"mean": [0.5], "std": [0.5], "value_range": [0, 1]}, "Give mean and std, or value_range, not both"),
        ({"value_range": [1, 0]}, r"value_range=\[1\.0, 0\.0\] must be the smallest and the largest value"),
        ({"value_range": [0, 0]}, "must be the smallest and the largest value"),
        ({"value_range": [0, 1, 2]}, "must be the smallest and the largest value"),
        ({"value_range": [0]}, "must be the smallest and the largest value"),
        ({"value_range": [0, float("nan")]}, "must be the smallest and the largest value"),
    ],
    ids=str,
)
def test_impossible_declarations_are_refused(declared, message):
    with pytest.raises(ConfigurationError, match=message):
        declared_inputs(**declared)


PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
VALUES = st.lists(st.tuples(st.floats(0.1, 0.9), st.floats(0.06, 0.9)), min_size=3, max_size=3)


@PROPERTY
@given(st.floats(-1000, 1000), st.floats(0.5, 1000), st.integers(0, 1000))
def test_a_range_stands_for_black_and_white(low, span, seed):
    low, span = round(low, 2), round(span, 2)
    images = raw_images(seed).double() / 255 * span + low
    assume(images.amin() < -1e-3 or images.amax() > 1 + 1e-3)
    inputs = input_space(None, None, images, declared_inputs(value_range=[low, low + span]))
    assert (inputs.normalized_data, inputs.said) == (True, "")
    torch.testing.assert_close(inputs.to_space(images, "pixel") * 255, raw_images(seed).double(), rtol=0, atol=0.05)


@PROPERTY
@given(VALUES, VALUES, st.integers(0, 1000), st.sampled_from(["seen", "hidden"]), st.sampled_from([None, "data"]))
def test_eight_bit_images_are_never_taken_for_something_else_in_silence(right, wrong, seed, how, normalized_by):
    """With any declaration the right pixels result, and a declaration wrong by more than a hundredth is reported."""
    right, wrong = (tuple(zip(*values, strict=True)) for values in (right, wrong))
    raw = raw_images(seed)
    data = Data(raw=raw, transform=v1.Normalize(*right)) if how == "seen" else Data(then(sharp, by(right)), raw=raw)
    images = torch.stack([data[k][0] for k in range(8)])
    assume(images.amin() < -0.1)
    assume(any(abs(a / b - 1) > 0.02 for a, b in zip(wrong[1], right[1], strict=True)))
    declared = declared_inputs(*wrong, normalized_by)
    inputs = input_space(None, DataLoader(data, batch_size=8), images, declared)
    assert inputs.confirmed
    assert re.search(REFUTED, inputs.said)
    torch.testing.assert_close(inputs.to_space(images, "pixel") * 255, raw[:8].float(), rtol=0, atol=0.05)


# --- end to end -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self, seed, count):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.1 * torch.randn(3, count, generator=generator))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight, self.bias)


def attacked(forward, pixels, labels, eps, step, steps):
    """Return the result of the basic iterative method in pixels, in float64."""
    adversarial = pixels
    for _ in range(steps):
        x = adversarial.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(forward(x), labels, reduction="sum"), x)
        moved = adversarial + step * gradient.sign()
        adversarial = torch.minimum(torch.maximum(moved, pixels - eps), pixels + eps).clamp(0, 1)
    return adversarial


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    VALUES,
    st.integers(0, 10**6),
    st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([3, 10]),
    st.sampled_from(["seen", "hidden", "declared"]),
)
def test_attacks_of_normalized_images_are_attacks_of_their_pixels(values, seed, levels, steps, how):
    constants = tuple(zip(*values, strict=True))
    raw = raw_images(seed, size=4)
    pixels = raw.double() / 255
    mean, std = (torch.tensor(part, dtype=torch.float64).view(3, 1, 1) for part in constants)
    model = Linear(seed, 48)
    weight = model.weight.detach().double()
    with torch.no_grad():
        scores = ((pixels - mean) / std).flatten(1) @ weight.T
        model.bias.copy_(-scores.mean(0))
    bias = model.bias.detach().double()

    def forward(x):
        return ((x - mean) / std).flatten(1) @ weight.T + bias

    eps = levels / 255
    labels = forward(pixels).argmax(1)
    after = forward(attacked(forward, pixels, labels, eps, eps / 4, steps))
    first, second = after.topk(2).values.unbind(1)
    assume((first - second).min() > 2e-3)
    expected = int((after.argmax(1) == labels).sum())

    data = (
        Data(raw=raw, transform=v1.Normalize(*constants))
        if how == "seen"
        else Data(then(sharp, by(constants)), raw=raw)
    )
    batches = [
        (torch.stack([data[k][0] for k in part]), labels[torch.tensor(part)])
        for part in ([*range(10)], [*range(10, 20)], [*range(20, COUNT)])
    ]
    source = Batches(batches, data if how == "seen" else None)
    declared = lists(constants) if how == "declared" else {}
    report = evaluate_robustness(model, source, attacks=["bim"], eps=eps, steps=steps, progress=False, **declared)
    assert (report.results["clean"].correct, report.results["clean"].n) == (COUNT, COUNT)
    assert report.results["bim"].correct == expected
    assert report.settings["inputs"]["confirmed"]


class Batches:
    """A loader of the user's own."""

    def __init__(self, batches, pipeline):
        self.batches, self.pipeline = batches, pipeline

    def __iter__(self):
        return iter(self.batches)


def test_attacks_of_pixels_a_model_normalizes_are_the_same_attacks():
    raw = raw_images(7, size=4)
    model = Linear(7, 48)
    inside = nn.Sequential(v1.Normalize(*IMAGENET), model)
    with torch.no_grad():
        labels = inside(raw.float() / 255).argmax(1)
    pixels = [(raw.float() / 255, labels)]
    normalized_images = [(v1.Normalize(*IMAGENET)(raw.float() / 255), labels)]
    results = [
        evaluate_robustness(net, batches, attacks=["bim"], eps=4 / 255, progress=False).results["bim"]
        for net, batches in ((inside, pixels), (model, normalized_images))
    ]
    assert results[0].correct == results[1].correct
    assert 0 < results[0].correct < COUNT
