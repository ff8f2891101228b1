"""Transfer, sanity checks and random models: networks that are made to pass or to fail."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import evaluate_robustness
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.robustness.attacks.search.projected_gradient import ascent
from lightning_normgeo.robustness.results.sanity_checks import FAILED, PASSED, UNTESTED, verdict_on
from support.small_classifiers import conv_net, draw, pixels

COUNT = 60


class Masked(nn.Module):
    """A classifier whose gradient points the wrong way, though random points find its errors."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        scores = self.net(x)
        return 2 * scores.detach() - scores


class Noisy(nn.Module):
    """A classifier that adds noise to its input."""

    def __init__(self, net, std):
        super().__init__()
        self.net, self.std = net, std

    def forward(self, x):
        return self.net(x + self.std * torch.randn_like(x))


def loader(net, n=COUNT):
    x = pixels(n, 3, 8, 8, seed=2, dtype=torch.float32)
    return DataLoader(TensorDataset(x, net(x).argmax(1)), 20)


def evaluated(net, attacks=("sanity",), data=None, **settings):
    given = {"eps": 0.03, "steps": 8, "progress": False} | settings
    return evaluate_robustness(net, data or loader(net), attacks=list(attacks), **given)


def outcomes(report):
    return [check.outcome for check in report.checks]


def test_an_honest_network_passes():
    report = evaluated(conv_net(3))
    assert outcomes(report) == [PASSED, PASSED, PASSED, UNTESTED, PASSED]
    assert verdict_on(report.checks) == "sanity: passed 4 of 5 checks, none failed"
    assert "sanity: passed 4 of 5" in str(report)
    assert [check["outcome"] for check in report.as_dict()["sanity"]] == outcomes(report)
    assert report["sanity-unbounded"].correct == 0
    assert report["sanity-random"].correct >= report["sanity-iterative"].correct
    assert "worst" in report
    assert not any(name.startswith("worst_") for name in report)


def test_attacks_of_one_radius_that_differ_in_strength_cause_no_warning():
    """A single step is weaker than several, which is no sign of a larger radius that is searched badly."""
    weak = {"name": "weak", "attack": "bim", "steps": 1, "step_size": 1e-4}
    report = evaluated(conv_net(3), ["bim", weak, "sanity"], eps=[0.02, 0.03])
    assert not any("Accuracy rises" in text for text in report.warnings)


def test_gradients_that_lead_nowhere_fail_by_name():
    honest = conv_net(3)
    report = evaluated(Masked(honest), data=loader(honest), eps=0.1)
    found = {check.claim: check.outcome for check in report.checks}
    assert found["an attack with gradients is no weaker than random search"] == FAILED
    assert verdict_on(report.checks).startswith(
        "sanity: failed. Not so: an attack with gradients is no weaker than random"
    )


def test_zero_gradients_fail_by_name():
    honest = conv_net(3)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = honest

        def forward(self, x):
            return (self.net(x) * 50).round() / 50 + 0 * x.sum((1, 2, 3))[:, None]

    with warnings.catch_warnings(action="ignore", category=MeasurementWarning):
        report = evaluated(Flat(), data=loader(honest))
    assert outcomes(report)[0] == FAILED
    assert outcomes(report)[-1] == FAILED, "without gradients even an unbounded attack does not move"


def test_without_the_attacks_for_it_there_is_no_verdict():
    report = evaluated(conv_net(3), ["bim"])
    assert report.checks == []
    assert "sanity" not in str(report)
    assert "sanity" not in report.as_dict()


def test_transfer_is_the_attack_on_the_other_network():
    net, other = conv_net(3), conv_net(4)
    data = loader(net)
    x = torch.cat([images for images, _ in data])
    y = torch.cat([labels for _, labels in data])
    before = copy.deepcopy(other.state_dict())
    report = evaluated(net, ["bim", "transfer", "sanity"], data, surrogate=other)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), before.values(), strict=True))
    moved = x.clone()
    for _ in range(8):
        _, _, gradient = ascent(other, moved, y)
        moved = torch.minimum(torch.maximum(moved + 0.03 / 4 * gradient.sign(), x - 0.03), x + 0.03).clamp(0, 1)
    assert report["transfer"].correct == int((net(moved).argmax(1) == y).sum())
    assert report["transfer"].correct >= report["bim"].correct
    assert outcomes(report)[3] == PASSED
    assert report.settings["attacks"]["transfer"]["steps"] == 8


