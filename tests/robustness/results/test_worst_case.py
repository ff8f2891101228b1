"""The worst case over attacks: against counting by hand, for random decisions, and what it is made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo.robustness import RobustnessSettings
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows
from lightning_normgeo.robustness.results.statistics.worst_case import worst_cases


def rows(correct, losses=None, which=None):
    """Return the results of samples of class 0, of which only some may have been evaluated."""
    n = len(correct)
    which = list(range(n)) if which is None else which
    label = torch.zeros(n, dtype=torch.long)
    losses = torch.zeros(n) if losses is None else torch.tensor(losses)
    index = torch.arange(n)
    found = SampleRows(index, label, (~torch.tensor(correct)).long(), losses, *losses.new_zeros(3, n), 100 - index)
    return found.at(torch.tensor(which))


def decided(**attacks):
    results = SampleResults(list(attacks))
    for name, found in attacks.items():
        results.add(name, found if isinstance(found, SampleRows) else rows(found))
    return results


def attacks_of(*names, **changes):
    return RobustnessSettings(attacks=list(names), **changes).all_attacks


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    table=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=20),
    order=st.permutations(range(3)),
)
def test_counts_are_those_of_samples_taken_one_by_one(table, order):
    names = ["bim", "pgd", "apgd"]
    clean, *others = ([row[k] or (k == 0 and any(row[1:])) for row in table] for k in range(4))
    results = decided(clean=clean, **dict(zip(names, others, strict=True)))
    listed = [names[k] for k in order]
    (case,) = worst_cases(results, attacks_of(*listed))
    worst = results.of("worst")
    assert worst.correct.tolist() == [all(column[i] for column in others) for i in range(len(table))]
    by_name = dict(zip(names, others, strict=True))
    assert case.broken == {name: sum(not c for c in by_name[name]) for name in listed}
    left = list(clean)
    for name in listed:
        gained = sum(before and not now for before, now in zip(left, by_name[name], strict=True))
        assert case.gained[name] == gained
        left = [before and now for before, now in zip(left, by_name[name], strict=True)]
        others_hold = [all(by_name[one][i] for one in names if one != name) for i in range(len(table))]
        assert case.alone[name] == sum(not c and held for c, held in zip(by_name[name], others_hold, strict=True))
    assert sum(clean) - sum(case.gained.values()) == sum(left)
    for name in names:
        assert int(worst.correct.sum()) <= int(results.of(name).correct.sum())


def test_a_row_tells_of_the_attack_that_broke_the_sample_or_of_the_highest_loss():
    results = decided(
        clean=[True] * 3,
        bim=rows([True, False, True], [3.0, 1.0, 2.0]),
        pgd=rows([True, False, True], [1.0, 9.0, 5.0]),
    )
    worst_cases(results, attacks_of("bim", "pgd"))
    assert results.of("worst").loss.tolist() == [3.0, 1.0, 5.0]


def test_norms_are_kept_apart_and_smaller_radii_are_within():
    eps = [0.1, 0.2]
    attacks = attacks_of("gaussian", "bim", "pgd", "bim_l2", "pgd_l2", "torchattacks.DeepFool", eps=eps)
    results = decided(**{name: [True, False] for name in ["clean", *(a.name for a in attacks)]})
    found = {case.name: case.attacks for case in worst_cases(results, attacks)}
    assert found == {
        "worst_eps0.1": ("bim_eps0.1", "pgd_eps0.1"),
        "worst_eps0.2": ("bim_eps0.1", "pgd_eps0.1", "bim_eps0.2", "pgd_eps0.2"),
        "worst_l2": ("bim_l2", "pgd_l2"),
    }


def test_the_worst_case_never_rises_with_the_radius():
    attacks = attacks_of("bim", "pgd", eps=[0.2, 0.1])
    table = {"bim_eps0.1": [False, True], "pgd_eps0.1": [True, True], "bim_eps0.2": [True, True]}
    results = decided(clean=[True, True], **table, **{"pgd_eps0.2": [True, False]})
    worst_cases(results, attacks)
    assert results.of("worst_eps0.1").correct.tolist() == [False, True]
    assert results.of("worst_eps0.2").correct.tolist() == [False, False]


@pytest.mark.parametrize("names", [("bim",), ("gaussian", "bim"), (), ("bim", "bim_l2")])
def test_one_attack_has_no_worst_case(names):
    attacks = attacks_of(*names)
    results = decided(**{name: [True] for name in ["clean", *(a.name for a in attacks)]})
    assert worst_cases(results, attacks) == []
    assert not any(name.startswith("worst") for name in results.attacks)


def test_only_samples_that_all_attacks_have_count():
    results = decided(
        clean=[True] * 4,
        bim=rows([True, False, True, True], which=[3, 0, 1]),
        pgd=rows([False, True, True, True], which=[0, 1, 2, 3]),
    )
    (case,) = worst_cases(results, attacks_of("bim", "pgd"))
    worst = results.of("worst")
    assert dict(zip(worst.sample.tolist(), worst.correct.tolist(), strict=True)) == {100: False, 99: False, 97: True}
    assert case.broken == {"bim": 1, "pgd": 1}


def test_controls_have_a_worst_case_of_their_own():
    names = ["clean", "bim", "pgd"]
    rescaled = {f"{name}_rescaled": [True, name == "bim"] for name in names}
    results = decided(**{name: [True, True] for name in names}, **rescaled)
    (case,) = worst_cases(results, attacks_of("bim", "pgd"))
    assert case.name == "worst"
    assert results.of("worst").correct.tolist() == [True, True]
    assert results.of("worst_rescaled").correct.tolist() == [True, False]
