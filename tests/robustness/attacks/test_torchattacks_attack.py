"""Attacks of torchattacks by name: results equal those of calling the library by hand, and no state changes."""

import json
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import InputSpace, RobustnessEvaluator, RobustnessSettings, threat_model
from lightning_normgeo.robustness.attacks.torchattacks_attack import check_torchattacks, torchattacks_attack
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from support.projects import same

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchattacks

PIXELS = InputSpace(None, None, normalized_data=False)
THREAT = threat_model("pixel-8-255")
BACKWARD = ("CW", "DeepFool", "FAB", "SparseFool")  # attacks that call .backward() on the model's loss
DETERMINISTIC = {
    "VANILA": {},
    "FGSM": {"eps": 0.05},
    "BIM": {"eps": 4 / 255, "alpha": 1 / 255, "steps": 5},
    "PGD": {"eps": 0.1, "steps": 4, "random_start": False},
    "PGDL2": {"eps": 0.5, "random_start": False},
    "CW": {"steps": 30, "lr": 0.05, "c": 10},
    "DeepFool": {"steps": 20},
    "FAB": {"eps": 0.05, "n_classes": 5},
}
RANDOM = {
    "PGD": {"eps": 0.1, "steps": 4},
    "PGDL2": {"eps": 0.5},
    "FFGSM": {"eps": 0.1},
    "GN": {"std": 0.2},
    "EOTPGD": {"eps": 0.1, "steps": 3},
    "Jitter": {"eps": 0.1, "steps": 3},
    "DIFGSM": {"eps": 0.1, "steps": 3},  # draws for the whole batch
    "APGD": {"eps": 0.05},  # draws for the samples that are still right
    "Square": {"eps": 0.05, "n_queries": 60},
    "AutoAttack": {"eps": 0.08, "n_classes": 5},
}


def network(seed=0):
    """A classifier into 5 classes with batch normalization, which small perturbations change."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()
        net = nn.Sequential(*body, nn.Linear(8 * 16, 5))
        net[1].running_mean.normal_()
        nn.init.normal_(net[-1].weight, std=0.5)
        with torch.no_grad():  # no class has a large margin
            net[-1].bias.sub_(net.eval()(torch.rand(64, 3, 8, 8)).mean(0))
    return net


def data(n=8, dtype=torch.float32):
    """Images, with the network's own predictions as labels of all but the last."""
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = network()(x).argmax(1)
    y[-1] = (y[-1] + 1) % 5
    return x.to(dtype), y


def evaluated(name, net, x, y, options=None, inputs=PIXELS, **settings):
    """Return the attacked images of an evaluator as pixels, and its per-sample results."""
    given = {"attacks": [f"torchattacks.{name}"], "fold": False, **settings}
    if options:
        given["attack_options"] = {f"torchattacks.{name}": options}
    evaluator = RobustnessEvaluator(net, inputs, RobustnessSettings(**given), net, num_images=len(x))
    evaluator.put(x, y, range(len(x)))
    decisions = evaluator.finish()
    shown = evaluator.shown.pixels[f"torchattacks.{name}"]
    return torch.stack([shown[i] for i in range(len(x))]), decisions


def by_hand(name, net, x, y, options):
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        return getattr(torchattacks, name)(net, **options)(x, y).detach()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_an_attack_by_name_equals_torchattacks_called_by_hand(name):
    (x, y), net = data(), network()
    options = DETERMINISTIC[name]
    seeded = {"seed": 3} if name == "FAB" else {}
    adversarial, decisions = evaluated(name, net, x, y, options, seed=3)
    theirs = by_hand(name, network(), x, y, {**options, **seeded})
    assert torch.equal(adversarial, theirs)
    rows = decisions.of(f"torchattacks.{name}")
    assert torch.equal(rows.prediction, network()(theirs).argmax(1))
    assert torch.equal(rows.linf, (theirs - x).abs().flatten(1).amax(1))
    assert bool((rows.prediction != y)[:-1].any()) == (name != "VANILA"), "the attack does something"


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_belong_to_a_sample_and_not_to_its_batch(name):
    """Alone, in a batch, and in another order of other samples, a sample is attacked in the same way."""
    (x, y), net = data(), network()
    options = check_torchattacks(name, THREAT, RANDOM[name])

    def attacked(which):
        return torchattacks_attack(name, net, x[which], y[which], options, [10 + k for k in which], 3)

    together, mixed = attacked(list(range(8))), attacked([6, 2, 7, 0])
    torch.testing.assert_close(mixed, together[[6, 2, 7, 0]], rtol=0, atol=2e-6)
    for k in (0, 5, 7):
        torch.testing.assert_close(attacked([k]), together[k : k + 1], rtol=0, atol=2e-6)
    moved = (together != x).flatten(1).any(1)
    assert bool(moved.any())
    other = torchattacks_attack(name, net, x, y, options, range(8), 4)
    assert not torch.allclose(other, together)


