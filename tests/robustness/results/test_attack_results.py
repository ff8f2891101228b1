"""Counts, classes, comparisons, and warnings about failing attacks, which appear only if an attack fails."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import (
    InputSpace,
    RobustnessEvaluator,
    RobustnessSettings,
    SampleResults,
    compare,
    results_of,
    sanity_warnings,
)
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows
from support import reference as ref

PIXELS = InputSpace(None, None, normalized_data=False)


def made(predictions, labels, indices=None, attack="bim", **values):
    """Return per-sample results with the given predictions under one attack."""
    n = len(labels)
    index = torch.arange(n) if indices is None else torch.tensor(indices, dtype=torch.long)
    columns = {name: torch.zeros(n) for name in SampleRows._fields[3:]} | {"sample": index}
    columns |= {k: torch.tensor(v) for k, v in values.items()}
    found = SampleResults(["clean", attack])
    labels, predictions = (torch.tensor(x, dtype=torch.long) for x in (labels, predictions))
    found.add("clean", SampleRows(index, labels, labels, **columns))
    found.add(attack, SampleRows(index, labels, predictions, **columns))
    return found


# --- counts -----------------------------------------------------------------------------------------------------------


def test_every_quantity_of_a_result():
    found = results_of(made([0, 1, 2, 2, 2], [0, 0, 0, 2, 2], loss=[1.0, 2, 3, 4, 5], linf=[0.1, 0.5, 0, 0, 0.2]))
    bim = found["bim"]
    assert list(found) == ["clean", "bim"]
    assert (bim.correct, bim.n, bim.accuracy, bim.loss, bim.l2) == (3, 5, 0.6, 3.0, 0.0)
    assert bim.linf == pytest.approx(0.5)
    assert bim.accuracy_drop == pytest.approx(0.4)
    assert (bim.ci_low, bim.ci_high) == pytest.approx(ref.wilson(3, 5), rel=1e-9)
    assert bim.by_class == {0: (1, 3), 2: (2, 2)}
    assert found["clean"].by_class == {0: (3, 3), 2: (2, 2)}
    assert found["clean"].accuracy_drop == 0


def test_without_samples_nothing_is_known():
    for result in results_of(SampleResults(["clean", "bim"])).values():
        assert (result.correct, result.n) == (0, 0)
        assert math.isnan(result.accuracy)
        assert math.isnan(result.accuracy_drop)
        assert (result.ci_low, result.ci_high, result.by_class) == (0, 1, {})


# --- comparisons ------------------------------------------------------------------------------------------------------

SAMPLES = st.dictionaries(st.integers(0, 40), st.booleans(), max_size=40)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SAMPLES, SAMPLES)
def test_comparison_counts_pairs(first, second):
    one, other = (made([int(not right) for right in x.values()], [0] * len(x), list(x)) for x in (first, second))
    pairs = [(first[k], second[k]) for k in first if k in second]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    found = compare(one, other, "bim")
    assert (found["only_first"], found["only_second"], found["n"]) == (lost, won, len(pairs))
    accuracies = [sum(pair[k] for pair in pairs) / len(pairs) if pairs else math.nan for k in (0, 1)]
    assert found["difference"] == pytest.approx(accuracies[1] - accuracies[0], abs=1e-12, nan_ok=True)
    assert found["p_value"] == pytest.approx(binomtest(won, won + lost).pvalue if won + lost else 1.0, rel=1e-9)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigurationError, match="different labels: they are not of the same data"):
        compare(made([0, 0], [0, 1]), made([0, 0], [0, 0]), "bim")
    for pair in ([made([0], [0]), made([0], [0], attack="pgd")], [made([0], [0], attack="pgd"), made([0], [0])]):
        with pytest.raises(ConfigurationError, match="attack='bim' was not evaluated; known are 'clean', 'pgd'"):
            compare(*pair, "bim")


# --- signs ------------------------------------------------------------------------------------------------------------


def digits(n=300, seed=0):
    """Return images of two classes that differ slightly in brightness, everywhere."""
    labels = torch.arange(n) % 2
    noise = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return 0.5 * noise + (0.25 + 0.06 * (labels - 0.5)).view(-1, 1, 1, 1), labels


def healthy(x):
    return torch.stack([-4 * (x.mean((1, 2, 3)) - 0.5), 4 * (x.mean((1, 2, 3)) - 0.5)], 1)


def saturated(x):
    """Model that returns very confident probabilities in place of logits: gradients underflow."""
    return (1e4 * healthy(x)).softmax(1) * 1e4


class Wrong(torch.autograd.Function):
    """The identity, with an uninformative gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        pattern = torch.linspace(-1, 1, 36).sin().view(6, 6)
        return (pattern - pattern.mean() + 0 * gradient) * (-1.0) ** torch.arange(6)


