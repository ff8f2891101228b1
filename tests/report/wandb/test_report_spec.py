"""W&B's report and project view: their specification, as a snapshot and part by part, and that both are saved."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.report.compared_runs import Run, compare_runs
from lightning_normgeo.report.story import INCREMENTS, ORTHOGONALITY, WANDB_SECTIONS
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.tables.table import Table, number, text
from lightning_normgeo.report.verdicts.study_verdicts import verdicts_of
from lightning_normgeo.report.wandb.publishing import publish_report
from lightning_normgeo.report.wandb.report_spec import build_report
from lightning_normgeo.report.wandb.workspace_spec import build_workspace
from lightning_normgeo.runs.records.record import Record
from support.isolation import REPOSITORY
from support.wandb_backend import ENTITY, StoredRun, WandbBackend
from support.wandb_server import KEY, needs_pinned_wandb, serve
from support.wandb_specs import numbered, spec_of

pytest.importorskip("wandb_workspaces", reason="the extra wandb-reports is not installed")
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:Pydantic V1 style")]  # wandb-workspaces
SNAPSHOT = Path(__file__).parent / "snapshots" / "wandb_report.json"
PROJECT = "geometry"
NORM, DECAY = "config.value.model.norm", "config.value.optimizer.init_args.weight_decay"
KEYS = [
    "affine/abs_gamma2_minus_sigma2_mean",
    "affine/abs_gamma2_minus_sigma2_channel/layer1.0.bn1",
    "norm_growth/weight_norm",
    "norm_growth/weight_norm/layer1.0.conv1",
    "norm_growth/weight_norm/layer1.0.conv2",
    "norm_growth/increment",
    "norm_growth/predicted",
    "norm_growth/term_quadratic",
    "orthogonality/max_abs_cos",
    "orthogonality_control/max_abs_cos",
    "norm_growth/angular_update",
]
TABLE = Table("robustness", "Accuracies", "How to read it.", ["run", "bim | pgd"], [[text("a|b"), number(0.5)]])

EFFECTIVE = ["effective/weight_norm", "effective/weight_norm_raw"]
MASKED = [
    {"criterion": criterion, "replace": replace, "ratio": 0.3, "removed_share": 0.3, "n": 9}
    | {"accuracy": 0.5, "ci_low": 0.2, "ci_high": 0.8}
    for replace in ("zero", "mean")
    for criterion in ("gamma", "random")
]
NOT_MEASURED = ("symmetry/", "sphere/", "batch_geometry/")
"""Beginnings of keys that the study of these tests does not have."""


def record(name: str, settings: Mapping[str, Any], keys: list[str] = KEYS, attacks: tuple[str, ...] = ()) -> Record:
    """Return a record with one point for each key."""
    made = Record(Path("runs/study") / name, settings=dict(settings), metrics={key: [(1, 0.5)] for key in keys})
    if attacks:
        made.results["robustness"] = {"results": [{"attack": attack, "accuracy": 0.5} for attack in attacks]}
        made.images["robustness/examples"] = [("example.png", "label 3")]
    return made


def settings(norm: str, decay: float, seed: int, number: int | None) -> dict[str, Any]:
    """Return settings in the form that the command line logs."""
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "weight_decay": decay}}
    own = {"seed_everything": seed, "model": {"norm": norm}, "optimizer": optimizer}
    own |= {"trainer": {}, "test_after_fit": True}
    return {"norm": norm, "config": own, **({} if number is None else {"wandb": {"id": f"run{number}"}})}


def study(unknown: Sequence[int] = ()) -> list[Run]:
    """Return two normalizations with and without weight decay, two seeds each; W&B's id of some may be unknown."""
    grid = itertools.product(("bn", "gn"), (0.0, 5e-4), (0, 1))
    attacks = ("clean", "bim", "bim_eps0.01")
    return compare_runs(
        [
            record(f"r{i}", settings(*point, None if i in unknown else i), attacks=attacks)
            for i, point in enumerate(grid)
        ]
    )


def study_of_weights() -> list[Run]:
    """Return two runs with effective weights, masked channels, and accuracies under attack of which one tells apart."""
    runs = []
    for name, correct in (("a", 4), ("b", 2)):
        made = record(name, {"decay": correct, "wandb": {"id": name}}, [*EFFECTIVE, "channels/clean/accuracy"])
        counts = {"clean": 8, "gaussian": 7, "bim_eps0.01": correct, "bim_eps0.5": 0}
        made.results["robustness"] = {
            "results": [{"attack": attack, "correct": c, "n": 9, "accuracy": c / 9} for attack, c in counts.items()]
        }
        made.results["channels"] = {"results": MASKED}
        runs.append(made)
    return compare_runs(runs)