def test_attacks_in_the_linf_ball_get_the_threat_model_and_options_win():
    threat = threat_model("pixel-8-255", eps=0.02, step_size=0.003, steps=7)
    assert check_torchattacks("PGD", threat, {}) == {"eps": 0.02, "alpha": 0.003, "steps": 7, "random_start": True}
    assert check_torchattacks("BIM", threat, {"eps": 0.5}) == {"eps": 0.5, "alpha": 0.003, "steps": 7}
    assert check_torchattacks("FGSM", threat, {}) == {"eps": 0.02}
    assert check_torchattacks("AutoAttack", threat, {})["eps"] == 0.02
    assert check_torchattacks("FAB", threat, {"steps": 3}).items() >= {"eps": 0.02, "steps": 3, "norm": "Linf"}.items()


def test_the_step_of_an_attack_of_one_step_keeps_its_ratio_to_the_radius():
    found = check_torchattacks("FFGSM", threat_model("pixel-8-255", eps=0.02, step_size=0.003), {})
    assert found == {"eps": 0.02, "alpha": pytest.approx(0.025)}


def test_other_attacks_keep_their_own_settings_and_l2_takes_the_l2_radius():
    assert check_torchattacks("CW", THREAT, {"c": 2}) == {"c": 2, "kappa": 0, "steps": 50, "lr": 0.01}
    assert check_torchattacks("PGDL2", THREAT, {}).items() >= {"eps": 1.0, "alpha": 0.2}.items()
    assert check_torchattacks("Square", THREAT, {"norm": "L2"})["eps"] == THREAT.eps_l2 == 0.5
    assert check_torchattacks("AutoAttack", THREAT, {"norm": "L2", "eps": 0.7})["eps"] == 0.7


def test_a_threat_model_in_normalized_space_gives_nothing_to_attacks_on_pixels():
    found = check_torchattacks("PGD", threat_model("galloway2019"), {"steps": 3})
    assert found == {"eps": 8 / 255, "alpha": 2 / 255, "steps": 3, "random_start": True}


def test_settings_are_plain_values():
    settings = RobustnessSettings(attacks=["torchattacks.Pixle", "torchattacks.AutoAttack"])
    described = settings.describe(PIXELS)
    assert json.loads(json.dumps(described))["attacks"] == described["attacks"]
    assert described["attacks"]["torchattacks.Pixle"]["options"]["x_dimensions"] == [2, 10]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("PDG", {}, r"no attack 'PDG'; choose one of: .*'PGD'"),
        ("MultiAttack", {}, r"MultiAttack\(attacks, .*one by one"),
        ("LGV", {}, "LGV.*trainloader.*cannot be made"),
        ("PGD", {"epsilon": 0.1}, "PGD has no option 'epsilon'; it takes eps, alpha, steps, random_start"),
        ("PGD", {"model": 1}, "PGD has no option 'model'"),
        ("VANILA", {"eps": 1}, "VANILA has no option 'eps'; it takes nothing"),
        ("PGD", {"eps": "8/255"}, "eps='8/255' is text; give a number"),
        ("PGD", {"eps": torch.tensor(0.1)}, "PGD cannot be made with .*not JSON serializable"),
        ("AutoAttack", {"version": "fast"}, "AutoAttack cannot be made .*Not valid version"),
        ("Pixle", {"restarts": -1}, "Pixle cannot be made .*restarts must be"),
        ("FAB", {"norm": "L1"}, "norm='L1' needs a radius: give eps"),
    ],
)
def test_what_cannot_work_is_refused_before_there_is_a_model(name, options, match):
    with pytest.raises(ConfigurationError, match=match):
        RobustnessSettings(attacks=[f"torchattacks.{name}"], attack_options={f"torchattacks.{name}": options})


def test_an_l2_radius_in_normalized_space_has_to_be_given():
    with pytest.raises(ConfigurationError, match="Square with norm='L2' needs a radius: give eps too, in pixels"):
        check_torchattacks("Square", threat_model("galloway2019", eps_l2=1.0), {"norm": "L2"})


