"""Public values in a Python prompt and a notebook: their display, and what users can do with them."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from lightning_normgeo import (
    NormGrowthMonitor,
    RobustnessEvaluation,
    evaluate_robustness,
    read_record,
    scale_invariant_units,
    swap_norm,
)
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness import RobustnessReport, RobustnessSettings, SampleResults, compare, load_decisions
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.study import load_study
from lightning_normgeo.symmetries.units.weight_units import Units, WeightUnits
from lightning_normgeo.utilities.checked_values import UnknownNameError
from lightning_normgeo.utilities.notebook import LINE, NotebookTable, one_line, summary
from support.isolation import REPOSITORY
from support.records import write_run
from support.small_models import conv_bn, x2d

HOSTILE = '<script>alert(1)</script>\x1b[2J\u2028"&\udcff' + 300 * "x"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).eval()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randint(0, 256, (6, 3, 8, 8)) / 255, torch.arange(6) % 5) for _ in range(2)]


@pytest.fixture(scope="module")
def report() -> RobustnessReport:
    return evaluate_robustness(net(), batches(), attacks=["gaussian", "bim"], steps=2, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "name" / "first")


def values(report: RobustnessReport, run: Path) -> Iterator[tuple[object, str]]:
    """Return public values and their expected display in a prompt."""
    yield report, r"RobustnessReport\(clean [\d.]+ %, gaussian [\d.]+ %, bim [\d.]+ % of 12\)"
    yield report["bim"], r"AttackResult\([\d.]+ % of 12, 95 % interval [\d.]+ … [\d.]+ %, drop -?[\d.]+ points\)"
    yield report.decisions, r"Decisions\(clean \d+ of 12 correct, gaussian \d+ of 12 correct, bim \d+ of 12 correct\)"
    yield report.decisions.of("bim"), r"Rows\(12 samples, \d+ correct\)"
    yield RobustnessSettings(attacks="bim", steps=2), r"RobustnessSettings\(steps=2, attacks=\['bim'\]\)"
    yield (
        RobustnessReport({}, {}, [], SampleResults([]), not_evaluated={"all attacks": "why"}),
        r".*\(all attacks not eval.*",
    )
    yield read_record(run), r"Record\('.*first', to step 60, \d+ metrics, 2 results, complete\)"
    yield Record(Path("x")), r"Record\('x', no steps, 0 metrics, not complete\)"
    units = scale_invariant_units(net().train(), x2d(channels=3, size=8))
    yield units, r"Units\(2 weights: 1 filter, 1 none\)"
    yield units["0"], r"WeightUnits\('0\.weight', 4 × filter, batch normalization 1\)"
    yield Units(()), r"Units\(0 weights\)"
    swapped = swap_norm(conv_bn(), "gn", example_batch=x2d())
    yield swapped, r"SwapReport\(to gn: 1 changed, 0 left alone, function changed by [\d.]+\)"
    yield NormGrowthMonitor(layers="*"), r"NormGrowthMonitor\(every_n_steps=None, layers='\*'\)"
    yield RobustnessEvaluation(attacks="bim"), r"RobustnessEvaluation\(attacks=\['bim'\], on_unsuitable='skip'\)"
    yield load_study(REPOSITORY / "configs/study/paper_small.yaml"), r"Study\('paper_small', 8 runs, grid .* × .*\)"
    yield swapped.changes[0], r"Change\('1', BatchNorm2d -> GroupNorm\(\d+ groups\), changed by [\d.]+\)"


def test_a_value_is_one_line_in_a_prompt(report: RobustnessReport, run: Path) -> None:
    for value, pattern in values(report, run):
        assert re.fullmatch(pattern, repr(value)), repr(value)
        assert len(repr(value)) <= LINE


def many(count: int) -> RobustnessReport:
    row = evaluate_robustness(net(), batches(), attacks=[], progress=False)["clean"]
    settings = {"attacks": {}}
    return RobustnessReport({f"{HOSTILE}{k}": row for k in range(count)}, settings, [HOSTILE], SampleResults([]))


def hostile() -> Iterator[Any]:
    yield many(40)
    yield Record(Path(HOSTILE), metrics={HOSTILE: [(0, math.nan), (1, math.inf)]}, layers={HOSTILE: [(0, {"a": 1.0})]})
    weight = WeightUnits(name=HOSTILE, kind="none", count=1, reason=HOSTILE)
    yield weight
    yield Units((weight,) * 100)
    swapped = swap_norm(conv_bn(), "gn")
    change = replace(swapped.changes[0], name=HOSTILE, note=HOSTILE, before=HOSTILE)
    yield change
    yield replace(swapped, changes=(change,) * 100)


def test_hostile_names_stay_text_in_one_line() -> None:
    for value in hostile():
        assert len(repr(value)) <= LINE
        assert repr(value).isprintable()
        if hasattr(value, "_repr_html_"):
            html = value._repr_html_()
            assert Tags.of(html) <= {"div", "table", "thead", "tbody", "tr", "th", "td"}
            html.encode("utf-8")
            assert len(html) < 200_000


class Tags(HTMLParser):
    """The tags of a page, which have to be closed in order, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.text = ""

    @classmethod
    def of(cls, html: str) -> set[str]:
        return cls.read(html).tags

    @classmethod
    def read(cls, html: str) -> Tags:
        parser = cls()
        parser.feed(html)
        parser.close()
        assert not parser.open
        return parser

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert all(name == "style" for name, _ in attrs)
        self.tags.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_a_notebook_shows_a_table(report: RobustnessReport, run: Path) -> None:
    shown = Tags.read(report._repr_html_()).text
    for text in ("gaussian", f"{100 * report['bim'].accuracy:.4g}", "95 % interval"):
        assert text in shown
    record = Tags.read(read_record(run)._repr_html_()).text
    assert "norm_growth/increment" in record
    assert "… 40 more rows: print it, or use to_frame()" in record
    assert "batch normalization 1" in scale_invariant_units(net().train(), x2d(channels=3, size=8))._repr_html_()
    assert "function in evaluation mode: changed by" in swap_norm(conv_bn(), "gn", example_batch=x2d())._repr_html_()