class Opposite(Wrong):
    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def shown(logits, **changes):
    settings = RobustnessSettings(**({"attacks": ["gaussian", "bim"], "batch_size": 100} | changes))
    run = RobustnessEvaluator(logits, PIXELS, settings)
    run.put(*digits(), range(300))
    return sanity_warnings(run.finish(), settings.all_attacks)


EVERYTHING = {
    "attacks": ["gaussian", "bim", "pgd", "bim_l2", "pgd_l2"],
    "eps": [0.01, 0.03, 0.1],
    "noise_std": [0.01, 0.1, 0.2],
    "eps_l2": [0.1, 0.5],
}


@pytest.mark.parametrize("semantics", ["final", "any"])
@pytest.mark.parametrize("preset", ["pixel-8-255", "default"])
def test_a_healthy_model_raises_no_suspicion(semantics, preset):
    changes = EVERYTHING if preset == "pixel-8-255" else {"attacks": EVERYTHING["attacks"]}
    assert shown(healthy, semantics=semantics, **changes) == []


def test_a_model_that_is_always_wrong_raises_no_suspicion():
    """Under ``any`` its images are not attacked, so no loss rises."""
    assert shown(lambda x: -50 * healthy(x), semantics="any") == []


def test_noise_that_is_longer_than_an_l2_attack_is_none():
    """0.2 is less than 0.5, but not 0.2·√36."""
    weak = {"attacks": ["gaussian", "bim_l2"], "noise_std": 0.2, "eps_l2": 0.5, "steps": 1, "step_size": 1e-4}
    assert shown(healthy, **weak) == []
    strong = shown(healthy, **(weak | {"eps_l2": 3.0}))
    assert any("gaussian does more harm than bim_l2" in sign for sign in strong)


def test_gradients_that_are_zero_are_seen():
    (zero, idle, *_) = shown(saturated)
    assert "The gradient is zero for" in zero
    assert "of 300 images" in zero
    assert "bim does not raise the loss (+0 on average)" in idle


@pytest.mark.parametrize("wrong", [Opposite])
def test_gradients_that_lead_down_are_seen(wrong):
    signs = shown(lambda x: healthy(wrong.apply(x)), attacks=["bim", "pgd_l2"], restarts=2)
    assert [sign.partition(" (")[0] for sign in signs] == [
        "bim does not raise the loss",
        "pgd_l2 does not raise the loss",
    ]


def test_an_attack_that_does_less_harm_than_noise_is_seen():
    signs = shown(lambda x: healthy(Wrong.apply(x)), noise_std=0.2, eps=0.2, step_size=0.05)
    assert any(sign.startswith("gaussian does more harm than bim, though it is no larger") for sign in signs)


def test_less_harm_by_a_larger_radius_is_seen():
    """The step is so large that the last iterate lies beyond a narrow valley, where the loss is low."""

    def valley(x):
        level = x.mean((1, 2, 3)) - 0.5
        return healthy(torch.where(level.abs() < 0.05, level, -4 * level).view(-1, 1, 1, 1) + 0.5)

    (sign,) = [s for s in shown(valley, attacks=["bim"], eps=[0.04, 0.2]) if "rises" in s]
    assert "Accuracy rises from bim_eps0.04 to bim_eps0.2, with the larger radius" in sign


def test_what_may_be_chance_is_not_said():
    """Three samples of one side against none of the other have a p-value of 1/4, eight of 1/128."""
    for count, said in ((3, 0), (8, 1)):
        found = SampleResults(["clean", "bim_eps0.1", "bim_eps0.2"])
        labels = torch.zeros(50, dtype=torch.long)
        for attack, wrong, loss in (("clean", 0, 0.0), ("bim_eps0.1", count, 1.0), ("bim_eps0.2", 0, 1.0)):
            values = [torch.full((50,), loss)] + [torch.ones(50)] * 3
            found.add(
                attack,
                SampleRows(torch.arange(50), labels, (torch.arange(50) < wrong).long(), *values, torch.arange(50)),
            )
        attacks = RobustnessSettings(attacks=["bim"], eps=[0.1, 0.2]).all_attacks
        assert len(sanity_warnings(found, attacks)) == said
