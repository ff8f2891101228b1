"""Inputs of the evaluator: accepted and refused arguments, its precision, its weights, and its messages."""

import pytest
import torch
from torch import nn

from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.robustness import InputSpace, RobustnessEvaluator, RobustnessSettings, results_of
from support.small_classifiers import conv_net, pixels
from support.small_models import worn

PIXELS = InputSpace(None, None, normalized_data=False)
LEVELS = [0.1, 0.45, 0.6, 0.48, 0.9]
LABELS = [0, 0, 0, 1, 1]  # clean: right, right, wrong, wrong, right


def brightness(x):
    """Return logits of a classifier with class 1 if the image is brighter than 0.5."""
    return torch.stack([torch.zeros(len(x), dtype=x.dtype), x.flatten(1).mean(1) - 0.5], 1)


def batch(which=slice(None)):
    levels = torch.tensor(LEVELS, dtype=torch.float64)[which]
    return levels.reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone(), torch.tensor(LABELS)[which]


def evaluator(logits=brightness, inputs=PIXELS, module=None, num_images=0, progress=None, **changes):
    # BIM moves every pixel by eps towards the other class: the images within eps of 0.5 flip
    settings = RobustnessSettings(**({"eps": 0.1, "step_size": 0.05, "noise_std": 1e-6} | changes))
    return RobustnessEvaluator(logits, inputs, settings, module, num_images, progress)


def test_counts_of_a_model_with_known_answers():
    run = evaluator()
    run.put(*batch(), range(5))
    results = results_of(run.finish())
    assert {name: result.correct for name, result in results.items()} == {"clean": 3, "gaussian": 3, "bim": 2}
    assert run.decisions.of("bim").prediction.tolist() == [0, 1, 1, 0, 1]
    assert results["bim"].by_class == {0: (1, 3), 1: (1, 2)}


def test_without_batches_nothing_is_known():
    run = evaluator(semantics="any")
    run.put(*batch(slice(0)), [])
    assert [result.n for result in results_of(run.finish()).values()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), r"pixels in \[0, 1\] but span \[25\.5, 229\.5\].*divide by 255"),
        (lambda x, y: (x - 0.2, y), r"span \[-0\.1, 0\.7\].*mean=… and std=…"),
        (lambda x, y: (x * torch.nan, y), r"span \[nan, nan\]"),
        (lambda x, y: ((x * 255).byte(), y), r"dtype torch\.uint8; expected floating point"),
        (
            lambda x, y: (x, y + 1),
            r"span 1…2, but the model has 2 classes \(0…1\)\. Give a model with an output for each",
        ),
        (lambda x, y: (x, y - 1), r"Labels span -1….*A label below 0, .*Leave samples without a class out"),
        (lambda x, y: (x, y + torch.tensor([0, 0, 0, 0, 5])), r"Labels span 0…6, but the model has 2 classes"),
        (lambda x, y: (x, y[:3]), r"Expected logits \(batch, classes\) and labels \(batch,\), got \(5, 2\) and \(3,\)"),
        (lambda x, y: (x, y[:, None]), r"got \(.*, 2\) and \(.*, 1\)"),
    ],
    ids=["0…255", "normalized", "NaN", "integers", "above", "below", "above at the end", "too few", "two dimensions"],
)
@pytest.mark.parametrize("attacks", [["bim"], ["gaussian"]], ids=str)
def test_unsuitable_batches_are_refused_and_not_counted(change, message, attacks):
    run = evaluator(attacks=attacks)
    with pytest.raises(ConfigurationError, match=message):
        run.put(*change(*batch()), range(5))
    assert all(len(run.decisions.of(name).index) == 0 for name in run.decisions.attacks)


def test_models_with_other_outputs_are_refused():
    for logits in (lambda x: {"out": brightness(x)}, lambda x: brightness(x)[:, :, None]):
        with pytest.raises(ConfigurationError, match=r"Override RobustnessEvaluation\.logits"):
            evaluator(logits).put(*batch(), range(5))


def test_a_wrong_normalization_is_found_out():
    inputs = InputSpace((0.5,) * 3, (0.2,) * 3, normalized_data=True)
    with pytest.raises(ConfigurationError, match=r"With the declared mean=.* are pixels in \[0\.7, 2\.3\], not in"):
        evaluator(inputs=inputs).put(batch()[0] * 10, batch()[1], range(5))


