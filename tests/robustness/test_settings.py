"""Settings of an evaluation: the attacks that follow from them, and every refused setting."""

import inspect
import json
import math
from dataclasses import fields

import docstring_parser
import pytest

from lightning_normgeo import RobustnessEvaluation, evaluate_robustness
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import ATTACKS, InputSpace, RobustnessSettings
from lightning_normgeo.robustness.attacks.attack import Noise
from lightning_normgeo.robustness.attacks.native_attacks import ProjectedGradient

PIXELS = InputSpace(None, None, normalized_data=False)
NORMALIZED = InputSpace((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), normalized_data=True)


SINGLE = [name for name in ATTACKS if not name.startswith(("standard", "sanity", "corruptions"))]
"""Attacks that make one row."""


def names(**changes):
    return [attack.name for attack in RobustnessSettings(**changes).all_attacks]


def one(name, **changes):
    (attack,) = RobustnessSettings(attacks=[name], **changes).all_attacks
    return attack


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "pixel"}, r"preset='pixel' is unknown.*'pixel-8-255'"),
        ({"restarts": 0}, r"restarts=0 must be an integer, at least 1"),
        ({"restarts": None}, r"restarts=None must be an integer"),
        ({"restarts": 1.5}, r"restarts=1\.5 must be an integer"),
        ({"restarts": True}, r"restarts=True must be an integer"),
        ({"batch_size": 0}, r"batch_size=0 must be an integer, at least 1"),
        ({"batch_size": "8"}, r"batch_size='8' must be an integer"),
        ({"max_samples": -1}, r"max_samples=-1 must be an integer, at least 1"),
        ({"seed": 0.5}, r"seed=0\.5 must be an integer"),
        ({"seed": None}, r"seed=None must be an integer"),
        ({"semantics": "all"}, r"semantics='all' is unknown; choose 'final' or 'any'"),
        ({"autocast": "16"}, r"autocast='16' is unknown; choose 'bf16' or 'fp16'"),
        ({"eps": []}, r"eps=\[\] must be different values, at least one"),
        ({"eps": [0.1, 0.1]}, r"eps=\[0\.1, 0\.1\] must be different values"),
        ({"eps": [0.1, None]}, r"eps=\[0\.1, None\] must be different values"),
        ({"eps": [0.1, -1]}, r"eps=-1 must be at least 0"),
        ({"eps": [0.1, 8]}, r"eps=8 is larger than the pixel range.*8/255"),
        ({"eps": 8}, r"eps=8 is larger than the pixel range.*8/255"),
        ({"eps": "0.1"}, r"eps='0\.1' must be at least 0"),
        ({"eps": math.nan}, r"eps=nan must be at least 0"),
        ({"preset": "galloway2019", "eps": math.inf}, r"eps=inf must be at least 0 and finite, in standard deviations"),
        ({"eps_l2": -0.5}, r"eps_l2=-0\.5 must be at least 0"),
        ({"eps_l2": [0.5, math.inf]}, r"eps_l2=inf must be at least 0 and finite"),
        ({"noise_std": True}, r"noise_std=True must be at least 0"),
        ({"noise_std": (0.1, math.nan)}, r"noise_std=nan must be at least 0"),
        ({"step_size": -1}, r"step_size=-1 must be at least 0"),
        ({"step_size": 0}, r"step_size=0 must be above 0: steps of that size leave the image where it is"),
        ({"step_size": 0.0, "eps": [0.1, 0.2]}, r"step_size=0\.0 must be above 0"),
        ({"step_size": [0.1]}, r"step_size=\[0\.1\] must be at least 0"),
        ({"steps": 0}, r"steps=0 must be an integer, at least 1"),
        ({"steps": 2.0}, r"steps=2\.0 must be an integer, at least 1"),
        ({"lower": 1.0}, r"lower=1\.0 must be less than upper=1\.0"),
        ({"lower": [0.0, 2.0]}, r"lower=\(0\.0, 2\.0\) must be less than upper=1\.0"),
        ({"upper": [1.0, 0.0]}, r"lower=0\.0 must be less than upper=\(1\.0, 0\.0\)"),
        ({"lower": []}, r"lower=\(\) must be a number, or one for each channel"),
        ({"lower": "0"}, r"lower='0' must be a number, or one for each channel"),
        ({"upper": [1.0, None]}, r"upper=\(1\.0, None\) must be a number, or one for each channel"),
        ({"upper": math.nan}, r"upper=nan must be a number"),
        (
            {"attacks": ["bmi"]},
            r"attacks=\['bmi'\]: 'bmi' is unknown; did you mean 'bim'\? Known are .*, 'apgd_l2', .*torchattacks",
        ),
        ({"attacks": ["bim", "pgd", "bim"]}, r"attacks=\['bim', 'pgd', 'bim'\]: 'bim' is there more than once"),
        ({"eps": [0.1, 0.10001]}, r"'bim_eps0\.1' is there more than once"),
        ({"attack_options": {"bim": {}}}, r"attack_options\['bim'\]: only attacks of torchattacks take them"),
        ({"attack_options": {"torchattacks.FGSM": {}}}, r"attack_options has an entry for 'torchattacks\.FGSM'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        RobustnessSettings(**changes)


def test_attacks_in_order_noise_first():
    assert names() == ["gaussian", "bim"]
    assert names(attacks=["pgd", "bim", "gaussian"]) == ["gaussian", "pgd", "bim"]
    assert names(attacks=[]) == []

    assert sorted(names(attacks=SINGLE)) == sorted(SINGLE)


def test_a_sweep_has_one_row_for_each_value():
    found = RobustnessSettings(
        attacks=["gaussian", "bim", "pgd", "bim_l2", "pgd_l2"],
        eps=[0.1, 8 / 255],
        noise_std=[0.1, 0.2, 0.3],
        eps_l2=(0.5,),
    ).all_attacks
    assert [attack.name for attack in found] == [
        *("gaussian_std0.1", "gaussian_std0.2", "gaussian_std0.3"),
        *("bim_eps0.1", "bim_eps0.03137", "pgd_eps0.1", "pgd_eps0.03137", "bim_l2", "pgd_l2"),
    ]
    assert [attack.std for attack in found if isinstance(attack, Noise)] == [0.1, 0.2, 0.3]
    linf = [attack for attack in found if isinstance(attack, ProjectedGradient) and attack.norm == "linf"]
    assert [attack.eps for attack in linf] == [0.1, 8 / 255] * 2
    assert [attack.step_size for attack in linf] == pytest.approx([0.1 / 4, 2 / 255] * 2, rel=1e-15)


@pytest.mark.parametrize(
    ("changes", "eps", "step_size", "times_sqrt_d"),
    [
        ({}, 0.5, 0.125, False),
        ({"eps_l2": 1.0}, 1.0, 0.25, False),
        ({"eps_l2": 1.0, "eps": 0.1, "step_size": 0.05}, 1.0, 0.5, False),
        ({"eps_l2": [2.0]}, 2.0, 0.5, False),
        ({"preset": "galloway2019"}, 0.03, 0.003, True),
        ({"preset": "galloway2019", "eps": 0.06}, 0.06, 0.006, True),
        ({"preset": "galloway2019", "eps_l2": 3.0}, 3.0, 0.3, False),
    ],
    ids=str,
)
def test_radius_and_step_in_l2(changes, eps, step_size, times_sqrt_d):
    attack = one("bim_l2", **changes)
    assert (attack.eps, attack.times_sqrt_d) == (eps, times_sqrt_d)
    assert attack.step_size == pytest.approx(step_size, rel=1e-14)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eps": 4 / 255}, {"bim": 1 / 255}),
        ({"eps": 4 / 255, "step_size": 0.01}, {"bim": 0.01}),
        ({"eps": [4 / 255, 0.1]}, {"bim_eps0.01569": 1 / 255, "bim_eps0.1": 0.025}),
        ({"eps": [4 / 255, 0.1], "step_size": 0.01}, {"bim_eps0.01569": 0.01, "bim_eps0.1": 0.01}),
    ],
    ids=str,
)
def test_a_step_is_what_was_given_or_a_part_of_the_radius(changes, steps):
    found = RobustnessSettings(attacks=["bim"], **changes).all_attacks
    assert {attack.name: attack.step_size for attack in found} == pytest.approx(steps, rel=1e-14)


