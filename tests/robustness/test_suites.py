"""Suites of attacks in the evaluator: samples passed on, results the same in any batches, never weaker than parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness import InputSpace, RobustnessEvaluator, RobustnessSettings
from lightning_normgeo.robustness.attacks import builders
from lightning_normgeo.robustness.model.assumptions import Assumptions
from lightning_normgeo.robustness.results.statistics.worst_case import worst_cases
from support.small_classifiers import conv_net, draw, pixels

PIXELS = InputSpace(None, None, normalized_data=False)
NET, COUNT = conv_net(3, torch.float64), 14
IMAGES = pixels(COUNT, 3, 8, 8, seed=2)
LABELS = NET(IMAGES).argmax(1)
LABELS[[2, 9]] = (LABELS[[2, 9]] + 1) % 5
PARTS = ["standard-apgd-ce", "standard-apgd-t", "standard-fab-t", "standard"]
PGD = {"name": "pgd", "steps": 4}


@pytest.fixture
def short(monkeypatch):
    """Make the suite's parts short and weak, so that each of them gets samples."""
    for name, few in (("_STEPS", 2), ("_QUERIES", 12), ("_TARGETS", 2)):
        monkeypatch.setattr(builders, name, few)


def evaluated(parts=(range(COUNT),), net=NET, images=IMAGES, labels=LABELS, assumptions=None, **changes):
    given = {"eps": 0.02, "steps": 5, "seed": 8} | changes
    run = RobustnessEvaluator(net, PIXELS, RobustnessSettings(**given), assumptions=assumptions)
    for part in parts:
        part = list(part)
        run.put(images[part], labels[part], part)
    decisions = run.finish()
    return decisions, run


def right(decisions, name):
    return decisions.of(name).correct


def test_a_part_gets_what_the_parts_before_it_did_not_break(short):
    decisions, _ = evaluated(attacks=["standard"], eps=0.012)
    assert decisions.attacks == ["clean", *PARTS]
    before = right(decisions, "clean")
    for name in PARTS:
        now = right(decisions, name)
        assert bool((before | ~now).all()), "broken stays broken"
        before = now
        assert decisions.of(name).index.tolist() == list(range(COUNT))
    held = [int(right(decisions, name).sum()) for name in PARTS]
    assert held[0] > held[-1] > 0
    ce, last = (decisions.of(name) for name in (PARTS[0], PARTS[-1]))
    carried = ~ce.correct
    for field in ("loss", "linf", "l2", "prediction"):
        assert torch.equal(getattr(ce, field)[carried], getattr(last, field)[carried])


@settings(deadline=None, derandomize=True, max_examples=5)
@given(order=st.permutations(range(COUNT)), cut=st.integers(1, COUNT - 1), batch_size=st.integers(1, COUNT))
def test_results_do_not_depend_on_order_and_batches(order, cut, batch_size):
    names = [PGD, {"name": "apgd", "steps": 4, "loss": "dlr"}, {"name": "square", "queries": 12}, "standard"]
    with pytest.MonkeyPatch.context() as patch:
        for name, few in (("_STEPS", 2), ("_QUERIES", 12), ("_TARGETS", 2)):
            patch.setattr(builders, name, few)
        once, _ = evaluated(attacks=names)
        mixed, _ = evaluated((order[:cut], order[cut:]), attacks=names, batch_size=batch_size)
    for name in once.attacks:
        assert torch.equal(once.of(name).prediction, mixed.of(name).prediction), name
        torch.testing.assert_close(once.of(name).loss, mixed.of(name).loss, rtol=1e-5, atol=1e-7)


def test_a_model_that_depends_on_the_batch_is_attacked_in_whole_batches(short):
    alone = Assumptions(deterministic=True, independent=False)
    names = ["standard", {"name": "apgd", "steps": 3}]
    whole, run = evaluated((range(8), range(8, COUNT)), attacks=names, assumptions=alone, eps=0.012)
    assert not run.attacks._stages
    streamed, _ = evaluated((range(8), range(8, COUNT)), attacks=names, eps=0.012)
    for name in whole.attacks:
        assert torch.equal(whole.of(name).prediction, streamed.of(name).prediction), name


def test_failing_parts_take_those_behind_them_along(short):
    few = NET(IMAGES)[:, :3].argmax(1)
    decisions, run = evaluated(
        net=lambda x: NET(x)[:, :3], labels=few, attacks=["standard", "bim"], on_unsuitable="skip"
    )
    assert list(run.failed) == PARTS[1:]
    assert "'dlr' with targets needs at least 4 classes" in run.failed[PARTS[1]]
    assert run.failed["standard"].startswith("standard-apgd-t, which comes before it, failed")
    assert len(decisions.of(PARTS[0]).index) == len(decisions.of("bim").index) == COUNT
    with pytest.raises(UnsuitableError, match="needs at least 4 classes"):
        evaluated(net=lambda x: NET(x)[:, :3], labels=few, attacks=["standard"])


