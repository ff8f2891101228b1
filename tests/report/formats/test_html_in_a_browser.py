"""The HTML report in a real browser: no network requests, working menus and tooltips, sortable tables, any data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_normgeo import RecordLogger, read_record
from lightning_normgeo.report import write_report
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.utilities.plain_text import plain
from support.browser import Browser, Shown
from support.records import CONVOLUTIONS, write_run

ALL, CONVOLUTION, BATCH_NORM = "all layers", "model.layer1.0.conv1", "model.layer1.0.bn1"
# for each figure one of its curves, and its key in the record
CURVES: dict[str, tuple[dict[str, str], str]] = {
    "affine": ({"panel": "|β − μ|, bn", "quantity": "mean of all channels"}, "affine/abs_beta_minus_mu_mean"),
    "norms": ({}, "norm_growth/weight_norm"),
    "increments": ({"quantity": "eq 16: η²‖∇‖²"}, "norm_growth/predicted"),
    "terms": ({"quantity": "weight decay"}, "norm_growth/term_weight_decay"),
    "cumulative": ({"quantity": "eq 16: Σ η²‖∇‖²"}, "norm_growth/cumulative_predicted"),
    "orthogonality": ({"quantity": "scale invariant, ε removed"}, "orthogonality/max_abs_cos_corrected"),
    "angles": ({"quantity": "measured"}, "norm_growth/angular_update"),
}
RATIOS = ("increments-ratio", "cumulative-ratio")
WITHOUT_LAYERS = ("loss", "orthogonality-layers", "accuracies", "against-eps")
ROUNDED = 1e-3
"""Relative error of displayed numbers: figures have five digits and tooltips four."""


@pytest.fixture
def page(browser: Browser, study_report: Path) -> Iterator[Shown]:
    """Open the report of the study."""
    with browser.open(study_report) as shown:
        yield shown


@pytest.fixture(scope="module")
def runs(study_report: Path) -> dict[str, Record]:
    """Return the study's records, by the labels of the report."""
    found = {}
    for folder in study_report.parent.glob("*/"):
        record = read_record(folder)
        model, optimizer = (record.settings["config"][name] for name in ("model", "optimizer"))
        decay = optimizer["init_args"]["weight_decay"]
        found[f"{model['norm']}, " + (f"weight decay {decay}" if decay else "no weight decay")] = record
    return found


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def curve(record: Record, key: str, layer: str) -> dict[int, float]:
    if layer == ALL:
        return dict(record.metrics.get(key, []))
    return {step: values[layer] for step, values in record.layers.get(key, []) if layer in values}


@pytest.mark.parametrize("layer", [ALL, CONVOLUTION, BATCH_NORM])
def test_hover_shows_what_the_record_holds(page: Shown, runs: dict[str, Record], layer: str) -> None:
    page.choose(layer)
    seen = 0
    for anchor, (curve_of, key) in CURVES.items():
        if not any(curve(record, key, layer) for record in runs.values()):
            assert page.page.locator(f"#none-{anchor}").is_visible(), anchor
            assert page.page.locator(f"#chart-{anchor}").is_hidden(), anchor
            continue
        decayed = {"run": "bn, weight decay 0.0005", "layer": layer, "step": 29, **curve_of}
        _, tooltip = page.hover(anchor, **decayed)
        assert (tooltip["run"], tooltip["layer"], tooltip["step"]) == (decayed["run"], layer, "29"), anchor
        expected = curve(runs[decayed["run"]], key, layer)[29]
        assert number(tooltip["value"]) == pytest.approx(expected, rel=ROUNDED), anchor
        seen += 1
    assert seen == {ALL: 7, CONVOLUTION: 6, BATCH_NORM: 1}[layer]


@pytest.mark.parametrize("layer", [ALL, CONVOLUTION])
def test_figures_draw_every_point_in_its_place(page: Shown, runs: dict[str, Record], layer: str) -> None:
    page.choose(layer)
    for anchor, (curve_of, key) in CURVES.items():
        expected = {
            (run, step): v for run, record in runs.items() for step, v in curve(record, key, layer).items() if v
        }
        if not expected:
            continue
        points = [point for point in page.drawn(anchor) if curve_of.items() <= point.items()]
        drawn = {(point["run"], point["step"]): point["value"] for point in points}
        assert drawn == pytest.approx(expected, rel=ROUNDED), anchor
        (panel,) = [name for name in ("panel", "group") if f"facet_{name}_sort_index" in points[0]]
        for name in {point[panel] for point in points}:
            beside = [point for point in points if point[panel] == name]
            heights = [round(point["y"], 1) for point in sorted(beside, key=lambda point: abs(point["value"]))]
            assert heights == sorted(heights, reverse=True), f"{anchor}: larger values are not higher"
            places = [round(point["x"], 1) for point in sorted(beside, key=lambda point: point["step"])]
            assert places == sorted(places), anchor