def test_restarts_are_for_random_starts_alone():
    for name in ("bim", "pgd", "bim_l2", "pgd_l2"):
        attack = one(name, restarts=4)
        assert (attack.random_start, attack.restarts) == ((True, 4) if name.startswith("pgd") else (False, 1))
        assert attack.norm == ("l2" if name.endswith("_l2") else "linf")
        assert attack.steps == 10


def test_bounds_per_channel_are_tuples():
    settings = RobustnessSettings(lower=[0.0, 0.1], upper=(0.9, 0.8))
    assert (settings.threat.lower, settings.threat.upper) == ((0.0, 0.1), (0.9, 0.8))
    assert RobustnessSettings(lower=[0.0, 0.1]).threat.upper == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        RobustnessSettings(),
        RobustnessSettings("galloway2019-boxed", attacks=SINGLE, semantics="any", restarts=3),
        RobustnessSettings(eps=[0.1, 0.2], lower=[0.1] * 3, autocast="bf16", max_samples=7, seed=2**40),
    ],
    ids=["defaults", "boxed", "sweep"],
)
@pytest.mark.parametrize("inputs", [PIXELS, NORMALIZED], ids=["pixels", "normalized"])
def test_what_decides_the_results_is_told_in_plain_values(settings, inputs):
    told = json.loads(json.dumps(settings.describe(inputs), allow_nan=False))
    assert list(told["attacks"]) == [attack.name for attack in settings.all_attacks]
    assert told["normalization"] == (None if inputs.mean is None else {"mean": [0.5, 0.4, 0.3], "std": [0.2] * 3})
    assert told["normalized_data"] == inputs.normalized_data
    assert told["precision"] == (settings.autocast or "fp32")
    assert told["generator"] == "philox4x32-10"
    for name in ("preset", "semantics", "seed", "fold", "max_samples"):
        assert told[name] == getattr(settings, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "galloway2019"},
        {"eps": 0.1},
        {"eps_l2": 0.1},
        {"step_size": 0.1},
        {"steps": 3},
        {"noise_std": 0.1},
        {"lower": 0.1},
        {"upper": 0.9},
        {"attacks": ["bim"]},
        {"semantics": "any"},
        {"attacks": ["pgd"], "restarts": 2},
        {"seed": 1},
        {"fold": False},
        {"autocast": "bf16"},
        {"max_samples": 5},
    ],
    ids=str,
)
def test_whatever_changes_results_changes_the_description(changes):
    before = RobustnessSettings(attacks=["pgd"]) if "restarts" in changes else RobustnessSettings()
    assert RobustnessSettings(**changes).describe(PIXELS) != before.describe(PIXELS)


def described(documented):
    found = docstring_parser.parse(documented.__doc__).params
    return {one.arg_name: " ".join((one.description or "").split()) for one in found}


@pytest.mark.parametrize("user", [RobustnessEvaluation, evaluate_robustness])
def test_a_setting_is_the_same_wherever_it_is_given(user):
    """Name, default and description are equal; only the callback skips unsuitable models and continues."""
    parameters, texts = inspect.signature(user).parameters, described(RobustnessSettings)
    for setting in fields(RobustnessSettings):
        if setting.init:
            assert described(user)[setting.name] == texts[setting.name]
            if setting.name != "on_unsuitable":
                assert parameters[setting.name].default == setting.default
