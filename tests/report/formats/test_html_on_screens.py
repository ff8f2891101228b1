"""The HTML report on a phone, in dark mode, in print, and with assistive technology."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.report import write_report
from lightning_normgeo.report.figures.figure import COLORS
from support.browser import PHONE, Browser, Shown, contrast

READABLE, VISIBLE, SMALLEST = 4.5, 3, 11
"""Minimal contrast of text and of graphics (WCAG 2, AA), and minimal size in pixels."""
PRINTED = {"width": 1031, "height": 300}
"""Width of an A4 page without its margins."""
INSIDE = """() => [...document.querySelectorAll(".marks text, .marks .role-axis-domain line")].filter((part) => {
    const { left, right } = part.getBoundingClientRect(), svg = part.closest(".marks").getBoundingClientRect();
    return left < svg.left - 1 || right > svg.right + 1;
}).map((part) => part.textContent)"""
WIDER = """() => [...document.querySelectorAll("body *")].filter((element) =>
    element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 1
).map((element) => element.outerHTML.slice(0, 80))"""


def hard_to_read(page: Shown) -> list[str]:
    texts = page.texts()
    assert len(texts) > 200
    found = [(text, contrast(text["color"], text["behind"])) for text in texts]
    return [f"{text['text']!r}: {ratio:.2f}" for text, ratio in found if ratio < READABLE]


def brightness(page: Shown, selector: str, name: str) -> float:
    """Return the contrast of a color with black, from 1 to 21."""
    style = page.page.locator(selector).first.evaluate("(e, name) => getComputedStyle(e)[name]", name)
    return contrast(style, "rgb(0, 0, 0)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_also_when_the_scheme_changes(browser: Browser, study_report: Path, scheme: str) -> None:
    with browser.open(study_report, color_scheme=scheme) as page:
        for shown in (scheme, "dark" if scheme == "light" else "light"):
            page.page.emulate_media(color_scheme=shown)
            page.hover("norms")  # the tooltip has colors of its own
            page.page.get_by_label("Save this figure").first.click()
            assert hard_to_read(page) == []
            ends = (brightness(page, "body", "backgroundColor"), brightness(page, "#norms text", "fill"))
            assert (ends[0] < 2, ends[1] > 10) == ((shown == "dark"),) * 2
            page.page.keyboard.press("Escape")
            page.page.get_by_label("Save this figure").first.click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_stand_out(browser: Browser, study_report: Path, scheme: str) -> None:
    with browser.open(study_report, color_scheme=scheme) as page:
        behind = page.page.locator("#terms").evaluate("(e) => getComputedStyle(e).backgroundColor")
    for color in COLORS:
        red, green, blue = bytes.fromhex(color.removeprefix("#"))
        assert contrast(f"rgb({red}, {green}, {blue})", behind) > VISIBLE, color


@pytest.mark.parametrize(
    ("runs", "width"), [(4, 360), (4, 390), (4, 414), (4, 800), (4, 1300), (1, 390), (1, 1300)], ids=str
)
def test_everything_fits(browser: Browser, study_report: Path, runs: int, width: int) -> None:
    file = study_report if runs > 1 else write_report(next(study_report.parent.glob("*/")))
    options = {**PHONE, "viewport": {"width": width, "height": 844}} if width < 500 else {}
    with browser.open(file, **{"viewport": {"width": width, "height": 900}, **options}) as page:
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for chart in page.page.locator(".chart").all():
            shown, drawn = chart.evaluate("chart => [chart.clientWidth, chart.scrollWidth]")
            assert drawn <= shown, chart.get_attribute("id")
        assert page.page.evaluate(INSIDE) == [], "cut off"
        filled = page.page.evaluate(
            "[...document.querySelectorAll('svg.marks')].map(s => s.clientWidth / s.closest('.chart').clientWidth)"
        )
        assert min(filled) > 0.95
        assert min(text["size"] for text in page.texts()) >= SMALLEST


def test_table_on_a_phone_scrolls_beside_its_first_column(browser: Browser, study_report: Path) -> None:
    with browser.open(study_report, **PHONE) as page:
        scroller = page.page.locator("#geometry .scroll")
        scroller.scroll_into_view_if_needed()
        assert scroller.evaluate("s => s.scrollWidth > s.clientWidth + 100")
        first = scroller.locator("td").first
        before, text = first.bounding_box(), scroller.locator("td").nth(1).bounding_box()
        scroller.evaluate("s => { s.scrollLeft = s.scrollWidth; }")
        page.settle()
        after = first.bounding_box()
        assert (after["x"], after["width"]) == (before["x"], before["width"])
        assert before["width"] <= 0.45 * 390
        assert scroller.locator("td").nth(1).bounding_box()["x"] < text["x"] - 100
        last = scroller.locator("tr").nth(1).locator("td").last.bounding_box()
        assert last["x"] + last["width"] <= 390
        top = page.page.evaluate("({x, y}) => document.elementFromPoint(x + 20, y + 10).cellIndex", after)
        assert top == 0, "the other columns go behind the first"


def test_phone_scrolls_over_figures_with_the_choice_at_hand(browser: Browser, study_report: Path) -> None:
    with browser.open(study_report, **PHONE) as page:
        page.page.locator("#norms").scroll_into_view_if_needed()
        box, place = page.page.locator("#chart-norms").bounding_box(), page.page.evaluate("scrollY")
        swipe(page, box["x"] + box["width"] / 2, min(box["y"] + 60, 700), 280)
        page.page.wait_for_function("place => scrollY > place + 150", arg=place)
        bar = page.page.locator(".choice").bounding_box()
        assert (round(bar["y"]), bar["height"] < 60) == (0, True)


def swipe(page: Shown, x: float, y: float, distance: float) -> None:
    session = page.page.context.new_cdp_session(page.page)
    for kind, points in [("Start", [0.0]), *(("Move", [distance * k / 14]) for k in range(1, 15)), ("End", [])]:
        touched = [{"x": x, "y": y - moved} for moved in points]
        session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touched})


def test_tap_shows_values(browser: Browser, study_report: Path) -> None:
    def tap() -> dict[str, Any]:
        page.page.evaluate("document.getElementById('chart-norms').scrollIntoView({block: 'center'})")
        page.settle()
        point = next(point for point in page.drawn("norms") if point["on_top"] and point["step"] == 29)
        page.page.touchscreen.tap(point["x"] + 4, point["y"] - 9)  # minimal width of touch targets
        tooltip.wait_for()
        return point

    with browser.open(study_report, **PHONE) as page:
        tooltip = page.page.locator("#vg-tooltip-element.visible")
        point = tap()
        assert point["run"] in tooltip.text_content()
        assert f"{point['value']:.4g}" in tooltip.text_content()
        around = tooltip.bounding_box()
        assert around["x"] >= 0
        assert around["x"] + around["width"] <= 390
        page.page.locator("#norms h2").tap()
        tooltip.wait_for(state="detached")
        tap()
        swipe(page, 200, 700, 100)
        tooltip.wait_for(state="detached")
        assert page.page.get_by_text("Tap a curve").is_visible()
        assert page.page.get_by_text("Shift and wheel").is_hidden()


def test_print_is_light_and_whole(browser: Browser, study_report: Path) -> None:
    with browser.open(study_report, color_scheme="dark") as page:
        page.page.locator("summary", has_text="Settings of the evaluation").click()
        drawing = page.page.locator("#chart-norms .marks").element_handle()
        page.page.emulate_media(media="print")
        page.page.set_viewport_size(PRINTED)
        page.page.wait_for_timeout(300)  # longer than the delay after which a page redraws on a screen
        assert drawing.evaluate("drawing => drawing.isConnected")
        assert page.page.evaluate(WIDER) == []
        assert page.page.evaluate(INSIDE) == []
        assert hard_to_read(page) == []
        assert brightness(page, "body", "backgroundColor") == pytest.approx(21)
        assert brightness(page, "#norms", "backgroundColor") == pytest.approx(21)
        assert brightness(page, "#norms text", "fill") < 2
        assert page.page.locator(".choice, .chart summary").first.is_hidden()
        shown = [details.is_visible() for details in page.page.locator("main details:not(.chart details)").all()]
        assert shown == [False, True, False, False], "open settings are printed, what is closed is not"
        assert page.page.get_by_text("threat.eps", exact=True).is_visible()
        for scroller in page.page.locator(".scroll").all():
            assert scroller.evaluate("s => s.scrollHeight <= s.clientHeight + 1 && s.scrollWidth <= s.clientWidth + 1")


def test_pdf(browser: Browser, study_report: Path, tmp_path: Path) -> None:
    with browser.open(study_report, color_scheme="dark") as page:
        raw = page.page.pdf(prefer_css_page_size=True)
        sheets = [
            tuple(round(float(x)) for x in sheet) for sheet in re.findall(rb"/MediaBox \[0 0 (\S+) ([^]]+)]", raw)
        ]
        assert len(sheets) > 4
        assert set(sheets) == {(842, 595)}
        page.choose("model.layer1.0.conv1")
        page.page.emulate_media(media="print")
        printed = "getComputedStyle(document.querySelector('.figures'), '::before').content"
        assert "Layer: " in page.page.evaluate(printed)
        assert page.page.locator(".figures").get_attribute("data-layer") == "model.layer1.0.conv1"
        page.page.emulate_media(media="screen")
        assert brightness(page, "body", "backgroundColor") < 2, "the screen stays as it was"
        assert page.page.locator("svg.marks").count() == len(page.anchors())


def test_names_for_those_who_do_not_see_figures(browser: Browser, study_report: Path) -> None:
    with browser.open(study_report) as page:
        for anchor in page.anchors():
            title = page.page.locator(f"#{anchor} h2").text_content()
            figure = page.page.get_by_role("img", name=title, exact=True)
            assert figure.count() == 1, title
            caption = figure.evaluate("f => document.getElementById(f.getAttribute('aria-describedby')).textContent")
            assert caption == page.page.locator(f"#{anchor} .caption").text_content()
            assert page.page.locator(f"#{anchor} svg [role^=graphics]").count() == 0, "marks without names"
        page.page.locator("#verdicts summary").click()
        for table in page.page.locator("section:has(> .scroll thead)[id]").all():
            title = table.locator("h2").text_content()
            assert page.page.get_by_role("table", name=title, exact=True).count() == 1
        assert page.page.get_by_role("combobox", name="Layer").count() == 1
        assert page.page.locator("h1").count() == 1