def test_choice_of_a_layer_changes_the_figures_that_have_layers(page: Shown) -> None:
    before = {anchor: page.shapes(anchor) for anchor in CURVES}
    still = {anchor: page.page.locator(f"#chart-{anchor}").inner_html() for anchor in WITHOUT_LAYERS}
    assert set(page.anchors()) == {*CURVES, *RATIOS, *WITHOUT_LAYERS}
    page.choose(CONVOLUTION)
    for anchor in CURVES.keys() - {"affine"}:
        assert page.shapes(anchor) != before[anchor], anchor
    for anchor, html in still.items():
        assert page.page.locator(f"#chart-{anchor}").inner_html() == html, anchor
    page.choose(ALL)
    assert {anchor: page.shapes(anchor) for anchor in CURVES} == before
    assert page.page.locator("#chart-affine").is_visible()


def test_the_pointer_finds_the_nearest_point_and_a_line_shows_its_step(page: Shown) -> None:
    page.hover("norms")
    point = next(one for one in page.drawn("norms") if one["on_top"])
    line = page.page.locator("#norms .cross").bounding_box()
    assert line["x"] == pytest.approx(point["x"], abs=2)
    assert line["y"] < point["y"] < line["y"] + line["height"]
    page.page.mouse.move(point["x"], point["y"] + 25)  # where there is no point
    shown = page.page.locator("#vg-tooltip-element").inner_text()
    assert str(point["step"]) in shown
    page.page.mouse.move(1, 1)
    assert page.page.locator(".cross").count() == 0


def test_numbers_at_logarithmic_axes_are_short(page: Shown) -> None:
    """Decimals, or a power of ten with 1, 2 or 5 in front of it."""
    for anchor in ("orthogonality", "terms", "increments"):
        labels = [label for label in page.labels(anchor, "y") if label]
        assert labels, anchor
        assert all(re.fullmatch(r"[-−]?\d+(\.\d+)?|([25]·)?10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", label) for label in labels), labels
    assert any(label.startswith("10⁻") for label in page.labels("orthogonality", "y"))


def test_verdicts_lead_to_their_figures(page: Shown) -> None:
    links = page.page.locator(".verdicts li a")
    assert links.count() >= 5
    for link in links.all():
        assert page.page.locator(link.get_attribute("href")).is_visible()
    parts = page.page.locator("nav a")
    assert parts.count() >= len(page.anchors())
    for part in parts.all():
        assert page.page.locator(part.get_attribute("href")).is_visible()


def test_hover_over_layers_and_accuracies(page: Shown, runs: dict[str, Record]) -> None:
    record = runs["gn, weight decay 0.0005"]
    last = record.layers["orthogonality/max_abs_cos"][-1][1]
    _, tooltip = page.hover("orthogonality-layers", run="gn, weight decay 0.0005", quantity="scale invariant")
    assert tooltip["layer"] in CONVOLUTIONS
    assert number(tooltip["value"]) == pytest.approx(last[tooltip["layer"]], rel=ROUNDED)
    rows = {row["attack"]: row for row in record.results["robustness"]["results"]}
    _, shown = page.hover("accuracies", run="gn, weight decay 0.0005", attack="bim_eps0.02")
    assert {name: number(shown[name]) for name in ("accuracy", "ci_low", "ci_high", "correct", "n")} == pytest.approx(
        {name: rows["bim_eps0.02"][name] for name in ("accuracy", "ci_low", "ci_high", "correct", "n")}, rel=ROUNDED
    )
    _, shown = page.hover("against-eps", run="gn, weight decay 0.0005", eps=0.04)
    assert number(shown["accuracy"]) == pytest.approx(rows["bim_eps0.04"]["accuracy"], rel=ROUNDED)