def test_without_torchattacks_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ConfigurationError, match=r'pip install "lightning-normgeo\[torchattacks\]"'):
        RobustnessSettings(attacks=["torchattacks.PGD"])
    assert RobustnessSettings(attacks=["bim"]).all_attacks[0].name == "bim", "ours need no torchattacks"


def random_states():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def state(net):
    """Return the gradient objects, their values, the model's other state, and all random states."""
    modes, kept = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    gradients = [p.grad for p in net.parameters()]
    values = [None if g is None else g.clone() for g in gradients]
    return [id(g) for g in gradients], (values, modes, kept, random_states())


@pytest.mark.parametrize("raises", [False, True], ids=["", "raising"])
@pytest.mark.parametrize("name", [*BACKWARD, "PGD", "Square", "Pixle", "OnePixel", "APGD"])
def test_an_attack_changes_no_gradient_mode_buffer_or_random_state(name, raises):
    (x, y), net = data(4), network()
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    net[2].train()
    calls = []

    def logits(images):
        calls.append(len(images))
        if raises and len(calls) == 3:
            raise RuntimeError("the model broke")
        return net(images)

    before = state(net)
    if raises:
        with pytest.raises(RuntimeError, match="the model broke") as caught:
            torchattacks_attack(name, logits, x, y, check_torchattacks(name, THREAT, {}), range(4), 0)
        assert caught.value.__notes__[0].startswith(f"This was torchattacks.{name} with")
    else:
        adversarial = torchattacks_attack(name, logits, x, y, check_torchattacks(name, THREAT, {}), range(4), 0)
        assert not adversarial.requires_grad
    after = state(net)
    assert len(calls) >= 3
    assert before[0] == after[0], "every .grad is the same object"
    assert same(before[1], after[1])


@pytest.mark.parametrize("name", ["PGD", "Pixle", "OnePixel", "Square"])
def test_what_is_drawn_depends_on_seed_and_batch_alone(name):
    (x, y), net = data(4), network()
    options = check_torchattacks(name, THREAT, {"n_queries": 5} if name == "Square" else {})

    def attacked(seed, first, state):
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002
        return torchattacks_attack(name, net, x, y, options, range(first, first + 4), seed)

    once = attacked(0, 0, state=1)
    assert torch.equal(once, attacked(0, 0, state=2))
    assert not torch.equal(once, attacked(1, 0, state=1))
    assert not torch.equal(once, attacked(0, 4, state=1))


def test_a_seed_among_the_options_wins():
    (x, y), net = data(4), network()
    given, later = (check_torchattacks("Square", THREAT, {"n_queries": 5, **seed}) for seed in ({"seed": 5}, {}))
    assert given["seed"] == 5
    assert "seed" not in later
    results = [torchattacks_attack("Square", net, x, y, *rest) for rest in ((given, range(4), 0), (later, range(4), 5))]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_attack_runs_silently_and_stays_in_the_range_of_pixels(dtype, capfd):
    (x, y), net = data(3, dtype), network().to(dtype)
    names = [name for name in torchattacks.__all__ if name not in ("MultiAttack", "LGV")]
    small = {"AutoAttack": {"version": "rand"}, "Square": {"n_queries": 20}, "CW": {"steps": 5}}
    for name in names:
        options = check_torchattacks(name, THREAT, small.get(name, {}))
        adversarial = torchattacks_attack(name, net, x, y, options, range(3), 0)
        assert adversarial.dtype == dtype, name
        assert adversarial.shape == x.shape
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        if options.get("eps") == THREAT.eps and options.get("norm", "Linf") == "Linf":
            assert (adversarial - x).abs().max() <= THREAT.eps + 1e-6, name
    assert len(names) == 31
    assert capfd.readouterr() == ("", "")


def test_in_float64_untouched_samples_come_back_bit_for_bit_and_others_are_those_of_float32():
    (x, y), net = data(), network()
    x = x.double() + 1e-12 * torch.arange(8).view(-1, 1, 1, 1)
    options = check_torchattacks("APGD", THREAT, {"eps": 0.02})
    wide = torchattacks_attack("APGD", network().double(), x, y, options, range(8), 0)
    narrow = torchattacks_attack("APGD", net, x.float(), y, options, range(8), 0)
    untouched = (narrow == x.float()).flatten(1).all(1)
    assert 1 < untouched.sum() < 8
    assert torch.equal(wide[untouched], x[untouched])
    apart = (wide[~untouched].float() - narrow[~untouched]).abs()
    assert apart.quantile(0.99) < 1e-3, "APGD's steps depend on losses, so that rounding can send a pixel elsewhere"
    assert apart.max() <= 2 * 0.02