def blocks(spec: Mapping[str, Any], kind: str = "panel-grid") -> list[dict[str, Any]]:
    return [block for block in spec["blocks"] if block["type"] == kind]


def panels(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    return grid["metadata"]["panelBankSectionConfig"]["panels"]


def drawn(grid: Mapping[str, Any]) -> list[str]:
    return [key for panel in panels(grid) for key in panel["config"].get("metrics", [])]


def runs_of(grid: Mapping[str, Any]) -> list[str]:
    """Return the names of the runs that a grid shows; an empty list means all runs."""
    (runset,) = grid["metadata"]["runSets"]
    rules = runset["filters"]["filters"]
    assert all((rule["key"], rule["op"]) == ({"section": "run", "name": "name"}, "IN") for rule in rules)
    return [name for rule in rules for name in rule["value"]]


def grouping(grid: Mapping[str, Any]) -> list[str]:
    (runset,) = grid["metadata"]["runSets"]
    assert all(key["section"] == "config" for key in runset["grouping"])
    return [key["name"] for key in runset["grouping"]]


def words(spec: Mapping[str, Any], kind: str) -> list[str]:
    return ["".join(child["text"] for child in block["children"]) for block in blocks(spec, kind)]


def report_of(runs: list[Run], tables: tuple[Table, ...] = ()) -> dict[str, Any]:
    return spec_of(build_report(runs, ENTITY, PROJECT, tables, "A report"))


@needs_pinned_wandb
def test_specification_is_the_snapshot() -> None:
    view = spec_of(build_workspace(study(), ENTITY, PROJECT, "A report"))["section"]
    sections = view["panelBankConfig"].pop("sections")
    report = report_of(study(), (TABLE,))
    found = {"report": report.pop("blocks"), "of report": [report], "workspace": sections, "of workspace": [view]}
    if os.environ.get("UPDATE_SNAPSHOTS"):  # one line for each block, so that differences are readable
        lines = {
            name: [json.dumps(one, ensure_ascii=False, sort_keys=True) for one in part] for name, part in found.items()
        }
        parts = [f'"{name}": [\n' + ",\n".join(entries) + "\n]" for name, entries in lines.items()]
        SNAPSHOT.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_a_report_has_no_randomness_but_names() -> None:
    first, second = (
        build_report(study(), ENTITY, PROJECT, [TABLE], "A"),
        build_report(study(), ENTITY, PROJECT, [TABLE], "A"),
    )
    assert first._to_model().spec != second._to_model().spec
    assert spec_of(first) == spec_of(second)
    ids = re.findall(r'"(?:__id__|id)": "(\w+)"', json.dumps(spec_of(first)))
    assert len(ids) == len(set(ids)) > 20


def test_every_metric_of_the_story_is_documented() -> None:
    page = (REPOSITORY / "docs" / "callbacks" / "keys.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    documented = [
        re.escape(key).replace(r"\*", ".*") for row in rows for key in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    documented = [re.sub(r"\\\{layer\\\}", ".*", key) for key in documented]
    wanted = {key for section in WANDB_SECTIONS for key in section.wandb_keys or section.keys}
    single = {key.removesuffix("/{layer}") for key in wanted}
    # the table lists the channel key of one quantity for all of them
    keys = {
        key.replace("abs_beta_minus_mu_channel", "abs_gamma2_minus_sigma2_channel") + "/x" * key.endswith("_channel")
        for key in single
    }
    assert [key for key in sorted(keys) if not any(re.fullmatch(known, key) for known in documented)] == []


def test_a_grid_for_each_quantity_that_was_logged() -> None:
    spec = report_of(study())
    assert words(spec, "heading")[:3] == [
        "γ, β against σ, μ (Fig 2)",
        "Norms of the weights (Fig 3)",
        "Without weight decay",
    ]
    keys = [drawn(grid) for grid in blocks(spec)]
    assert keys[0] == KEYS[:2]
    assert keys[1] == keys[2] == KEYS[2:4]  # ‖W‖ of one layer out of two, in both halves of the figure
    assert keys[3:7] == [KEYS[5:7], [KEYS[7]], KEYS[8:10], [KEYS[10]]]
    lines = [panel for grid in blocks(spec) for panel in panels(grid) if panel["viewType"] == "Run History Line Plot"]
    assert {panel["config"]["xAxis"] for panel in lines} == {"trainer/global_step"}
    signed = [
        panel for panel in lines if panel["config"]["metrics"][0].startswith(("norm_growth/incr", "norm_growth/term"))
    ]
    assert signed
    assert not any(panel["config"].get("yLogScale") for panel in signed)


def test_verdicts_come_first() -> None:
    runs = study()
    tables = all_tables(runs, verdicts_of(runs))
    spec = report_of(runs, (*tables[1:], tables[0]))
    assert words(spec, "heading")[0] == tables[0].title == "Verdicts on the paper's claims"
    assert words(spec, "heading").count(tables[0].title) == 1


@pytest.mark.parametrize("runs", [study(), study_of_weights()], ids=["geometry", "weights"])
def test_panels_of_a_grid_do_not_cover_each_other(runs: list[Run]) -> None:
    for grid in blocks(report_of(runs)):
        places = [panel["layout"] for panel in panels(grid)]
        cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24


def test_text_stands_before_each_grid() -> None:
    kinds = [block["type"] for block in report_of(study())["blocks"]]
    before = [kinds[i - 1] for i, kind in enumerate(kinds) if kind == "panel-grid"]
    assert set(before) == {"paragraph", "heading"}  # the only heading is between the halves of Fig 3
    assert before.count("heading") == 2
    assert (
        "4 groups, which differ in model.norm, optimizer.init_args.weight_decay"
        in words(report_of(study()), "paragraph")[1]
    )


def test_runs_are_grouped_by_what_differs_but_seeds_normalizations_first() -> None:
    grids = blocks(report_of(study()))
    assert all(grouping(grid) == [NORM, DECAY] for grid in grids[:-1])
    assert grouping(grids[-1]) == []  # settings are compared run by run
    turned = compare_runs([record(n, {"decay": d, "norm": n, "wandb": {"id": n}}) for n, d in (("bn", 0), ("gn", 1))])
    assert grouping(blocks(report_of(turned))[0]) == ["norm.value", "decay.value"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([{"norm": "bn"}, {"norm": "gn"}], ["norm.value"]),
        ([{"model": {"norm": "bn"}}, {"model": {"norm": "gn"}}], ["model.value.norm"]),
        ([{"model.norm": "bn"}, {"model.norm": "gn"}], ["model.norm.value"]),
        ([{"model/norm": "bn"}, {"model/norm": "gn"}], ["model/norm.value"]),
        ([{}, {"model": {"norm": "gn"}}], ["model.value.norm"]),
        ([{"config": {"norm": "bn"}, "norm": "x"}, {"config": {"norm": "gn"}, "norm": "x"}], ["config.value.norm"]),
        ([{"layers": [{"a": 1}]}, {"layers": [{"a": 2}]}], []),
        ([{"norm": "bn"}, {"norm": "bn"}], []),
    ],
    ids=[
        "flat",
        "nested",
        "dots in the name",
        "slash in the name",
        "missing in one",
        "command line",
        "in a list",
        "same",
    ],
)
def test_settings_are_named_as_wandb_has_them(values: list[dict[str, Any]], expected: list[str]) -> None:
    runs = compare_runs([record(f"r{i}", value) for i, value in enumerate(values)])
    assert grouping(blocks(report_of(runs))[0]) == expected


def test_norms_are_shown_without_and_with_weight_decay() -> None:
    grids = blocks(report_of(study()))
    assert runs_of(grids[0]) == [f"run{i}" for i in range(8)]
    assert runs_of(grids[1]) == ["run0", "run1", "run4", "run5"]
    assert runs_of(grids[2]) == ["run2", "run3", "run6", "run7"]


@pytest.mark.parametrize("unknown", [range(8), [3]], ids=["all", "one"])
def test_runs_whose_names_at_wandb_are_unknown_are_not_told_apart(unknown: Sequence[int]) -> None:
    spec = report_of(study(unknown))
    assert [runs_of(grid) for grid in blocks(spec)] == [[]] * len(blocks(spec))
    assert "Without weight decay" not in words(spec, "heading")
    assert "panels show all runs of the project" in words(spec, "paragraph")[1]


def test_robustness_has_bars_for_each_attack_its_table_and_pictures() -> None:
    grid = blocks(report_of(study()))[-2]
    assert drawn(grid) == [
        "robustness/clean/accuracy",
        "robustness/bim/accuracy",
        "robustness/bim/accuracy_drop",
        "robustness/bim_eps0.01/accuracy",
    ]
    kinds = [panel["viewType"] for panel in panels(grid)]
    assert kinds == ["Bar Chart"] * 4 + ["Weave", "Media Browser"]
    assert '"robustness/results"' in json.dumps(panels(grid)[4])
    assert panels(grid)[5]["config"]["mediaKeys"] == ["robustness/examples"]
    columns = grid["metadata"]["runSets"][0]["runFeed"]["columnPinned"]
    assert list(columns) == [
        "run:displayName",
        "config:config.value.seed_everything",
        f"config:{NORM}",
        f"config:{DECAY}",
        "summary:about/max_abs_cos",
        "summary:robustness/clean/accuracy",
        "summary:robustness/bim/accuracy",
        "summary:robustness/bim_eps0.01/accuracy",
    ]


def test_effective_weights_have_bars_and_the_accuracy_against_each() -> None:
    spec = report_of(study_of_weights())
    assert words(spec, "heading")[:2] == ["Effective weights", "What removing channels costs"]
    grid = blocks(spec)[0]
    kinds = [panel["viewType"] for panel in panels(grid)]
    assert kinds == ["Bar Chart", "Bar Chart", "Scatter Plot", "Scatter Plot", "Weave"]
    assert drawn(grid) == EFFECTIVE
    points = [panel["config"] for panel in panels(grid)[2:4]]
    assert [one["xAxis"] for one in points] == [f"summary:{key}" for key in EFFECTIVE]
    # all runs are at zero at the larger radius, which tells nothing
    assert {one["yAxis"] for one in points} == {"summary:robustness/bim_eps0.01/accuracy"}
    assert '"effective/layers"' in json.dumps(panels(grid)[4])


def test_accuracy_against_effective_weights_needs_several_evaluated_runs() -> None:
    grid = blocks(report_of(study_of_weights()[:1]))[0]
    assert [panel["viewType"] for panel in panels(grid)] == ["Bar Chart", "Bar Chart", "Weave"]


def test_masked_channels_have_bars_by_share_and_replacement_and_their_tables() -> None:
    grid = blocks(report_of(study_of_weights()))[1]
    bars = [panel["config"] for panel in panels(grid) if panel["viewType"] == "Bar Chart"]
    assert [one["metrics"] for one in bars] == [
        ["channels/clean/accuracy", *(f"channels/{by}/{replace}/0.3/accuracy" for by in ("gamma", "random"))]
        for replace in ("zero", "mean")
    ]
    assert [one["chartTitle"] for one in bars] == [
        "30 % of channels replaced by 0",
        "30 % of channels replaced by β",
    ]
    shown = json.dumps(panels(grid))
    assert '"channels/results"' in shown
    assert '"channels/table"' in shown


def test_details_of_evaluations_have_their_tables_below_the_bars() -> None:
    case = {"name": "worst", "attacks": ["bim"], "broken": {"bim": 2}, "gained": {"bim": 1}, "alone": {"bim": 1}}
    runs = study_of_weights()
    runs[0].record.results["robustness"]["worst"] = [case]
    runs[1].record.results["robustness_b"] = {
        "results": [],
        "sanity": [{"claim": "c", "outcome": "passed", "evidence": ""}],
    }
    shown = json.dumps(panels(blocks(report_of(runs))[2]))
    tables = [f'"{key}"' for key in ("robustness/results", "robustness/worst", "robustness_b/sanity")]
    assert all(key in shown for key in tables)
    assert [shown.index(key) for key in tables] == sorted(shown.index(key) for key in tables)


def test_view_has_effective_weights_and_channels_before_robustness() -> None:
    names = [section["name"] for section in sections_of(study_of_weights())]
    assert names[-4:-1] == ["Effective weights", "What removing channels costs", "Robustness"]


def test_tables_are_markdown() -> None:
    (block,) = blocks(report_of(study(), (TABLE,)), "markdown-block")
    assert block["content"].splitlines() == ["| run | bim \\| pgd |", "| --- | ---: |", "| a\\|b | 0.5 |"]
    assert "How to read it." in words(report_of(study(), (TABLE,)), "paragraph")


def test_one_run_without_measurements_has_a_report() -> None:
    spec = report_of(compare_runs([record("only", {"arch": "resnet18"}, keys=[])]), (TABLE,))
    assert blocks(spec) == []
    assert words(spec, "paragraph")[1].startswith("One run;")


def sections_of(runs: list[Run]) -> list[dict[str, Any]]:
    """Return the sections of the view of a project."""
    found: list[dict[str, Any]] = spec_of(build_workspace(runs, ENTITY, PROJECT, "A view"))["section"][
        "panelBankConfig"
    ]["sections"]
    return found


def curves_of(section: Mapping[str, Any]) -> list[str]:
    return [key for panel in section["panels"] for key in panel["config"].get("metrics", [])]


def test_view_tells_the_story_in_order_what_matters_first() -> None:
    sections = sections_of(study())
    assert [section["name"] for section in sections] == [
        "At a glance",
        *(one.title for one in WANDB_SECTIONS if not one.keys[0].startswith(NOT_MEASURED)),
        "Robustness",
        "Words and keys",
    ]
    assert [section["pinned"] for section in sections] == [True] + [False] * (len(sections) - 1)
    assert all(section["isOpen"] for section in sections)
    first = sections[0]
    assert curves_of(first) == [
        *(key for key in ORTHOGONALITY.keys if key in KEYS),
        *(key for key in INCREMENTS.keys if key in KEYS),
        *(f"robustness/{attack}/accuracy" for attack in ("clean", "bim", "bim_eps0.01")),
    ]
    for key in ("about/training", "about/robustness"):
        assert json.dumps(key) in json.dumps(first)
    assert '"about/keys"' in json.dumps(sections[-1])


def test_each_section_of_the_view_begins_with_how_to_read_it_and_fits_on_one_page() -> None:
    for section in sections_of(study()):
        assert section["panels"][0]["viewType"] == "Markdown Panel"
        assert len(section["panels"][0]["config"]["value"]) > 40
        shape = section["flowConfig"]
        assert shape["columnsPerPage"] * shape["rowsPerPage"] >= len(section["panels"])


def test_axes_have_units() -> None:
    units = {
        panel["config"]["metrics"][0]: panel["config"].get("yAxisTitle")
        for grid in blocks(report_of(study()))
        for panel in panels(grid)
        if panel["viewType"] == "Run History Line Plot"
    }
    assert units["norm_growth/increment"] == "weight²"
    assert units["norm_growth/weight_norm/layer1.0.conv1"] == "weight"
    assert units["orthogonality/max_abs_cos"] is None


def test_losses_and_accuracies_of_the_project_come_before_the_geometry() -> None:
    runs = [record("r", {"norm": "bn", "wandb": {"id": "r"}}, keys=["norm_growth/weight_norm"])]
    runs[0].metrics |= {key: [(0, 1.0), (1, 0.5)] for key in ("train/loss", "val/loss", "val/acc", "test/loss")}
    compared = compare_runs(runs)
    spec = report_of(compared)
    assert words(spec, "heading")[0] == "Loss and accuracy"
    assert drawn(blocks(spec)[0]) == ["train/loss", "val/loss", "val/acc"]
    assert curves_of(sections_of(compared)[1]) == ["train/loss", "val/loss", "val/acc"]


def test_view_has_the_same_curves_for_all_runs_of_the_project() -> None:
    view = spec_of(build_workspace(study(), ENTITY, PROJECT, "A view"))["section"]
    curves = [key for part in view["panelBankConfig"]["sections"][1:] for key in curves_of(part)]
    grids = blocks(report_of(study()))
    assert curves == [key for grid in (*grids[:2], *grids[3:]) for key in drawn(grid)]
    (runset,) = view["runSets"]
    assert runset["filters"]["filters"] == []
    assert [key["name"] for key in runset["grouping"]] == [NORM, DECAY]
    assert view["settings"]["xAxis"] == "trainer/global_step"


def test_long_title_is_cut_to_what_wandb_takes() -> None:
    assert build_report(study(), ENTITY, PROJECT, [], "x" * 200).title == "x" * 128


@pytest.mark.parametrize(
    "build", [lambda r: build_report(r, ENTITY, PROJECT, [], ""), lambda r: build_workspace(r, ENTITY, PROJECT, "")]
)
def test_missing_extra_says_how_to_get_it(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-normgeo\[wandb-reports\]'"):
        build(study())


@pytest.fixture
def server() -> Iterator[WandbBackend]:
    """Run a server that has all runs of the study."""
    import wandb

    with serve() as server:
        for i in range(8):
            path = (ENTITY, PROJECT, f"run{i}")
            server.runs[path] = StoredRun(path)
        yield server
        wandb.teardown()


@needs_pinned_wandb
def test_publishing_saves_what_was_built(server: WandbBackend) -> None:
    urls = publish_report(study(), ENTITY, PROJECT, [TABLE], "Two norms")
    assert server.refused == []
    report, view = server.views
    assert (report["type"], view["type"]) == ("runs", "project-view")
    assert {one["displayName"] for one in server.views} == {"Two norms"}
    assert {(one["entityName"], one["projectName"]) for one in server.views} == {(ENTITY, PROJECT)}
    built = (
        build_report(study(), ENTITY, PROJECT, [TABLE], "Two norms"),
        build_workspace(study(), ENTITY, PROJECT, "Two norms"),
    )
    for sent, made in zip(server.views, built, strict=True):
        assert numbered(json.loads(sent["spec"])) == spec_of(made)
    assert urls[0] == f"{server.url}/{ENTITY}/{PROJECT}/reports/Two-norms--v1"
    assert urls[1].startswith(f"{server.url}/{ENTITY}/{PROJECT}?nw=")


@needs_pinned_wandb
def test_publishing_again_replaces_nothing(server: WandbBackend) -> None:
    first, second = (publish_report(study(), ENTITY, PROJECT, [], "Two norms") for _ in range(2))
    assert not set(first) & set(second)
    assert not any(view.get("id") for view in server.views)


@needs_pinned_wandb
def test_runs_that_were_not_uploaded_are_named_with_the_command(server: WandbBackend) -> None:
    for i in (2, 5):
        del server.runs[ENTITY, PROJECT, f"run{i}"]
        Path(f"runs/wandb/offline-run-20260101_00000{i}-run{i}").mkdir(parents=True)
    folders = " ".join(f"runs/wandb/offline-run-20260101_00000{i}-run{i}" for i in (2, 5))
    said = rf"lacks 2 of 8 runs \(run2, run5\)\..*Upload with wandb sync -e {ENTITY} -p {PROJECT} {folders}$"
    with pytest.warns(MeasurementWarning, match=said):
        publish_report(study(), ENTITY, PROJECT, [], "Two norms")
    assert len(server.views) == 2


@needs_pinned_wandb
@pytest.mark.parametrize(
    ("project", "unknown", "message"),
    [
        (PROJECT, (), r"^lab/geometry lacks 8 of 8 runs.*would be empty\. Upload with wandb sync -e lab -p geometry"),
        ("elsewhere", (), r"^W&B has no project lab/elsewhere.*Upload with wandb sync -e lab -p elsewhere and the"),
        ("elsewhere", range(8), "^W&B has no project lab/elsewhere"),
    ],
    ids=["no run is there", "no project", "no project, names unknown"],
)
def test_an_empty_report_is_refused(project: str, unknown: Sequence[int], message: str, server: WandbBackend) -> None:
    server.runs = {(ENTITY, PROJECT, "another"): StoredRun((ENTITY, PROJECT, "another"))}
    with pytest.raises(ConfigurationError, match=message):
        publish_report(study(unknown), ENTITY, project, [], "Two norms")
    assert server.views == []


@needs_pinned_wandb
def test_what_wandb_refuses_is_said_in_one_line(server: WandbBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Any) -> Any:
        raise PermissionError("you may\nnot write")

    monkeypatch.setattr(server, "on_upsert_view", forbidden)
    with pytest.raises(
        ConfigurationError, match=r"^lab/geometry cannot be written \(.*may.*not write.*\)\. Check.*$"
    ) as refused:
        publish_report(study(), ENTITY, PROJECT, [], "Two norms")
    assert "\n" not in str(refused.value)


@needs_pinned_wandb
@pytest.mark.parametrize(
    ("key", "message"),
    [(None, r"needs an account.*wandb login, or set WANDB_API_KEY"), (KEY[::-1].upper(), r"refuses the account.*401")],
    ids=["none", "unknown"],
)
def test_account(key: str | None, message: str, server: WandbBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY") if key is None else monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(ConfigurationError, match=message):
        publish_report(study(), ENTITY, PROJECT, [], "Two norms")
    assert server.views == []