@pytest.mark.parametrize("turned", [(0, -300), (-300, 0)], ids=["as it is", "sideways, as Chromium turns it"])
def test_shift_and_wheel_zooms(page: Shown, turned: tuple[int, int]) -> None:
    before, apart = page.labels("orthogonality"), page.labels("norms", "y")
    for anchor in ("norms", "orthogonality"):
        page.hover(anchor)
        place = page.page.evaluate("scrollY")
        page.page.keyboard.down("Shift")
        page.page.mouse.wheel(*turned)
        page.page.keyboard.up("Shift")
        page.settle()
        assert page.page.evaluate("scrollY") == place
    zoomed = page.labels("orthogonality")
    assert max(map(number, page.labels("norms", "x"))) < 60
    assert page.labels("norms", "y") == apart, "the other panel has an axis of its own"
    assert zoomed != before
    page.page.mouse.wheel(0, 200)
    page.page.wait_for_function("place => scrollY > place", arg=place)
    assert page.labels("orthogonality") == zoomed, "without Shift the wheel scrolls"
    point, _ = page.hover("orthogonality")
    page.page.mouse.dblclick(point["x"], point["y"])
    page.settle()
    assert page.labels("orthogonality") == before


def test_shift_and_drag_moves(page: Shown) -> None:
    def drag() -> list[str]:
        point, _ = page.hover("orthogonality", step=29)
        page.page.mouse.down()
        page.page.mouse.move(point["x"] + 80, point["y"], steps=4)
        page.page.mouse.up()
        page.settle()
        return page.labels("orthogonality")

    before = page.labels("orthogonality")
    assert drag() == before
    page.page.keyboard.down("Shift")
    assert drag() != before


def test_a_chosen_layer_is_shown_whole_after_zooming(page: Shown) -> None:
    def zoom() -> dict[str, Any]:
        point, _ = page.hover("norms")
        page.page.keyboard.down("Shift")
        page.page.mouse.wheel(0, -500)
        page.page.keyboard.up("Shift")
        page.settle()
        return point

    page.choose(CONVOLUTION)
    whole, shapes = page.labels("norms"), page.shapes("norms")
    page.choose(ALL)
    zoom()
    page.choose(CONVOLUTION)
    assert (page.labels("norms"), page.shapes("norms")) == (whole, shapes)
    point = zoom()
    assert page.labels("norms") != whole
    page.page.mouse.dblclick(point["x"], point["y"])
    page.settle()
    assert page.labels("norms") == whole


def test_drawing_again_keeps_the_layer(page: Shown) -> None:
    page.choose(CONVOLUTION)
    values = {point["value"] for point in page.drawn("norms")}
    for width in (800, 1100, 700):  # while the figure is still drawing the previous layer
        page.page.set_viewport_size({"width": width, "height": 900})
        page.page.wait_for_timeout(250)
    page.page.wait_for_function("document.querySelector('#chart-against-eps .marks').clientWidth < 660")
    assert {point["value"] for point in page.drawn("norms")} == values
    assert page.page.locator(".marks").count() == len(page.anchors())
    assert page.page.locator("#chart-affine").is_hidden()


HEIGHTS = """() => {
    window.heights = [];
    const look = () => { heights.push(document.documentElement.scrollHeight); requestAnimationFrame(look); };
    look();
}"""


def test_page_does_not_jump_while_it_is_drawn_again(page: Shown) -> None:
    last = page.page.locator("#chart-against-eps .marks").element_handle()
    page.page.evaluate(HEIGHTS)
    page.page.set_viewport_size({"width": 1290, "height": 900})
    page.page.wait_for_function("drawing => !drawing.isConnected", arg=last)
    page.page.wait_for_selector("#chart-against-eps .marks")
    heights = page.page.evaluate("heights")
    assert len(heights) > 5
    assert min(heights) > max(heights) - 100


SORT = """(table) => [...table.tHead.rows[0].cells].map((heading, column) => {
    const keys = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.value);
    const pressed = [keys()], marks = [];
    for (const time of [1, 2]) {
        heading.querySelector("button").click();
        pressed.push(keys());
        marks.push([...table.tHead.rows[0].cells].map((other) => other.getAttribute("aria-sort")));
    }
    return [...pressed, marks];
})"""


