"""Counted accuracies, their intervals, and evaluation that leaves no trace."""

import math

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import InputSpace, RobustnessEvaluator, threat_model, wilson_interval
from lightning_normgeo.robustness.evaluation import undisturbed

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)


# --- Wilson's interval ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (1, 1, 0.2065, 1),
    ],
)
def test_known_values(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@PROPERTY
@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_interval_solves_the_quadratic(counts, level):
    correct, total = counts
    low, high = wilson_interval(correct, total, level)
    assert (low, high) == pytest.approx(ref.wilson(correct, total, level), rel=1e-8, abs=1e-10)
    assert 0 <= low <= correct / total <= high <= 1
    mirrored = wilson_interval(total - correct, total, level)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_ends_are_exact_where_nothing_or_everything_is_correct():
    for n in range(1, 200):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0
        assert 0 < wilson_interval(0, n)[1] < 1
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [10, 30, 100])
def test_interval_covers_the_truth_about_as_often_as_it_says(n):
    """Exactly summed over the binomial distribution: 95 % on average, never far below."""
    coverages = []
    for p in [k / 50 for k in range(1, 50)]:
        covered = 0.0
        for k in range(n + 1):
            low, high = wilson_interval(k, n)
            covered += math.comb(n, k) * p**k * (1 - p) ** (n - k) * (low <= p <= high)
        coverages.append(covered)
    assert min(coverages) > 0.82
    assert sum(coverages) / len(coverages) == pytest.approx(0.95, abs=0.012)


# --- counting ---------------------------------------------------------------------------------------------------------

PIXELS = InputSpace(None, None, normalized_data=False)
LEVELS = [0.1, 0.45, 0.6, 0.48, 0.9]
LABELS = [0, 0, 0, 1, 1]  # clean: right, right, wrong, wrong, right


def brightness(x):
    """Class 1 where the image is brighter than 0.5."""
    return torch.stack([torch.zeros(len(x), dtype=x.dtype), x.flatten(1).mean(1) - 0.5], 1)


def batch(which=slice(None)):
    levels = torch.tensor(LEVELS, dtype=torch.float64)[which]
    return levels.reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone(), torch.tensor(LABELS)[which]


def evaluator(attacks=("bim", "gaussian"), eps=0.1):
    # BIM moves every pixel by eps towards the other class: the images within eps of 0.5 flip
    return RobustnessEvaluator(threat_model("pixel-8-255", eps=eps, step_size=0.05, noise_std=1e-6), PIXELS, attacks)


def test_counts_drop_and_interval_of_a_model_with_known_answers():
    run = evaluator()
    shown = run.evaluate(brightness, *batch(), range(5))
    assert shown.predictions["clean"].tolist() == [0, 0, 1, 0, 1]
    assert shown.predictions["bim"].tolist() == [0, 1, 1, 0, 1]
    results = run.results()
    assert list(results) == ["clean", "gaussian", "bim"]
    for name, correct in {"clean": 3, "gaussian": 3, "bim": 2}.items():
        result = results[name]
        assert (result.correct, result.n, result.accuracy) == (correct, 5, correct / 5)
        assert result.accuracy_drop == pytest.approx(3 / 5 - correct / 5)
        assert (result.ci_low, result.ci_high) == pytest.approx(ref.wilson(correct, 5), rel=1e-9)


@pytest.mark.parametrize("parts", [[range(5)], [range(2), range(2, 5)], [[4], [1, 3], [0, 2]]], ids=str)
def test_batches_add_up_in_any_grouping(parts):
    run = evaluator()
    for part in parts:
        run.evaluate(brightness, *batch(list(part)), list(part))
    assert run.counts.tolist() == [3, 3, 2, 5]
    assert run.results(2 * run.counts)["bim"].correct == 4, "counts summed over two processes"
    assert run.results(2 * run.counts)["bim"].n == 10


def test_without_batches_nothing_is_known():
    for result in evaluator().results().values():
        assert (result.correct, result.n, result.accuracy, result.accuracy_drop) == (0, 0, 0, 0)
        assert (result.ci_low, result.ci_high) == (0, 1)


def test_only_the_attacks_asked_for_run_and_all_settings_are_told():
    run = evaluator(attacks=["bim"])
    assert list(run.evaluate(brightness, *batch(), range(5)).predictions) == list(run.results()) == ["clean", "bim"]
    settings = run.settings()
    assert settings["attacks"] == ["clean", "bim"]
    assert settings["threat"]["eps"] == 0.1
    with pytest.raises(ConfigurationError, match=r"'bmi' is unknown.*'bim'"):
        evaluator(attacks=["bmi"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), r"pixels in \[0, 1\] but span \[25\.5, 230\].*divide by 255"),
        (lambda x, y: (x - 0.2, y), r"span \[-0\.1, 0\.7\].*mean=… and std=…"),
        (lambda x, y: ((x * 255).byte(), y), r"dtype torch\.uint8; expected floating point"),
        (lambda x, y: (x, y + 1), r"Labels span 1…2, but the model has 2 classes"),
        (lambda x, y: (x, y - 1), r"Labels span -1…0"),
        (lambda x, y: (x, y[:3]), r"Expected logits \(batch, classes\) and labels \(batch,\), got \(5, 2\) and \(3,\)"),
        (lambda x, y: (x, y[:, None]), r"got \(5, 2\) and \(5, 1\)"),
    ],
)
def test_unsuitable_batches_are_refused_and_not_counted(change, message):
    run = evaluator()
    with pytest.raises(ConfigurationError, match=message):
        run.evaluate(brightness, *change(*batch()), range(5))
    assert not run.counts.any()


def test_images_a_rounding_outside_the_pixel_range_pass():
    x = torch.tensor([-5e-7, 1 + 5e-7]).reshape(2, 1, 1, 1)
    evaluator([]).evaluate(brightness, x, torch.tensor([0, 1]), range(2))


# --- leaving no trace -------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    """A model in training whose first block is frozen in evaluation mode, but for one module inside."""
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.Dropout(), nn.Linear(4, 2))
    net.train()
    net[0].eval()
    net[0][2].train()
    return net


@pytest.mark.parametrize("fails", [False, True], ids=["", "exception inside"])
def test_modes_and_random_state_come_back(model, fails):
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    torch.manual_seed(0)
    state = torch.get_rng_state()
    parameters = [p.detach().clone() for p in model.state_dict().values()]
    try:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            torch.rand(3)
            torch.manual_seed(123)
            model(torch.rand(5, 4))
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, parameters, model.state_dict().values()))


def test_gradients_can_be_taken_inside_inference_mode(model):
    with torch.inference_mode():
        with undisturbed(model), torch.enable_grad():
            x = torch.rand(3, 4).requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
        assert gradient.abs().sum() > 0
        assert torch.is_inference_mode_enabled()
