"""Attacks as they are asked for: by name, or with settings of their own, what is refused, and AutoAttack's suite."""

import pytest

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import RobustnessSettings
from lightning_normgeo.robustness.attacks.native_attacks import AutoPGD, ProjectedGradient, SquareSearch


def attacks(*asked, **changes):
    return RobustnessSettings(attacks=list(asked), **changes).all_attacks


def one(asked, **changes):
    (found,) = attacks(asked, **changes)
    return found


def test_defaults_are_the_published_ones_or_the_threat_models():
    assert one("apgd") == AutoPGD(
        "apgd", norm="linf", eps=8 / 255, steps=100, bim_steps=10, bim_step_size=2 / 255, loss="cross_entropy"
    )
    assert one("square") == SquareSearch(
        "square", norm="linf", eps=8 / 255, loss="margin", queries=5000, share=0.8, restarts=1
    )
    assert one({"name": "bim"}) == one("bim")
    assert one({"name": "apgd", "targets": 9}).bim_steps == 0
    assert one("apgd_l2").eps == 0.5


def test_settings_of_an_attack_are_its_own():
    found = attacks(
        "bim",
        {"name": "strong", "attack": "pgd", "loss": "margin", "steps": 50, "restarts": 5, "eps": 4 / 255},
        {"name": "apgd-dlr", "attack": "apgd", "loss": "dlr", "steps": 30, "restarts": 2, "bim_steps": 0},
        {"name": "soft", "attack": "bim", "norm": "l2", "eps": 0.25, "step_size": 0.1},
        {"name": "quiet", "attack": "gaussian", "std": [0.1, 0.2]},
        restarts=3,
    )
    by_name = {attack.name: attack for attack in found}
    assert list(by_name) == ["quiet_std0.1", "quiet_std0.2", "bim", "strong", "apgd-dlr", "soft_l2"]
    strong, soft = by_name["strong"], by_name["soft_l2"]
    assert (strong.loss, strong.steps, strong.restarts, strong.eps) == ("margin", 50, 5, 4 / 255)
    assert strong.step_size == pytest.approx(1 / 255)  # keeps its ratio to the radius
    assert by_name["bim"].restarts == 1
    assert (soft.norm, soft.eps, soft.step_size, soft.times_sqrt_d) == ("l2", 0.25, 0.1, False)
    assert by_name["apgd-dlr"].settings() == {
        "norm": "linf",
        "eps": 8 / 255,
        "times_sqrt_d": False,
        "loss": "dlr",
        "restarts": 2,
        "steps": 30,
    }


def test_radii_of_its_own_make_a_row_each():
    found = attacks("bim", {"name": "apgd", "eps": [0.01, 0.02]}, eps=[0.1, 0.2])
    assert [attack.name for attack in found] == ["bim_eps0.1", "bim_eps0.2", "apgd_eps0.01", "apgd_eps0.02"]


def test_defaults_add_nothing_to_the_settings_of_older_records():
    assert set(one("bim").settings()) == {
        *("norm", "eps", "step_size", "times_sqrt_d", "steps", "random_start", "restarts", "loss")
    }
    assert one("bim").settings()["loss"] == "cross_entropy"


def test_attacks_of_torchattacks_take_their_options_in_place():
    found = one({"name": "sq", "attack": "torchattacks.Square", "n_queries": 7, "eps": 0.1})
    assert (found.name, found.attack, found.eps, found.options["n_queries"]) == ("sq", "Square", 0.1, 7)
    swept = attacks({"name": "torchattacks.PGD", "eps": [0.1, 0.2]})
    assert [attack.options["eps"] for attack in swept] == [0.1, 0.2]


def test_standard_is_the_suite_of_the_paper_part_by_part():
    found = attacks("standard", eps=4 / 255)
    assert [attack.name for attack in found] == [*("standard-apgd-ce", "standard-apgd-t", "standard-fab-t", "standard")]
    assert [attack.after for attack in found] == [None, *(attack.name for attack in found[:-1])]
    ce, targeted, fab, square = found
    assert (type(ce), ce.loss, ce.targets, ce.steps, ce.bim_steps, ce.restarts) == (
        AutoPGD,
        "cross_entropy",
        0,
        100,
        0,
        1,
    )
    assert (targeted.loss, targeted.targets, targeted.steps, targeted.restarts) == ("dlr", 9, 100, 1)
    assert (fab.attack, fab.options["steps"], fab.options["multi_targeted"]) == ("FAB", 100, True)
    assert (fab.options["n_restarts"], fab.options["norm"], fab.version) == (1, "Linf", fab.version)
    assert (type(square), square.loss, square.queries, square.share) == (SquareSearch, "margin", 5000, 0.8)
    assert {attack.eps for attack in found} == {4 / 255}


def test_standard_in_l2_and_at_several_radii():
    found = attacks({"name": "standard", "norm": "l2", "eps": [0.5, 1.0]})
    assert [attack.name for attack in found][3::4] == ["standard_l2_eps0.5", "standard_l2_eps1"]
    assert found[3].options["n_queries"] == 5000
    assert found[3].options["norm"] == "L2"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["bim", 3], r"3 must be the name of an attack, as 'bim', or a dictionary"),
        ([{"loss": "dlr"}], r"\{'loss': 'dlr'\} must be the name of an attack"),
        ([{"name": "apgd", "stepz": 3}], r"'apgd' has no setting 'stepz'; did you mean 'steps' or .* Known are 'eps'"),
        ([{"name": "apgd", "loss": "hinge"}], r"loss='hinge' is unknown; known are 'cross_entropy', 'margin', 'dlr'"),
        ([{"name": "apgd", "steps": 0}], r"steps=0 must be an integer, at least 1"),
        ([{"name": "bim", "restarts": 2}], r"'bim' has no setting 'restarts'"),
        ([{"name": "pgd", "eps": -0.1}], r"'pgd' has eps=-0.1, which must be a number, at least 0"),
        ([{"name": "pgd", "eps": [0.1, 0.1]}], r"a list of different ones"),
        ([{"name": "pgd", "eps": 8}], r"eps=8, larger than the pixel range.* 8/255 = 0.0314"),
        ([{"name": "pgd", "norm": "l1"}], r"norm='l1', which must be 'linf' or 'l2'"),
        ([{"name": "bim_l2", "norm": "linf"}], r"'l2' for 'bim_l2'; ask for 'bim'"),
        ([{"name": "square", "share": 2}], r"share=2, which must be a number in \(0, 1\]"),
        ([{"name": "worst", "attack": "pgd"}], r"the name 'worst' becomes part of keys"),
        ([{"name": "a/b", "attack": "pgd"}], r"the name 'a/b' becomes part of keys"),
        ([{"name": "x_eps0.1", "attack": "pgd"}], r"the name 'x_eps0.1'"),
        (["apgd", {"name": "apgd", "loss": "dlr"}], r"'apgd' is there more than once. Give attacks of one kind names"),
        ([{"name": "strong", "attack": "agpd"}], r"'agpd' is unknown; did you mean 'apgd'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(asked, message):
    with pytest.raises(ConfigurationError, match=message):
        RobustnessSettings(attacks=asked)


def test_standard_needs_pixels():
    with pytest.raises(ConfigurationError, match="'standard' is published for pixels"):
        RobustnessSettings("galloway2019", attacks="standard")


def test_a_single_dictionary_is_one_attack():
    (found,) = RobustnessSettings(attacks={"name": "bim", "steps": 3}).all_attacks
    assert isinstance(found, ProjectedGradient)
    assert found.steps == 3