def test_every_column_sorts_up_and_down(page: Shown) -> None:
    tables = page.page.locator("section[id] table:has(thead)")
    checked = 0
    for table in tables.all():
        for column, (before, up, down, marks) in enumerate(table.evaluate(SORT)):
            for found, direction, marked in zip((up, down), ("ascending", "descending"), marks, strict=True):
                assert marked == [direction if k == column else None for k in range(len(marked))]
                assert sorted(found) == sorted(before)
                known = [key for key in found if key]
                assert found == known + [""] * (len(found) - len(known)), "gaps go last"
                if all(re.fullmatch(r"[-+\d.e]+", key) for key in known):
                    numbers = list(map(float, known))
                    assert numbers == sorted(numbers, reverse=direction == "descending")
                    checked += len(set(numbers)) > 2
    assert checked > 10
    differences = [number(cell.split()[0]) for cell in cells(page, "paired-model-norm", 3)]
    page.page.locator("#paired-model-norm th button").nth(3).evaluate("button => button.click()")
    assert len({difference for difference in differences if difference < 0}) > 1
    shown = [number(cell.split()[0]) for cell in cells(page, "paired-model-norm", 3)]
    assert shown == sorted(differences)


def cells(page: Shown, anchor: str, column: int) -> list[str]:
    return page.page.locator(f"#{anchor} tbody td:nth-child({column + 1})").all_text_contents()


def test_numbers_sort_as_numbers_names_naturally_and_by_keyboard(browser: Browser, workplace: Path) -> None:
    runs = []
    for seed, epochs in ((10, 9), (2, 100), (1, None), (33, 10)):
        trainer = {"trainer": {} if epochs is None else {"max_epochs": epochs}}
        runs.append(write_run(workplace / "sorted" / f"run{seed}", seed=seed, settings=trainer, robustness=False))
    with browser.open(write_report(runs, workplace / "sorted.html")) as page:
        headings = page.page.locator("#settings th").all_text_contents()
        column, button = headings.index("max_epochs"), page.page.locator("#settings th button", has_text="max_epochs")
        button.focus()
        page.page.keyboard.press("Enter")
        assert cells(page, "settings", column) == ["9", "10", "100", "–"]
        page.page.keyboard.press("Space")
        assert cells(page, "settings", column) == ["100", "10", "9", "–"]
        assert button.evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
        page.page.locator("#geometry th button").first.click()
        names = cells(page, "geometry", 0)
        assert [re.search(r"max_epochs (\S+),", name)[1] for name in names] == ["–", "9", "10", "100"]


NASTY = "</title><img src=x onerror=alert(1)>&\"'`${1}\\"
CLOSING = "</script><b>x</b><!--<script>"


def test_whatever_names_hold_is_text(browser: Browser, workplace: Path) -> None:
    settings = {"note": CLOSING, NASTY: NASTY}
    folder = write_run(workplace / CLOSING.replace("/", "|") / NASTY.replace("/", "|"), settings=settings)
    logger = RecordLogger(str(folder.parent.parent), folder.parent.name, folder.name)
    logger.log_layers({"norm_growth/weight_norm": {CLOSING: 1.25, NASTY: 2.5}}, step=100)
    logger.log_image("robustness/examples", [np.zeros((4, 4, 3), np.uint8)], caption=[NASTY])
    logger.finalize("success")
    with browser.open(write_report(folder, workplace / "nasty.html", title=NASTY, layers=["*"])) as page:
        assert page.page.locator("h1").text_content() == NASTY
        assert page.page.title() == f"{NASTY} · normgeo"
        assert page.page.locator("main b, [onerror]").count() == 0
        assert page.page.locator("figcaption").text_content() == NASTY
        for layer, value in ((CLOSING, 1.25), (NASTY, 2.5)):
            page.choose(layer)
            (point,) = page.drawn("norms")
            assert (point["layer"], point["value"]) == (layer, value)


ACTING = "\u2028\u2029\u202egnp\x1b[31m\x9b\ud800'`${1}</script>"