def test_images_a_rounding_outside_the_pixel_range_pass():
    run = evaluator(attacks=[])
    run.put(torch.tensor([-5e-7, 1 + 5e-7]).reshape(2, 1, 1, 1), torch.tensor([0, 1]), range(2))
    assert len(run.finish().of("clean").index) == 2


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_have_the_size_asked_for_and_the_rest_comes_last():
    sizes = []

    def logits(x):
        sizes.append(len(x))
        return brightness(x)

    run = evaluator(logits, attacks=["gaussian"], batch_size=4)
    for part in ([0], [1, 2], [3, 4], [0, 1], [2], [3], [4]):
        run.put(*batch(part), part)
    run.finish()
    assert sizes[1:] == [4, 4, 4, 4, 2, 2], "after a look at what the model returns, clean and noisy ones"


# --- how it computes --------------------------------------------------------------------------------------------------


def folding(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    net = worn(conv_net(1)).to(dtype)
    net[0][1].running_var.fill_(0.7)
    run = RobustnessEvaluator(net, PIXELS, RobustnessSettings(attacks=["bim", "pgd_l2"], **changes), net)
    x, y = pixels(9, 3, 8, 8, dtype=dtype), torch.arange(9) % 5
    run.put(x, y, range(9))
    return run, net


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_folding_decides_the_same_and_leaves_the_model(semantics):
    (run, net), (plain, _) = (folding(torch.float64, fold=fold, semantics=semantics) for fold in (True, False))
    assert list(run.folded.folded) == ["0.0"]
    assert plain.folded is None
    assert "forward" not in vars(net[0][1])
    for attack in run.decisions.attacks:
        for one, two in zip(run.finish().of(attack), plain.finish().of(attack), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9, equal_nan=True)


def test_a_model_that_fails_is_left_as_it_was():
    net, calls = worn(conv_net(1)), []

    def logits(x):
        calls.append("forward" in vars(net[0][1]))
        if len(calls) > 6:
            raise KeyError("inside")
        return net(x)

    run = RobustnessEvaluator(logits, PIXELS, RobustnessSettings(batch_size=9), net)
    weight = net[0][0].weight
    with pytest.raises(KeyError, match="inside"):
        run.put(pixels(9, 3, 8, 8, dtype=torch.float32), torch.arange(9) % 5, range(9))
    assert calls[-1], "while stand-ins were in place"
    assert net[0][0].weight is weight
    assert "forward" not in vars(net[0][1])


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_half_precision_is_used_for_every_attack_but_not_for_losses(semantics):
    run, net = folding(autocast="bf16", semantics=semantics)
    dtypes = set()
    net[1].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    run.put(pixels(9, 3, 8, 8, seed=1, dtype=torch.float32), torch.arange(9) % 5, range(9, 18))
    decisions = run.finish()
    assert dtypes == {torch.bfloat16}
    assert [len(decisions.of(name).index) for name in decisions.attacks] == [18] * 3
    full = folding(semantics=semantics)[0].finish().of("clean").loss
    assert 0 < (decisions.of("clean").loss[:9] - full).abs().max() < 0.1 * full.abs().max()


def test_a_fold_that_changes_logits_is_told_and_not_used():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 5, 8), nn.BatchNorm2d(5)

        def forward(self, x):
            return self.norm(nn.functional.conv2d(x, self.conv.weight)).flatten(1)

    net = worn(Odd()).eval()
    run = evaluator(net, module=net)
    with pytest.warns(MeasurementWarning, match="changes the logits"):
        run.put(pixels(5, 3, 8, 8, dtype=torch.float32), torch.arange(5), range(5))
    assert run.folded is None
    assert len(run.finish().of("bim").index) == 5


# --- what it tells ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_the_first_images_are_kept_for_showing(semantics):
    run = evaluator(num_images=3, semantics=semantics, batch_size=2)
    run.put(*batch(), [7, 3, 9, 1, 5])
    run.finish()
    assert run.shown.labels == {7: 0, 3: 0, 9: 0}
    assert run.shown.predictions["clean"] == {7: 0, 3: 0, 9: 1}
    assert run.shown.predictions["bim"] == {7: 0, 3: 1, 9: 1}
    assert torch.equal(run.shown.pixels["clean"][3], batch()[0][1])
    assert (run.shown.pixels["bim"][7] - 0.1).max() == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_progress_counts_every_sample_of_every_attack_once(semantics):
    told = {}
    run = evaluator(progress=lambda name, n: told.setdefault(name, []).append(n), semantics=semantics, batch_size=2)
    run.put(*batch(), range(5))
    run.finish()
    assert {name: sum(counts) for name, counts in told.items()} == dict.fromkeys(["clean", "gaussian", "bim"], 5)
    assert all(counts[0] == 0 for counts in told.values())