def test_a_checkpoint_of_the_same_network_is_a_surrogate(tmp_path):
    net, other = conv_net(3), conv_net(4)
    for name, content in (("plain", other.state_dict()), ("lightning", {"state_dict": other.state_dict(), "epoch": 3})):
        torch.save(content, tmp_path / name)
        found = evaluated(net, ["transfer"], surrogate=tmp_path / name)
        assert found.results == evaluated(net, ["transfer"], surrogate=other).results


@pytest.mark.parametrize(
    ("surrogate", "attacks", "message"),
    [
        (None, ["transfer"], "needs another network: give surrogate="),
        ("x.ckpt", ["bim"], "no attack is transferred from it"),
        (3, ["transfer"], "surrogate=3 must be a network, or the path of a checkpoint"),
        ("missing.ckpt", ["transfer"], "surrogate='missing.ckpt' gives no surrogate"),
    ],
)
def test_surrogates_that_cannot_work_are_refused(surrogate, attacks, message):
    with pytest.raises(ConfigurationError, match=message):
        evaluated(conv_net(3), attacks, surrogate=surrogate)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ConfigurationError, match=r"gives no surrogate .* Give a checkpoint of the same network"):
        evaluated(conv_net(3), ["transfer"], surrogate=str(tmp_path / "other.pt"))


def test_a_random_network_is_named_and_its_accuracy_has_a_spread():
    honest = conv_net(3)
    with pytest.warns(MeasurementWarning, match="random in evaluation mode"):
        report = evaluated(Noisy(honest, 0.3), ["gaussian"], loader(honest))
    assert list(report) == ["clean", "gaussian", *(f"clean_draw{k}" for k in range(2, 6))]
    drawn = report.clean_draws
    assert len(drawn) == 5
    assert len(set(drawn)) > 1
    mean = 100 * sum(drawn) / 5
    assert f"random model: clean accuracy {mean:.2f} % on average over 5 draws" in str(report)
    assert report.as_dict()["clean_draws"] == drawn
    assert report.settings["deterministic"] is False
    with pytest.warns(MeasurementWarning):
        again = evaluated(Noisy(honest, 0.3), ["gaussian"], loader(honest))
    assert again.clean_draws == drawn
    assert evaluated(honest, ["gaussian"]).clean_draws == []


def test_gradients_of_a_random_network_are_means_over_its_draws():
    net = Noisy(conv_net(3, torch.float64), 0.2)
    x, y = pixels(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(5)
    _, losses, gradient = ascent(net, x, y, draws=6)
    torch.manual_seed(5)
    single = [ascent(net, x, y) for _ in range(6)]
    torch.testing.assert_close(gradient, torch.stack([one[2] for one in single]).mean(0))
    torch.testing.assert_close(losses, torch.stack([one[1] for one in single]).mean(0))


def test_averaging_over_draws_finds_the_direction_that_one_draw_hides():
    """A linear classifier that flips the sign of a large part of its gradient at random."""
    weight, hidden = draw(192, seed=1).float(), 30 * draw(192, seed=2).float()

    class Flips(nn.Module):
        def forward(self, x):
            sign = torch.sign(torch.randn(len(x), 1))
            rise = (x - 0.5).flatten(1) @ weight[:, None] + sign * (x - x.detach()).flatten(1) @ hidden[:, None]
            return torch.cat([-rise, rise], 1) + 1e-6 * torch.randn(len(x), 2)

    x = 0.5 + 0.1 * draw(40, 3, 8, 8, seed=3).float()
    y = ((x - 0.5).flatten(1) @ weight > 0).long()
    data = DataLoader(TensorDataset(x, y), 40)
    asked = [{"name": f"bim{k}", "attack": "bim", "loss": "margin", "eot": k, "steps": 3} for k in (1, 64)]
    with pytest.warns(MeasurementWarning):
        report = evaluate_robustness(Flips(), data, attacks=asked, eps=0.01, progress=False, mean=0.0, std=1.0)
    assert report["bim64"].correct < report["bim1"].correct