def test_tables_take_the_colours_of_the_page() -> None:
    html = NotebookTable("a", ["b", "c"], [["d", 1.23456], [None, 3]]).to_html()
    assert "1.235" in html
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb|white|black", html)
    assert "currentColor" in html


def test_what_is_not_evaluated_is_in_the_table() -> None:
    report = RobustnessReport({}, {}, ["be wary"], SampleResults([]), not_evaluated={"bim": "no gradient"})
    assert "bim: not evaluated: no gradient" in report._repr_html_()
    assert "be wary" in report._repr_html_()


def test_summaries_end_with_how_many_there_are() -> None:
    assert summary("Kind", ["a", "b"], " of 3") == "Kind(a, b of 3)"
    assert summary("Kind", []) == "Kind()"
    long = summary("Kind", [f"part {k}" for k in range(100)], " of 3")
    assert long.endswith(", … 100 in all of 3)")
    assert len(long) <= LINE
    assert one_line("a\n\x1bb" + 200 * "c") == "a �b" + 114 * "c" + "…c"


# --- look-ups ---------------------------------------------------------------------------------------------------------


def test_a_report_is_looked_up_by_attack(report: RobustnessReport) -> None:
    assert report["bim"] is report.results["bim"]
    assert "bim" in report
    assert "pgd" not in report
    assert 3 not in report
    assert list(report) == ["clean", "gaussian", "bim"]
    assert len(report) == 3
    assert RobustnessReport({}, {}, [], SampleResults([]))  # an empty report is still a report


@pytest.mark.parametrize("kind", [KeyError, ConfigurationError], ids=["KeyError", "ConfigurationError"])
def test_a_wrong_attack_names_the_nearest_and_all(report: RobustnessReport, kind: type[Exception]) -> None:
    with pytest.raises(
        kind, match=r"^'bmi' was not evaluated; did you mean 'bim'\? Known are 'clean', 'gaussian', 'bim'"
    ):
        report["bmi"]
    with pytest.raises(kind, match=r"^3 was not evaluated"):
        report[3]  # type: ignore[index]
    with pytest.raises(kind, match=r"^attack='bmi' was not evaluated; did you mean 'bim'"):
        report.decisions.of("bmi")
    assert report.decisions.without("bim").attacks == ["clean", "gaussian"]
    with pytest.raises(kind, match=r"was not evaluated: no gradient; known are none"):
        RobustnessReport({}, {}, [], SampleResults([]), not_evaluated={"bim": "no gradient"})["bim"]


def test_units_are_looked_up_by_place_and_name() -> None:
    units = scale_invariant_units(net().train(), x2d(channels=3, size=8))
    assert units[0] is units["0"] is units["0.weight"]
    assert list(units[:1]) == [units[0]]
    assert "0" in units
    assert units[1] in units
    assert "1" not in units
    with pytest.raises(UnknownNameError, match=r"'conv' is none of the 2 weights; known are '0', '3'\."):
        units["conv"]
    with pytest.raises(KeyError, match=r"known are none"):
        Units(())["conv"]


def test_evaluations_are_compared_in_whatever_form(report: RobustnessReport, tmp_path: Path) -> None:
    report.save(tmp_path / "saved")
    forms: list[Any] = [report, report.decisions, tmp_path / "saved", str(tmp_path / "saved" / "robustness.npz")]
    found = [compare(first, second, "bim") for first in forms for second in forms]
    assert all(one == found[0] for one in found)
    assert load_decisions(tmp_path / "saved").attacks == list(report)
    with pytest.raises(ConfigurationError, match=r"attack='bmi' was not evaluated; did you mean 'bim'\? Known are"):
        compare(report, report, "bmi")
    for wrong in (None, 3, [report], {"bim": 1}, RobustnessReport):
        with pytest.raises(ConfigurationError, match=r"compare\(second=.*\): give a report of evaluate_robustness"):
            compare(report, wrong, "bim")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"nowhere is not what RobustnessEvaluation wrote"):
        compare(report, "nowhere", "bim")