def test_rows_of_a_suite_have_their_settings_and_origin():
    known = RobustnessSettings(attacks="standard").describe(PIXELS)["attacks"]
    assert list(known) == PARTS
    assert known["standard-fab-t"]["attack"] == "FAB"
    assert known["standard-fab-t"]["version"]
    assert known["standard"]["after"] == "standard-fab-t"
    assert known["standard-apgd-t"]["targets"] == 9
    assert "after" not in known["standard-apgd-ce"]


NETS = st.integers(0, 30).map(lambda seed: conv_net(seed, torch.float64))
EPS = st.sampled_from([0.004, 0.01, 0.03])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "dlr"])
@settings(deadline=None, derandomize=True, max_examples=10)
@given(net=NETS, eps=EPS)
def test_apgd_is_never_weaker_than_bim_with_its_loss(norm, loss, net, eps):
    labels = net(IMAGES).argmax(1)
    eps *= 1 if norm == "linf" else 10
    specs = [{"name": name, "loss": loss, "norm": norm, "eps": eps} for name in ("bim", "apgd")]
    specs[1]["steps"] = 3
    for semantics in ("final", "any"):
        found, _ = evaluated(net=net, labels=labels, attacks=specs, semantics=semantics)
        bim, apgd = (right(found, name if norm == "linf" else f"{name}_l2") for name in ("bim", "apgd"))
        assert bool((bim | ~apgd).all())


@settings(deadline=None, derandomize=True, max_examples=10)
@given(net=NETS, eps=EPS)
def test_the_worst_case_is_no_better_than_any_row_and_any_no_better_than_final(net, eps):
    labels, asked = net(IMAGES).argmax(1), ["bim", PGD, {"name": "apgd", "steps": 3}, {"name": "square", "queries": 9}]
    found = {}
    for semantics in ("final", "any"):
        results, run = evaluated(net=net, labels=labels, attacks=asked, eps=eps, semantics=semantics)
        worst_cases(results, run.settings.all_attacks)
        found[semantics] = results
        for name in ("bim", "pgd", "apgd", "square"):
            assert bool((right(results, name) | ~right(results, "worst")).all())
    for name in ("bim", "pgd", "worst"):
        assert bool((right(found["final"], name) | ~right(found["any"], name)).all())


@settings(deadline=None, derandomize=True, max_examples=10)
@given(net=NETS, eps=EPS, attack=st.sampled_from([PGD, {"name": "apgd", "steps": 3}, {"name": "square", "queries": 9}]))
def test_more_starts_never_help_the_model(net, eps, attack):
    labels, held = net(IMAGES).argmax(1), None
    for restarts in (1, 2, 4):
        asked = [{**attack, "restarts": restarts}]
        found, _ = evaluated(net=net, labels=labels, attacks=asked, eps=eps, semantics="any")
        now = right(found, attack["name"])
        assert held is None or bool((held | ~now).all())
        held = now


@settings(deadline=None, derandomize=True, max_examples=10)
@given(net=NETS, eps=EPS)
def test_more_steps_of_one_length_never_help_the_model(net, eps):
    labels, held = net(IMAGES).argmax(1), {}
    for steps in (1, 3, 6):
        asked = [{"name": name, "steps": steps, "step_size": eps / 4} for name in ("bim", "pgd")]
        found, _ = evaluated(net=net, labels=labels, attacks=asked, eps=eps, semantics="any")
        for name in ("bim", "pgd"):
            now = right(found, name)
            assert name not in held or bool((held[name] | ~now).all())
            held[name] = now


def test_targeted_losses_aim_at_one_class_after_another():
    """A linear model, of which the margin to each class is known."""
    weights = draw(5, 12, seed=1)
    x = 0.5 + 0.05 * draw(30, 3, 2, 2, seed=2)

    def net(images):
        return images.flatten(1) @ weights.T

    y, scores = net(x).argmax(1), net(x)
    eps = 0.06
    reach = torch.stack([(weights[j] - weights[y]).abs().sum(1) * eps for j in range(5)], 1)
    margins = scores.gather(1, y[:, None]) - scores
    breakable = (margins < reach) & (torch.arange(5) != y[:, None])
    order = (scores.scatter(1, y[:, None], -torch.inf)).argsort(1, descending=True)
    for targets in (1, 2, 4):
        asked = [{"name": "t", "attack": "pgd", "loss": "margin", "targets": targets, "eps": eps, "steps": 20}]
        run = RobustnessEvaluator(net, PIXELS, RobustnessSettings(attacks=asked, semantics="any"))
        run.put(x, y, range(30))
        robust = right(run.finish(), "t")
        expected = ~breakable.gather(1, order[:, :targets]).any(1)
        assert bool((robust == expected).float().mean() > 0.9)
        assert bool((robust | ~expected).all()), "what no attack can break"
