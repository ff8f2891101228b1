"""The HTML report draws figures when they come near the screen, and all of them for paper; nothing moves meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.browser import PHONE, Browser, Shown

CONVOLUTION = "model.layer1.0.conv1"
DRAWN = "[...document.querySelectorAll('.chart')].filter((c) => c.querySelector('.marks')).map((c) => c.id.slice(6))"
PLACES = "[...document.querySelectorAll('section[id]')].map((s) => [s.id, s.getBoundingClientRect().top + scrollY])"


def drawn(page: Shown) -> list[str]:
    return page.page.evaluate(DRAWN)


def places(page: Shown) -> dict[str, float]:
    return dict(page.page.evaluate(PLACES))


def wait_for(page: Shown, anchor: str) -> None:
    page.page.wait_for_selector(f"#chart-{anchor} .marks")


def test_figures_are_drawn_when_they_come_near(browser: Browser, study_report: Path) -> None:
    with browser.open(study_report, "") as page:
        before = drawn(page)
        assert "against-eps" not in before
        page.page.locator("#against-eps").scroll_into_view_if_needed()
        wait_for(page, "against-eps")
        assert "norms" not in drawn(page), "nor those on the way"


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
def test_nothing_moves_when_figures_are_drawn(browser: Browser, study_report: Path, options: dict[str, Any]) -> None:
    with browser.open(study_report, "", **options) as page:
        before = places(page)
        assert len(drawn(page)) < len(page.anchors())
    with browser.open(study_report, **options) as page:
        assert drawn(page) == page.anchors()
        moved = {name: round(place - before[name]) for name, place in places(page).items()}
        assert max(map(abs, moved.values())) <= 4, moved


def test_a_link_leads_to_a_figure_that_stays_where_it_is(browser: Browser, study_report: Path) -> None:
    with browser.open(study_report, "#angles") as page:
        wait_for(page, "angles")
        assert 0 <= page.page.locator("#angles").bounding_box()["y"] < 80
        page.page.locator("nav a[href='#orthogonality']").evaluate("link => link.click()")
        wait_for(page, "orthogonality")
        page.settle()
        assert 0 <= page.page.locator("#orthogonality").bounding_box()["y"] < 80


def test_figures_drawn_later_have_the_chosen_layer(browser: Browser, study_report: Path) -> None:
    with browser.open(study_report, "") as page:
        assert "orthogonality" not in drawn(page)
        page.choose(CONVOLUTION)
        assert page.page.locator("#none-affine").is_visible(), "at once, so that nothing moves"
        page.page.locator("#orthogonality").scroll_into_view_if_needed()
        wait_for(page, "orthogonality")
        assert {point["layer"] for point in page.drawn("orthogonality")} == {CONVOLUTION}
        page.choose("all layers")
        page.page.locator("#affine").scroll_into_view_if_needed()
        wait_for(page, "affine")


def test_paper_has_all_figures(browser: Browser, study_report: Path) -> None:
    with browser.open(study_report, "") as page:
        assert len(drawn(page)) < len(page.anchors())
        page.page.evaluate("addEventListener('beforeprint', () => setTimeout(() => { window.printed = true; }))")
        page.page.evaluate(f"addEventListener('afterprint', () => {{ window.onPaper = {DRAWN}; }})")
        page.page.pdf(prefer_css_page_size=True)
        page.page.wait_for_function("window.onPaper")
        assert page.page.evaluate("window.onPaper") == page.anchors()


def test_without_an_observer_all_figures_are_drawn(browser: Browser, study_report: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.html"
    script = "<script>delete window.IntersectionObserver;</script><main>"
    old.write_text(study_report.read_text(encoding="utf-8").replace("<main>", script, 1), encoding="utf-8")
    with browser.open(old, "") as page:
        assert drawn(page) == page.anchors()
