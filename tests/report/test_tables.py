"""The tables of a report: each number equals the records' or is recomputed from the per-sample results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, t

from lightning_normgeo import RecordLogger, read_record
from lightning_normgeo.report.compared_runs import Run, load_runs
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.tables.accuracies import paired_tests
from lightning_normgeo.report.tables.table import Table
from lightning_normgeo.utilities.attack_names import attack_title
from support import reference as ref
from support.evaluated_runs import MEASURED, SHARES, N, correct, write_run


def tables_of(runs: list[Run]) -> dict[str, Table]:
    return {table.anchor: table for table in all_tables(runs)}


def written(*folders: Path) -> tuple[list[Run], dict[str, Table]]:
    runs = load_runs(list(folders))
    return runs, tables_of(runs)


def texts(table: Table) -> list[list[str]]:
    assert all(len(row) == len(table.columns) for row in table.rows)
    return [[cell.text for cell in row] for row in table.rows]


def column(table: Table, name: str) -> list[Any]:
    return [row[table.columns.index(name)] for row in table.rows]


def student(values: Any) -> tuple[float, float]:
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def bracket(low: float, high: float, sign: str = "", least: float = -1) -> str:
    return f"[{100 * max(low, least):{sign}.2f}, {100 * min(high, 1):{sign}.2f}]"


# --- which tables there are -------------------------------------------------------------------------------------------


def test_tables_come_in_the_order_of_the_story():
    metrics = {"norm_growth/weight_norm": [(1, 1.0)]}
    _, tables = written(write_run("a", metrics=metrics), write_run("b", decay=5e-4))
    decay = "paired-optimizer-init-args-weight-decay"
    assert list(tables) == ["robustness", "robustness-drops", "by-class", decay, "geometry", "settings", "environment"]
    assert all(table.rows and table.caption and table.title for table in tables.values())


def test_one_run_has_nothing_to_compare():
    _, tables = written(write_run("a"))
    assert list(tables) == ["robustness", "robustness-drops", "by-class", "environment"]
    assert texts(tables["robustness"])[0][:2] == ["a", "1"]


def test_a_record_with_nothing_in_it_has_an_environment():
    _, tables = written(write_run("a", shares={}))
    assert list(tables) == ["environment"]


def test_an_empty_record_has_no_table():
    Path("empty").mkdir()
    Path("empty/record.jsonl").touch()
    assert all_tables(load_runs(["empty"])) == []
    assert all_tables([]) == []


# --- accuracies -------------------------------------------------------------------------------------------------------


def test_accuracies_of_single_runs_with_wilsons_interval():
    runs, tables = written(write_run("a"), write_run("b", norm="gn"), write_run("c", norm="gn", decay=5e-4))
    table = tables["robustness"]
    assert table.columns == ["network", "runs", "clean", "gaussian, σ = 0.05", "bim, ε = 8/255"]
    for run, row in zip(runs, table.rows, strict=True):
        assert [cell.text for cell in row[:2]] == [run.group, "1"]
        for attack, cell in zip(SHARES, row[2:], strict=True):
            k = int(correct(run, attack).sum())
            assert cell.text == f"{100 * k / N:.2f} % {bracket(*ref.wilson(k, N))} {k}/{N}"
            assert cell.value == k / N
    assert "Wilson's 95 % interval of this one network's accuracy" in table.caption
    assert "Student" not in table.caption
    assert "are no targets" in table.caption


def test_accuracies_of_several_seeds_are_averaged_with_students_interval():
    folders = [write_run(f"{norm}{seed}", norm=norm, seed=seed) for norm in ("bn", "gn") for seed in range(3)]
    runs, tables = written(*folders)
    rows = tables["robustness"].rows
    assert [row[0].text for row in rows] == ["bn", "gn"]
    for row in rows:
        members = [run for run in runs if run.group == row[0].text]
        assert (row[1].text, row[1].value) == ("3", 3)
        for attack, cell in zip(SHARES, row[2:], strict=True):
            shares = [correct(run, attack).mean() for run in members]
            total = sum(correct(run, attack).sum() for run in members)
            interval = bracket(*student(shares), least=0)
            assert cell.text == f"{100 * np.mean(shares):.2f} % {interval} {total}/{3 * N}"
            assert cell.value == pytest.approx(np.mean(shares))
    assert "means over runs, in brackets Student's 95 % interval over runs" in tables["robustness"].caption
    assert "Wilson" not in tables["robustness"].caption


def test_interval_over_runs_ends_where_accuracies_do():
    shares = {"bn": (1.0, 0.8), "gn": (0.0, 0.2)}
    folders = [
        write_run(f"{norm}{seed}", norm=norm, seed=seed, shares={"clean": shares[norm][seed]})
        for norm in shares
        for seed in (0, 1)
    ]
    runs, tables = written(*folders)
    assert "robustness-drops" not in tables
    for row, members in zip(tables["robustness"].rows, (runs[:2], runs[2:]), strict=True):
        low, high = student([correct(run, "clean").mean() for run in members])
        assert low < 0 or high > 1
        assert bracket(low, high, least=0) in row[2].text
        assert ("[0.00," in row[2].text) or ("100.00]" in row[2].text)


def test_an_evaluation_without_samples_has_no_accuracy():
    _, tables = written(write_run("a"), write_run("b", norm="gn", n=0))
    assert texts(tables["robustness"])[1] == ["gn", "1", "–", "–", "–"]
    assert texts(tables["robustness-drops"])[1] == ["gn", "1", "–", "–"]
    assert tables["paired-model-norm"].rows == []


def test_some_groups_with_one_run_and_some_with_several_are_told_apart():
    _, tables = written(write_run("a"), write_run("b", seed=1), write_run("c", norm="gn"))
    assert [row[1] for row in texts(tables["robustness"])] == ["2", "1"]
    for anchor in ("robustness", "robustness-drops"):
        assert "of one run" in tables[anchor].caption
        assert "Student's over runs" in tables[anchor].caption


def test_an_attack_that_some_runs_lack_says_of_how_many_it_is():
    few = {name: share for name, share in SHARES.items() if name != "bim"}
    runs, tables = written(write_run("a"), write_run("b", seed=1, shares=few), write_run("c", norm="gn", shares=few))
    cell, nothing = column(tables["robustness"], "bim, ε = 8/255")
    k = int(correct(runs[0], "bim").sum())
    assert cell.text == f"{100 * k / N:.2f} % {bracket(*ref.wilson(k, N))} {k}/{N} (1 of 2 runs)"
    assert (nothing.text, nothing.value) == ("–", "")
    assert column(tables["robustness-drops"], "bim, ε = 8/255")[0].text.endswith("(1 of 2 runs)")
    assert "of one run" in tables["robustness"].caption


def test_many_attacks_are_below_each_other():
    shares = {"clean": 0.9} | {f"bim_eps{eps}": 0.9 - eps for eps in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}
    strengths = {name: {"eps": float(name[7:])} for name in shares if name != "clean"}
    runs, tables = written(*(write_run(x, norm=x, shares=shares, evaluation=strengths) for x in ("bn", "gn")))
    table, drops = tables["robustness"], tables["robustness-drops"]
    assert (table.columns[-1], drops.columns[-1]) == ("accuracy", "drop")
    assert [row[:3] for row in texts(table)] == [
        [attack_title(attack), norm, "1"] for attack in shares for norm in ("bn", "gn")
    ]
    for k, (attack, _) in enumerate((attack, run) for attack in shares for run in runs):
        assert table.rows[k][3].value == correct(runs[k % 2], attack).mean()
    assert len(drops.rows) == 12


def test_each_data_set_has_its_tables():
    cifar = [
        {"data": {"class_path": "lightning_normgeo.CIFARDataModule", "init_args": {"name": name, "data_dir": "data"}}}
        for name in ("cifar10", "cifar100")
    ]
    own = {"data": {"class_path": "mine.Flowers", "init_args": {"data_dir": "flowers/small"}}}
    folders = [write_run(f"a{k}", norm=("bn", "gn")[k % 2], settings=(*cifar, own)[k // 2]) for k in range(6)]
    runs, tables = written(*folders)
    titles = {anchor: table.title for anchor, table in tables.items() if anchor.startswith("robustness")}
    assert titles == {
        "robustness-cifar-10": "Accuracy under attack: CIFAR-10",
        "robustness-drops-cifar-10": "Accuracy lost to each attack: CIFAR-10",
        "robustness-cifar-100": "Accuracy under attack: CIFAR-100",
        "robustness-drops-cifar-100": "Accuracy lost to each attack: CIFAR-100",
        "robustness-flowers-flowers-small": "Accuracy under attack: Flowers (flowers/small)",
        "robustness-drops-flowers-flowers-small": "Accuracy lost to each attack: Flowers (flowers/small)",
    }
    assert [row[0] for row in texts(tables["robustness-cifar-100"])] == [run.group for run in runs[2:4]]
    (pairs,) = [table for anchor, table in tables.items() if anchor.startswith("paired")]
    assert len(pairs.rows) == 9, "data sets are never compared with each other"


def test_data_is_named_as_far_as_settings_tell():
    assert written(write_run("a"))[1]["robustness"].title == "Accuracy under attack"
    digits = {"data": {"class_path": "lightning_normgeo.DigitsDataModule", "init_args": {"batch_size": 16}}}
    assert written(write_run("b", settings=digits))[1]["robustness"].title == "Accuracy under attack: Digits"
    alone = {"data": {"name": "cifar100", "data_dir": "data"}}
    assert written(write_run("c", settings=alone))[1]["robustness"].title == "Accuracy under attack: CIFAR-100"


def test_runs_that_were_not_evaluated_are_named():
    other = write_run("d", norm="in", shares={}, settings={"data": {"name": "cifar10"}})
    _, tables = written(write_run("a"), write_run("b", norm="gn"), write_run("c", norm="ln", shares={}), other)
    assert re.findall("Not evaluated: ([^.]*).", tables["robustness"].caption) == ["ln, data –"]
    assert len(tables["robustness"].rows) == 2


def test_different_numbers_of_samples_are_said():
    _, tables = written(write_run("a"), write_run("b", norm="gn", n=30))
    assert "Runs were evaluated on 30 to 50 samples." in tables["robustness"].caption


def test_different_attacks_of_one_name_are_not_to_be_compared():
    _, tables = written(write_run("a"), write_run("b", norm="gn", evaluation={"bim": {"eps": 0.1}}))
    table, pairs = tables["robustness"], tables["paired-model-norm"]
    assert "Not the same attack for all runs, so not to be compared: bim (bim.eps)." in table.caption
    assert table.columns[-1] == "bim"
    assert [cell.text for cell in column(pairs, "attack")] == ["clean", "gaussian"]
    assert "Not paired: gn with bn (evaluated under different conditions (bim.eps))." in pairs.caption


EXACT: dict[str, Any] = {"precision": "fp32", "attacks": {"bim": {}}}
VERIFIED = EXACT | {"precision": "bf16-verified", "verification": {"precision": "fp32", "attacks": ["bim"]}}
PIXEL, NORMALIZED = ({"space": space, "lower": 0.0, "upper": 1.0} for space in ("pixel", "normalized"))


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ({"threat": PIXEL}, {"threat": NORMALIZED}, {"bim": "space"}),
        ({"threat": PIXEL}, {"threat": PIXEL | {"upper": 2.0}}, {"bim": "upper"}),
        ({"semantics": "any"}, {"semantics": "final"}, {"bim": "semantics"}),
        (
            {"threat": NORMALIZED, "normalization": {"std": [0.5]}},
            {"threat": NORMALIZED, "normalization": {"std": [0.25]}},
            {"bim": "normalization.std"},
        ),
        (
            {"threat": PIXEL, "normalization": {"std": [0.5]}, "seed": 0, "epoch": 7},
            {"threat": PIXEL, "normalization": {"std": [0.25]}, "seed": 1, "epoch": 9},
            {},
        ),
        ({"precision": "fp32"}, {"precision": "bf16"}, {"clean": "precision", "bim": "precision"}),
        (EXACT, VERIFIED, {"bim": "precision"}),
        (VERIFIED, VERIFIED, {}),
        (
            {"threat": {"eps": 0.1}, "attacks": {}},
            {"threat": {"eps": 0.2}, "attacks": {}},
            {"bim": "bim.eps"},
        ),
    ],
)
def test_only_attacks_under_the_same_conditions_are_compared(first: Any, second: Any, refused: dict[str, str]):
    shares = {"clean": 0.8, "bim": 0.3, "clean_rescaled": 0.8, "bim_rescaled": 0.3}
    folders = [
        write_run("a", shares=shares, conditions=first),
        write_run("b", norm="gn", shares=shares, conditions=second),
    ]
    _, tables = written(*folders)
    pairs = tables["paired-model-norm"]
    assert [cell.text for cell in column(pairs, "attack")] == [name for name in ("clean", "bim") if name not in refused]
    for attack, why in refused.items():
        assert f"evaluated under different conditions ({why})" in pairs.caption
        assert f"{attack} ({why})" in tables["robustness"].caption
    assert ("Not the same attack" in tables["robustness"].caption) == bool(refused)


@pytest.mark.parametrize(
    ("condition", "values"),
    [
        ("seed", ({"seed": 0}, {"seed": 1})),
        ("generator", ({"seed": 0}, {"seed": 0, "generator": "philox4x32-10"})),  # the first is of an earlier version
    ],
)
def test_other_random_numbers_are_other_noise_and_other_starts(condition: str, values: Any):
    shares = dict.fromkeys(("clean", "gaussian", "bim", "square", "apgd", "standard", "strong", "search"), 0.5)
    strengths = {"strong": {"random_start": True}, "search": {"points": 100}, "bim": {"random_start": False}}
    strengths |= {"square": {"queries": 9}, "standard": {"queries": 9, "after": "standard-fab-t"}}
    folders = [
        write_run(norm, norm=norm, shares=shares, evaluation=strengths, conditions=known)
        for norm, known in zip(("bn", "gn"), values, strict=True)
    ]
    _, tables = written(*folders)
    same = ["clean", "bim"] if condition == "seed" else ["clean", "bim", "square"]  # square has always used Philox
    assert [cell.text for cell in column(tables["paired-model-norm"], "attack")] == same
    assert f"evaluated under different conditions ({condition})" in tables["paired-model-norm"].caption
    for attack in set(shares) - set(same):
        assert f"{attack} ({condition})" in tables["robustness"].caption


def test_runs_of_one_seed_are_no_other_seeds():
    _, tables = written(*(write_run(name, norm=name[:2]) for name in ("bn0", "bn1", "gn0")))
    assert "Runs with the same seed say nothing about other seeds: bn." in tables["robustness"].caption
    _, tables = written(*(write_run(f"other{seed}", seed=seed) for seed in (0, 1)))
    assert "same seed" not in tables["robustness"].caption


def test_runs_that_agree_claim_no_certainty():
    _, tables = written(*(write_run(f"a{seed}", seed=seed, shares={"clean": 0.5, "bim": 0.0}) for seed in (0, 1, 2)))
    assert tables["robustness"].rows[0][-1].text == f"0.00 % [–] 0/{3 * N}"


def test_a_p_value_beyond_floats_is_not_zero():
    n = 3000
    shares = ({"clean": 1.0}, {"clean": 0.0})
    _, tables = written(*(write_run(f"{k}", norm="bg"[k] + "n", n=n, shares=shares[k]) for k in (0, 1)))
    assert [cell.text for cell in tables["paired-model-norm"].rows[0][-2:]] == ["<1e-300", "<1e-300"]


def test_strength_that_is_in_the_name_is_not_said_twice():
    shares = {"clean": 0.9, "bim_eps0.1": 0.5}
    _, tables = written(write_run("a", shares=shares, evaluation={"bim_eps0.1": {"eps": 0.1}}))
    assert tables["robustness"].columns[-1] == "bim, ε = 0.1"


def test_metrics_alone_have_no_count():
    logger = RecordLogger("out", version="a")
    rows = [{"attack": "clean", "accuracy": 9 / 13, "n": 13.0, "accuracy_drop": 0.0}]
    logger.log_results("robustness", {"results": rows})
    logger.finalize("success")
    _, tables = written(logger.folder)
    assert tables["robustness"].rows[0][2].text == f"69.23 % {bracket(*ref.wilson(9, 13))} 9/13"


def test_several_loaders_are_evaluations_of_their_own():
    folder = write_run("a", loader="/dataloader_1")
    (run,), tables = written(folder)
    with np.load(folder / "robustness_dataloader_1.npz") as file:
        clean, bim = (file[f"{attack}/correct"].astype(int) for attack in ("clean", "bim"))
    assert tables["robustness"].columns[2] == "clean/dataloader_1"
    assert tables["robustness-drops"].columns[2] == "gaussian/dataloader_1, σ = 0.05"
    interval = ref.paired(int((bim > clean).sum()), int((clean > bim).sum()), N)
    assert tables["robustness-drops"].rows[0][3].text == f"{100 * (clean - bim).mean():.2f} pt {bracket(*interval)}"
    assert run.group == "a"


# --- drops ------------------------------------------------------------------------------------------------------------


def test_drops_of_single_runs_have_paired_intervals():
    runs, tables = written(write_run("a"), write_run("b", norm="gn"))
    table = tables["robustness-drops"]
    assert table.columns == ["network", "runs", "gaussian, σ = 0.05", "bim, ε = 8/255"]
    for run, row in zip(runs, table.rows, strict=True):
        clean = correct(run, "clean")
        for attack, cell in zip(("gaussian", "bim"), row[2:], strict=True):
            attacked = correct(run, attack)
            low, high = ref.paired(int((attacked > clean).sum()), int((clean > attacked).sum()), N)
            assert cell.text == f"{100 * (clean - attacked).mean():.2f} pt {bracket(low, high)}"
            assert cell.value == pytest.approx((clean - attacked).mean())
    assert "Acc-Diff" in table.caption
    assert "Bonett, Price 2012" in table.caption


def test_drops_of_several_seeds_are_averaged():
    runs, tables = written(*(write_run(f"a{seed}", seed=seed) for seed in range(4)))
    for attack, cell in zip(("gaussian", "bim"), tables["robustness-drops"].rows[0][2:], strict=True):
        drops = [(correct(run, "clean") - correct(run, attack)).mean() for run in runs]
        assert cell.text == f"{100 * np.mean(drops):.2f} pt {bracket(*student(drops))}"
    assert "Student's 95 % interval over runs" in tables["robustness-drops"].caption
    assert "Bonett" not in tables["robustness-drops"].caption


def remove(folder: Path) -> None:
    (folder / "robustness.npz").unlink()


def tear(folder: Path) -> None:
    path = folder / "robustness.npz"
    path.write_bytes(path.read_bytes()[:-200])


def exchange(folder: Path) -> None:
    other = write_run("other", shares=dict.fromkeys(SHARES, 0.5))
    (other / "robustness.npz").replace(folder / "robustness.npz")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove, "there is no robustness.npz"),
        (tear, "robustness.npz cannot be read"),
        (exchange, "robustness.npz is not of the evaluation that was recorded"),
    ],
)
def test_without_usable_decisions_drops_have_no_interval_and_runs_no_pairs(spoil: Any, reason: str):
    folders = [write_run("a"), write_run("b", norm="gn"), write_run("c", norm="ln")]
    before = tables_of(load_runs(folders))
    spoil(folders[1])
    after = tables_of(load_runs(folders))
    assert texts(after["robustness"]) == texts(before["robustness"])
    drops, expected = (texts(tables["robustness-drops"]) for tables in (after, before))
    assert drops[0] == expected[0]
    assert drops[2] == expected[2]
    assert [cell.partition(" [")[::2] for cell in drops[1][2:]] == [
        (c.partition(" [")[0], "–]") for c in expected[1][2:]
    ]
    assert f"Without samples no paired interval: {reason} (gn)." in after["robustness-drops"].caption
    pairs = {key: tables["paired-model-norm"] for key, tables in (("before", before), ("after", after))}
    assert f"Not paired: gn with bn ({reason} for gn)." in pairs["after"].caption
    assert [row[1:-1] for row in texts(pairs["before"])[3:]] == [row[:-1] for row in texts(pairs["after"])]


# --- paired differences -----------------------------------------------------------------------------------------------


def check_pairs(table: Table, pairs: list[tuple[Run, Run]], attacks: list[str]) -> None:
    """Compare the last columns of a table without rows over seeds with counts by numpy."""
    cases = [(first, second, attack) for first, second in pairs for attack in attacks]
    p_values = []
    for row, (first, second, attack) in zip(table.rows, cases, strict=True):
        before, after = correct(first, attack), correct(second, attack)
        lost, won = int((before > after).sum()), int((after > before).sum())
        p_values.append(binomtest(won, won + lost).pvalue if won + lost else 1.0)
        found = [cell.text for cell in row][table.columns.index("attack") :]
        assert found[:-1] == [
            attack,
            f"{100 * before.mean():.2f} → {100 * after.mean():.2f} %",
            f"{100 * (after - before).mean():+z.2f} pt {bracket(*ref.paired(lost, won, len(before)), sign='+')}",
            str(won),
            str(lost),
            str(len(before)),
            f"{p_values[-1]:.2g}",
        ]
        assert row[table.columns.index("difference")].value == pytest.approx((after - before).mean())
    adjusted = [cell.value for cell in column(table, "p (Holm)")]
    assert adjusted == pytest.approx(ref.holm(p_values), rel=1e-9)
    assert [cell.text for cell in column(table, "p (Holm)")] == [f"{p:.2g}" for p in ref.holm(p_values)]


def test_pairs_are_of_runs_that_are_equal_in_all_else():
    folders = {
        (norm, decay): write_run(f"{norm}{decay}", norm=norm, decay=decay)
        for norm in ("bn", "gn")
        for decay in (5e-4, 0.0)
    }
    loaded, tables = written(*folders.values())
    runs = dict(zip(folders, loaded, strict=True))
    decay, norm = (table for anchor, table in tables.items() if anchor.startswith("paired"))
    assert decay.title == "Paired differences: weight decay 0.0005 against no weight decay"
    assert norm.title == "Paired differences: gn against bn"
    assert [cell.text for cell in column(decay, "among")] == 3 * ["bn"] + 3 * ["gn"]
    check_pairs(decay, [(runs[x, 0.0], runs[x, 5e-4]) for x in ("bn", "gn")], list(SHARES))
    check_pairs(norm, [(runs["bn", x], runs["gn", x]) for x in (5e-4, 0.0)], list(SHARES))
    assert "not about two ways to train" in norm.caption
    assert "adjusted for all tests of this table" in norm.caption


def test_each_value_is_compared_with_the_first_or_smallest():
    folders = [write_run(f"{x}", settings={"optimizer": {"init_args": {"lr": x}}}) for x in (0.1, 0.02, 10.0)]
    (high, low, highest), tables = written(*folders)
    table = tables["paired-optimizer-init-args-lr"]
    assert table.title == "Paired differences: by lr"
    assert [cell.text for cell in column(table, "compared")] == 3 * ["lr 0.1 against lr 0.02"] + 3 * [
        "lr 10 against lr 0.02"
    ]
    check_pairs(table, [(low, high), (low, highest)], list(SHARES))
    _, tables = written(*(write_run(x, norm=x) for x in ("ln", "bn", "gn")))
    names = [cell.text for cell in column(tables["paired-model-norm"], "compared")]
    assert list(dict.fromkeys(names)) == ["bn against ln", "gn against ln"]
    assert tables["paired-model-norm"].title == "Paired differences: by normalization"


def test_several_seeds_are_paired_seed_by_seed_and_averaged():
    folders = [write_run(f"{norm}{seed}", norm=norm, seed=seed) for norm in ("bn", "gn") for seed in (3, 4, 5)]
    runs, tables = written(*folders)
    table = tables["paired-model-norm"]
    assert table.columns[:2] == ["seed", "attack"]
    rows = texts(table)
    assert [row[:2] for row in rows] == [
        [seed, attack] for attack in SHARES for seed in ("seed 3", "seed 4", "seed 5", "mean of 3")
    ]
    kept = [k for k, row in enumerate(rows) if row[0] != "mean of 3"]
    single = Table("", "", "", table.columns, [table.rows[k] for k in kept])
    by_attack = [(runs[k], runs[3 + k], attack) for attack in SHARES for k in range(3)]
    p_values = []
    for row, (first, second, attack) in zip(single.rows, by_attack, strict=True):
        change = correct(second, attack) - correct(first, attack)
        assert row[3].value == pytest.approx(change.mean())
        p_values.append(binomtest(int((change > 0).sum()), int((change != 0).sum())).pvalue)
    assert [cell.value for cell in column(single, "p")] == pytest.approx(p_values)
    steps = np.maximum.accumulate(np.sort(p_values) * np.arange(9, 0, -1))
    expected = np.empty(9)
    expected[np.argsort(p_values, kind="stable")] = np.minimum(steps, 1)
    assert [cell.value for cell in column(single, "p (Holm)")] == pytest.approx(expected.tolist())
    for k, attack in enumerate(SHARES):
        before, after = (np.stack([correct(run, attack) for run in runs[part]]) for part in (slice(3), slice(3, 6)))
        changes = (after - before).mean(1)
        assert rows[4 * k + 3][2:] == [
            f"{100 * before.mean():.2f} → {100 * after.mean():.2f} %",
            f"{100 * changes.mean():+z.2f} pt {bracket(*student(changes), sign='+')}",
            str((after > before).sum()),
            str((after < before).sum()),
            str(3 * N),
            "–",
            "–",
        ]
    assert "Student's 95 % interval over pairs" in table.caption


def test_different_seeds_are_no_pairs():
    _, tables = written(write_run("a", seed=0), write_run("b", seed=1, norm="gn"), write_run("c", seed=2, norm="gn"))
    assert not any(anchor.startswith("paired") for anchor in tables)


def test_runs_that_differ_in_the_seed_alone_are_not_compared():
    _, tables = written(write_run("a", seed=0), write_run("b", seed=1))
    assert not any(anchor.startswith("paired") for anchor in tables)
    assert "paired differences" not in tables["robustness"].caption


def test_runs_without_seeds_are_paired_in_their_order():
    folders = [write_run(f"{norm}{k}", norm=norm, seed=None) for norm in ("bn", "gn") for k in (0, 1)]
    runs, tables = written(*folders)
    table = tables["paired-model-norm"]
    clean = [row for row in table.rows if row[1].text == "clean"]
    assert [row[0].text for row in clean] == ["bn0, gn0", "bn1, gn1", "mean of 2"]
    for k in (0, 1):
        change = correct(runs[2 + k], "clean") - correct(runs[k], "clean")
        assert clean[k][3].value == pytest.approx(change.mean())


def test_runs_that_differ_in_several_settings_are_compared_as_a_whole():
    runs, tables = written(write_run("a"), write_run("b", norm="gn", decay=5e-4), write_run("c", norm="ln", decay=1e-3))
    table = tables["paired"]
    assert table.title == "Paired differences: several settings at once"
    assert list(dict.fromkeys(cell.text for cell in column(table, "compared"))) == [
        f"{run.group} against bn, no weight decay" for run in runs[1:]
    ]
    check_pairs(table, [(runs[0], runs[1]), (runs[0], runs[2])], list(SHARES))
    both = "optimizer.init_args.weight_decay; model.norm"
    assert f"The runs differ in {both} at once: a difference cannot be put down to one of them." in table.caption


def test_other_labels_or_other_samples_are_no_pairs():
    folders = [write_run("bn"), write_run("gn", norm="gn", classes=7), write_run("ln", norm="ln", first=N)]
    _, tables = written(*folders)
    table = tables["paired-model-norm"]
    assert table.rows == []
    assert table.columns[:2] == ["attack", "accuracy"]
    different = "The two evaluations have different labels: they are not of the same data"
    assert f"Not paired: gn with bn ({different})." in table.caption
    assert "Not paired: ln with bn (evaluated on different samples)." in table.caption


def test_samples_that_only_one_run_has_are_left_out_of_pairs():
    (first, second), tables = written(write_run("bn"), write_run("gn", norm="gn", first=30))
    table = tables["paired-model-norm"]
    for row, attack in zip(table.rows, SHARES, strict=True):
        before, after = correct(first, attack)[30:], correct(second, attack)[:20]
        assert row[table.columns.index("n")].value == 20
        assert row[table.columns.index("accuracy")].text == f"{100 * before.mean():.2f} → {100 * after.mean():.2f} %"
        assert row[table.columns.index("difference")].value == pytest.approx((after - before).mean())


def test_an_attack_that_one_run_lacks_is_not_paired():
    _, tables = written(write_run("bn"), write_run("gn", norm="gn", shares={"clean": 0.8, "bim": 0.2}))
    assert [cell.text for cell in column(tables["paired-model-norm"], "attack")] == ["clean", "bim"]


def test_long_tables_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paired_tests, "_ROWS", 8)
    folders = [write_run(f"{norm}{seed}", norm=norm, seed=seed) for norm in ("bn", "gn", "ln") for seed in (0, 1, 2)]
    _, tables = written(*folders[:6])
    table = tables["paired-model-norm"]
    assert "Left out of 12 rows: those of single pairs." in table.caption
    assert [row[0] for row in texts(table)] == list(SHARES)
    assert "p" not in table.columns, "none is left"
    assert "McNemar" not in table.caption
    monkeypatch.setattr(paired_tests, "_ROWS", 5)
    _, tables = written(*folders)
    table = tables["paired-model-norm"]
    assert "Left out of 24 rows: those of single pairs, and what is beyond 5 rows." in table.caption
    assert len(table.rows) == 5
    (first, *others), tables = written(*folders[::3])
    table = tables["paired-model-norm"]
    assert "The first 5 of 6 rows." in table.caption
    assert len(table.rows) == 5
    p_values = []
    for other in others:
        for attack in SHARES:
            change = correct(other, attack) - correct(first, attack)
            p_values.append(binomtest(int((change > 0).sum()), int((change != 0).sum())).pvalue)
    adjusted = [cell.value for cell in column(table, "p (Holm)")]
    assert adjusted == pytest.approx(ref.holm(p_values)[:5]), "for the tests that are not shown, too"


def test_many_settings_have_six_tables():
    folders = [write_run("all")] + [write_run(f"x{k}", settings={"trainer": {f"x{k}": k}}) for k in range(8)]
    _, tables = written(*folders)
    shown = [table for anchor, table in tables.items() if anchor.startswith("paired")]
    assert len(shown) == 6
    assert "Settings without a table, beyond the first 6: trainer.x6, trainer.x7." in shown[-1].caption
    assert "without a table" not in shown[0].caption


# --- geometry ---------------------------------------------------------------------------------------------------------

SHOWN = {
    "step": ("9", 9),
    "max |cos|": ("1.5e-05", 1.5e-5),
    "max |cos|, ε removed": ("2.5e-07", 2.5e-7),
    "max |cos|, control": ("0.25", 0.25),
    "‖W‖, first → last": ("80 → 100 (×1.25)", 1.25),
    "|residual| / floor": ("0.5", 0.5),
    "Σ Δ‖W‖²": ("1234", 1234.5),
    "Σ η²‖∇W‖² (eq 16)": ("1200", 1200.5),
    "|Σ residual| / Σ floor": ("0.25", 0.25),
    "turn per step, rad": ("0.003", 0.003),
    "turn / equilibrium": ("1.5", 1.5),
    "|γ² − σ²|, median": ("0.125", 0.125),
    "|β − μ|, median": ("0.375", 0.375),
    "γ²/σ², median": ("1.75", 1.75),
}


def test_geometry_is_that_of_the_last_step():
    table = written(write_run("a", metrics=MEASURED, shares={}))[1]["geometry"]
    assert table.columns == ["run", *SHOWN]
    assert [cell.text for cell in table.rows[0]] == ["a", *(text for text, _ in SHOWN.values())]
    assert [cell.value for cell in table.rows[0][1:]] == pytest.approx([value for _, value in SHOWN.values()])


def test_geometry_leaves_out_what_no_run_has_and_marks_what_one_lacks():
    few = {key: MEASURED[key] for key in ("orthogonality/max_abs_cos", "norm_growth/weight_norm")}
    folders = [
        write_run("bn", metrics=few),
        write_run("gn", norm="gn", metrics={"norm_growth/weight_norm": [(7, 2.0)]}),
    ]
    _, tables = written(*folders, write_run("none", norm="none"))
    assert texts(tables["geometry"]) == [["bn", "9", "1.5e-05", "80 → 100 (×1.25)"], ["gn", "7", "–", "2 → 2 (×1)"]]
    assert tables["geometry"].columns == ["run", "step", "max |cos|", "‖W‖, first → last"]
    assert "equilibrium" not in tables["geometry"].caption
    assert "Σ:" not in tables["geometry"].caption


def test_ratios_need_both_at_one_step_and_a_divisor():
    floor = "norm_growth/storage_floor"
    cases = {
        "late": {"norm_growth/residual": [(1, 6.0), (2, 9.0)], floor: [(1, 3.0)]},
        "zero": {"norm_growth/residual": [(1, 6.0)], floor: [(1, 0.0)]},
        "alone": {"norm_growth/residual": [(1, 6.0)]},
    }
    _, tables = written(*(write_run(name, norm=name, metrics=metrics) for name, metrics in cases.items()))
    assert [cell.text for cell in column(tables["geometry"], "|residual| / floor")] == ["2", "–", "–"]


def test_record_that_ends_in_the_middle():
    folder = write_run("a", metrics=MEASURED, norm="gn")
    lines = (folder / "record.jsonl").read_text().splitlines(keepends=True)
    (folder / "record.jsonl").write_text("".join(lines[:9]) + lines[9][:30])
    _, tables = written(folder, write_run("b"))
    assert tables["geometry"].columns == ["run", "step", *list(SHOWN)[1:5]]
    assert texts(tables["geometry"]) == [["gn", "9", "1.5e-05", "2.5e-07", "0.25", "80 → 80 (×1)"]]
    assert [row[-1] for row in texts(tables["settings"])] == ["not ended, or killed", "ended"]
    assert "Not evaluated: gn." in tables["robustness"].caption


# --- settings and environments ----------------------------------------------------------------------------------------


def test_settings_that_differ_by_run():
    runs, tables = written(write_run("a"), write_run("b", norm="gn", seed=1, settings={"data": {"norm": "x"}}))
    table = tables["settings"]
    assert table.columns == ["run", "model.norm", "seed_everything", "data.norm", "state"]
    assert texts(table) == [[runs[0].name, "bn", "0", "–", "ended"], [runs[1].name, "gn", "1", "x", "ended"]]
    assert [cell.value for cell in column(table, "seed_everything")] == [0, 1]


def test_very_many_settings_are_cut_and_named():
    many = {"trainer": {f"x{k}": k for k in range(25)}}
    runs, tables = written(*(folders := [write_run("a"), write_run("b", settings=many)]))
    table = tables["settings"]
    assert table.columns == ["setting", *(run.name for run in runs)]
    assert [row[0].text for row in table.rows] == [*(f"trainer.x{k}" for k in range(25)), "state"]
    runs, tables = written(*folders, *(write_run(f"more{k}", norm=f"n{k}") for k in range(25)))
    table = tables["settings"]
    assert len(table.columns) == 22
    assert "6 more are left out: trainer.x19, trainer.x20, trainer.x21" in table.caption


def test_environments_have_a_column_each():
    folders = [write_run(name, norm=name) for name in ("bn", "gn", "ln")]
    path = folders[2] / "record.jsonl"
    path.write_text(re.sub(r'"python": "[^"]*"', '"python": "9.9", "gpu": "2 × H<200>"', path.read_text()))
    runs, tables = written(*folders)
    table = tables["environment"]
    assert table.columns == ["item", "bn; gn", "ln"]
    values = {row[0]: row[1:] for row in texts(table)}
    environment = runs[0].record.environment
    assert values["python"] == [environment["python"], "9.9"]
    assert values["gpu"] == ["–", "2 × H<200>"]
    assert {name: found[0] for name, found in values.items() if name in environment} == environment
    _, tables = written(*folders[:2])
    assert tables["environment"].columns == ["item", "all 2 runs"]


def test_times_are_those_of_the_records():
    folders = [write_run(name, norm=name) for name in ("bn", "gn", "ln", "in")]
    for folder, (begun, seconds) in zip(
        folders, [(86400, 3.4), (3600, 185), (7200, 3600 * 30 + 61), (0, 59.6)], strict=True
    ):
        lines = iter((folder / "record.jsonl").read_text().splitlines(keepends=True))
        changed = [
            re.sub(r'"time": [\d.]+', f'"time": {begun + 1 if k == 0 else begun + 1 + seconds}', x)
            for k, x in enumerate(lines)
        ]
        (folder / "record.jsonl").write_text("".join(changed))
    for chosen, begun, took in (
        ([0], "1970-01-02 00:00", "3 s"),
        ([1], "1970-01-01 01:00", "3 min 05 s"),
        ([2], "1970-01-01 02:00", "30 h 01 min"),
        ([3], "1970-01-01 00:00", "1 min 00 s"),
        ([2, 0, 1], "1970-01-01 01:00 … 1970-01-02 00:00", "3 s … 30 h 01 min"),
    ):
        _, tables = written(*(folders[k] for k in chosen))
        assert texts(tables["environment"])[-2:] == [["begun (UTC)", begun], ["took", took]]


def test_the_control_counts_decisions_that_longer_weights_change():
    shares = {"clean": 0.8, "bim": 0.3, "clean_rescaled": 0.8, "bim_rescaled": 0.2}
    folder = write_run("a", shares=shares, conditions={"rescale": 10.0})
    _, tables = written(folder)
    kept = np.load(folder / "robustness.npz")
    differing = sum(int((kept[f"{n}/correct"] != kept[f"{n}_rescaled/correct"]).sum()) for n in ("clean", "bim"))
    results = {row["attack"]: row for row in read_record(folder).results["robustness"]["results"]}
    largest = max(abs(results[f"{n}_rescaled"]["accuracy"] - results[n]["accuracy"]) for n in ("clean", "bim"))
    (row,) = tables["control"].rows
    n = 2 * results["clean"]["n"]
    assert [cell.text for cell in row[1:]] == ["10", "2", str(differing), str(n), f"{100 * largest:.2f} pt"]
    assert differing > 0
    assert len(tables["robustness"].columns) == 4, "the control is in its own table"
    (folder / "robustness.npz").unlink()
    _, tables = written(folder)
    assert tables["control"].rows[0][3].text == "–"


def test_there_is_no_control_without_one():
    _, tables = written(write_run("a"))
    assert "control" not in tables