def test_in_a_loop_of_inference_mode():
    (x, y), net = data(), network().train()
    expected, _ = evaluated("PGD", network(), x, y, {"random_start": False})
    with torch.inference_mode():
        batch = x + 0, y + 0
        assert batch[0].is_inference()
        with preserved_state(net):
            adversarial, _ = evaluated("PGD", net, *batch, {"random_start": False})
            minimal, _ = evaluated("CW", net, *batch, {"steps": 5})
    assert torch.equal(adversarial, expected)
    assert minimal.shape == x.shape
    assert net.training


@pytest.mark.parametrize("name", ["PGDL2", "DeepFool", "FAB"])
def test_weights_that_are_computed_and_stand_ins_in_channels_last_order(name):
    """Parametrized weights are computed once for many backward passes; gradients of images are not contiguous."""
    (x, y), net = data(), network()
    nn.utils.parametrizations.weight_norm(net[0])
    options = {"PGDL2": {"random_start": False}, "DeepFool": {"steps": 5}, "FAB": {"eps": 0.05}}[name]
    plain, _ = evaluated(name, net, x, y, options)
    fast, _ = evaluated(name, net, x, y, options, fold=True)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-3)
    assert not torch.equal(fast, x)
    assert all(p.grad is None for p in net.parameters())


def test_an_attack_that_finds_no_number_leaves_the_sample():
    """DeepFool divides by the norm of a gradient that is zero."""
    x, y = data()

    def flat(images):
        return images.flatten(1)[:, :5] * 0 + torch.tensor([1.0, 3, 0, 0, 0])

    options, ones = check_torchattacks("DeepFool", THREAT, {"steps": 1}), torch.ones_like(y)
    assert by_hand("DeepFool", Flat(flat), x, ones, options).isnan().all()
    assert torch.equal(torchattacks_attack("DeepFool", flat, x, ones, options, range(8), 0), x)


class Flat(nn.Module):
    """A function with a weight, in the form that torchattacks expects."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return self.function(images)


def test_rounding_excess_of_pixels_is_cut_off_before_an_attack_sees_it():
    (x, y), net, seen = data(), network(), []
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1 + 1e-6, -1e-6

    def logits(images):
        seen.append(images)
        return net(images)

    adversarial = torchattacks_attack("PGD", logits, x, y, check_torchattacks("PGD", THREAT, {}), range(8), 0)
    assert [bool(((images >= 0) & (images <= 1)).all()) for images in [*seen, adversarial]] == [True] * 11


@pytest.mark.parametrize("preset", ["pixel-8-255", "galloway2019-boxed"])
def test_normalized_images_are_attacked_as_pixels(preset):
    (x, y), net = data(), network()
    inputs = InputSpace((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), normalized_data=True)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (inputs.mean, inputs.std))

    def from_normalized(z):
        return net(z * std + mean)

    options = {"random_start": False}
    adversarial, decisions = evaluated("PGD", from_normalized, (x - mean) / std, y, options, inputs, preset=preset)
    theirs = by_hand("PGD", net, x, y, options)
    rows = decisions.of("torchattacks.PGD")
    torch.testing.assert_close(adversarial, theirs, rtol=0, atol=1e-5)
    assert rows.linf.max() == pytest.approx(8 / 255 / (1 if "pixel" in preset else 0.2), abs=1e-5)


def test_empty_batches_are_none_of_an_attack():
    x, y = data()
    assert torchattacks_attack("PGD", network(), x[:0], y[:0], {}, [], 0).shape == (0, 3, 8, 8)


def test_a_sweep_holds_for_attacks_that_the_threat_model_gives_their_radius() -> None:
    names = ["torchattacks.PGD", "torchattacks.PGDL2", "torchattacks.FGSM"]
    options = {"torchattacks.FGSM": {"eps": 0.5}}
    settings = RobustnessSettings(eps=[2 / 255, 4 / 255], attacks=names, attack_options=options)
    assert settings.rows == [
        "clean",
        "torchattacks.PGD_eps0.007843",
        "torchattacks.PGD_eps0.01569",
        "torchattacks.PGDL2",
        "torchattacks.FGSM",
    ]
    small, large, *_ = settings.all_attacks
    assert small.settings()["options"]["eps"] == 2 / 255
    assert small.settings()["options"]["alpha"] == pytest.approx(0.5 / 255)
    assert large.settings()["options"]["eps"] == 4 / 255
    assert large.settings()["attack"] == "PGD"
    assert large.settings()["version"].startswith("3.")