def test_names_that_end_lines_of_scripts_break_no_figure(browser: Browser, workplace: Path) -> None:
    runs = []
    for k in range(2):
        own = {f"w{ACTING}": f"{k}{ACTING}", "model": {"norm": f"n{k}{ACTING}"}}
        runs.append(write_run(workplace / "acting" / str(k), settings=own))
        logger = RecordLogger(str(workplace), "acting", str(k))
        logger.log_layers({"norm_growth/weight_norm": {f"conv{ACTING}": 1.5 + k}}, step=100)
        rows = [{**row, "attack": f"{row['attack']}{ACTING.replace('/', '|')}"} for row in evaluated(runs[-1])]
        logger.log_results("robustness", {"settings": {}, "results": rows, "not_evaluated": {ACTING: ACTING}})
        logger.finalize("success")
    with browser.open(write_report(runs, workplace / "acting.html", title=ACTING, layers=["conv*"])) as page:
        assert page.page.locator("text=This figure cannot be drawn").count() == 0
        for anchor in page.anchors():
            assert page.page.locator(f"#chart-{anchor} svg.marks").count() == 1, anchor
        page.choose(plain(f"conv{ACTING}".replace("\ud800", "?")))  # a lone surrogate has no UTF-8 encoding
        assert sorted(point["value"] for point in page.drawn("norms")) == [1.5, 2.5]
        assert {text for text in page.page.inner_text("body") if not text.isprintable()} <= {"\n", "\t", "\xa0"}


def evaluated(run: Path) -> list[dict[str, Any]]:
    return read_record(run).results["robustness"]["results"]


def test_unlike_runs_fit_the_screen(browser: Browser, workplace: Path) -> None:
    runs = []
    for k in range(5):
        own = {f"setting_{k}_{i}": f"a long value {i} " * 6 for i in range(9)} | {"arch": f"a-network-{k}" * 4}
        name = f"a-folder-with-quite-a-long-name-for-a-run-{k}" * 2
        runs.append(write_run(workplace / "unlike" / name, norm=["bn", "gn"][k % 2], seed=k, settings=own))
    with browser.open(write_report(runs, workplace / "unlike.html")) as page:
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for table in page.page.locator(".scroll").all():
            assert table.evaluate("s => s.scrollWidth <= s.clientWidth"), table.inner_text()[:200]
        names = cells(page, "geometry", 0)
        assert len(set(names)) == 5
        assert max(map(len, names)) <= 60
        assert len(cells(page, "settings", 0)) == 5 * 9 + 4  # settings of single runs, arch, norm, seed, and the state


@pytest.mark.parametrize(
    ("options", "anchors"),
    [
        ({}, {*CURVES, *RATIOS, *WITHOUT_LAYERS}),
        ({"robustness": False, "ended": False}, {*CURVES, *RATIOS, "loss", "orthogonality-layers"}),
        ({"geometry": False}, {"accuracies", "against-eps"}),
        ({"geometry": False, "robustness": False}, set()),
        ({"steps": [0]}, {*CURVES, *RATIOS, *WITHOUT_LAYERS} - {"loss"}),
    ],
    ids=["one run", "killed", "no monitors", "nothing", "one step"],
)
def test_any_single_run(browser: Browser, workplace: Path, options: dict[str, Any], anchors: set[str]) -> None:
    folder = write_run(workplace / "runs" / re.sub(r"\W+", "_", str(options)), **options)
    with browser.open(write_report(folder)) as page:
        assert set(page.anchors()) == anchors
        for anchor in anchors:
            assert page.drawn(anchor), anchor
            page.hover(anchor)


def test_saving_a_figure(browser: Browser, study_report: Path, tmp_path: Path) -> None:
    with browser.open(study_report, color_scheme="dark") as page:
        card = page.page.locator("#norms")
        before = card.bounding_box()
        card.get_by_label("Save this figure").click()
        menu = card.locator(".vega-actions")
        inside, around = menu.bounding_box(), card.bounding_box()
        assert (around["width"], around["height"]) == (before["width"], before["height"])
        assert around["x"] <= inside["x"]
        assert inside["x"] + inside["width"] <= around["x"] + around["width"]
        assert inside["y"] + inside["height"] <= around["y"] + around["height"]
        files = {}
        for form in ("SVG", "PNG"):
            with page.page.expect_download() as download:
                menu.get_by_text(form).click()
            assert download.value.suggested_filename == f"norms.{form.lower()}"
            files[form] = tmp_path / form
            download.value.save_as(files[form])
        svg = files["SVG"].read_text(encoding="utf-8")
        assert "training step" in svg
        assert 'fill="#1d2430"' in svg, "dark text for paper, whatever the screen"
        assert files["PNG"].read_bytes().startswith(b"\x89PNG")