# --- data frames ------------------------------------------------------------------------------------------------------


def test_data_frames_of_a_record(run: Path) -> None:
    pytest.importorskip("pandas")
    record = read_record(run)
    metrics = record.to_frame()
    assert list(metrics.columns) == list(record.metrics)
    for key, points in record.metrics.items():
        assert list(metrics[key].dropna().items()) == points
    layers = record.to_frame("norm_growth/weight_norm")
    assert (metrics.index.name, layers.index.name, layers.columns.name) == ("step", "step", "layer")
    for step, by_layer in record.layers["norm_growth/weight_norm"]:
        assert layers.loc[step].to_dict() == by_layer
    assert list(record.to_frame("robustness/*/n")) == [
        key for key in record.metrics if re.match("robustness/.*/n$", key)
    ]
    assert list(record.to_frame("train/loss")) == ["train/loss"]
    assert Record(Path("x")).to_frame().empty
    for wrong in ("norm_growth/weigth_norm", "nothing/*", "", 3, ["train/loss"]):
        with pytest.raises(UnknownNameError, match="was not recorded in"):
            record.to_frame(wrong)  # type: ignore[arg-type]


def test_curves_with_gaps_and_values_that_are_not_finite() -> None:
    pytest.importorskip("pandas")
    record = Record(Path("x"), metrics={"a": [(5, 1.0), (2, math.inf), (5, 3.0)], "b": [(3, math.nan)]})
    frame = record.to_frame()
    assert list(frame.index) == [2, 3, 5]
    assert frame["a"].to_dict() == {2: math.inf, 3: pytest.approx(math.nan, nan_ok=True), 5: 3.0}


def test_data_frames_of_reports_and_units(report: RobustnessReport) -> None:
    pytest.importorskip("pandas")
    frame = report.to_frame()
    assert list(frame.index) == list(report)
    assert frame.loc["bim", "accuracy"] == report["bim"].accuracy
    assert frame.loc["bim", "eps"] == 8 / 255
    units = scale_invariant_units(net().train(), x2d(channels=3, size=8)).to_frame()
    assert units.loc["0"].to_dict() == {
        "unit": "filter", "count": 4, "with bias": False, "why": "batch normalization 1",
    }  # fmt: skip
    swapped = swap_norm(conv_bn(), "gn", example_batch=x2d())
    assert swapped.to_frame().loc["1", "change"] == swapped.changes[0].change
    assert RobustnessReport({}, {}, [], SampleResults([])).to_frame().empty
    assert Units(()).to_frame().empty


def test_without_pandas_the_error_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigurationError, match=r"to_frame\(\) makes a data frame of pandas: pip install pandas"):
        read_record(run).to_frame()


def test_a_record_needs_no_pandas(run: Path) -> None:
    code = (
        "import sys; from lightning_normgeo.runs.records.record_reader import read_record; "
        f"record = read_record({str(run)!r}); repr(record), record._repr_html_(); "
        "print([name for name in ('pandas', 'numpy', 'torch', 'pytorch_lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [evaluate_robustness, RobustnessEvaluation.__init__], ids=["function", "callback"])
def test_signatures_show_every_setting(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert not any(one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in parameters.values())
    own = {"on_unsuitable": "skip"} if function is not evaluate_robustness else {}
    settings = [one for one in fields(RobustnessSettings) if one.init]
    assert {one.name: parameters[one.name].default for one in settings} == {
        one.name: own.get(one.name, one.default) for one in settings
    }
    if function is evaluate_robustness:
        declared, expected = get_type_hints(function), get_type_hints(RobustnessSettings)
        assert {one.name: declared[one.name] for one in settings} == {one.name: expected[one.name] for one in settings}
        assert all(f"{one.name}:" in (function.__doc__ or "") for one in parameters.values())


def test_settings_reach_the_evaluation() -> None:
    report = evaluate_robustness(net(), batches(), attacks="pgd", eps=0.1, steps=3, seed=7, fold=False, progress=False)
    chosen = RobustnessSettings(attacks="pgd", eps=0.1, steps=3, seed=7, fold=False)
    assert report.settings["attacks"] == {one.name: one.settings() for one in chosen.all_attacks}
    assert (report.settings["seed"], report.settings["fold"]) == (7, False)
    callback = RobustnessEvaluation(attacks="pgd", eps=0.1, steps=3, seed=7, fold=False)
    assert callback.settings == replace(chosen, on_unsuitable="skip")
