"""Pages in headless Chromium, without a network, recording all requests and complaints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: install the extra `test`")

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESK = {"viewport": {"width": 1300, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

_DRAWN = """(anchor) => {
    const marks = document.querySelectorAll(`#chart-${anchor} .mark-symbol.role-mark path`);
    return [...marks].map((mark) => {
        const { left, right, top, bottom } = mark.getBoundingClientRect();
        const x = (left + right) / 2, y = (top + bottom) / 2;
        return { ...mark.__data__.datum, x, y, on_top: document.elementFromPoint(x, y) === mark };
    });
}"""
_LABELS = """(anchor) => [...document.querySelectorAll(`#chart-${anchor} .role-axis-label text`)].map(
    (label) => [label.textContent, label.transform.baseVal[0].matrix.e < 0 ? "y" : "x"])"""
_SHAPES = """(anchor) => [...document.querySelectorAll(`#chart-${anchor} .mark-line.role-mark path`)].map(
    (line) => line.getAttribute("d"))"""
_TOOLTIP = """() => [...document.querySelectorAll("#vg-tooltip-element tr")].map(
    (row) => [...row.cells].map((cell) => cell.textContent))"""
_TEXTS = """() => {
    const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
        if (!text || element.closest("script, style, option, noscript") || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        let behind = element;
        while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        found.push({
            text,
            color: element instanceof SVGElement ? style.fill : style.color,
            behind: behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)",
            size: parseFloat(style.fontSize),
        });
    }
    return found;
}"""


class Shown:
    """A page that is open, with all its figures drawn unless the query says otherwise.

    Attributes:
        page: the page of playwright.
        requests: the addresses that it requested.
        complaints: errors, warnings and dialogs.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        page.wait_for_selector("body[data-drawn=yes]", state="attached")

    def anchors(self) -> list[str]:
        """Return the names of the figures."""
        return self.page.evaluate("[...document.querySelectorAll('.chart')].map((place) => place.id.slice(6))")

    def drawn(self, anchor: str) -> list[dict[str, Any]]:
        """Return the data of a figure's points, their positions, and whether the pointer can reach them."""
        return self.page.evaluate(_DRAWN, anchor)

    def shapes(self, anchor: str) -> list[str]:
        """Return the shapes of a figure's lines."""
        return self.page.evaluate(_SHAPES, anchor)

    def labels(self, anchor: str, axis: str = "xy") -> list[str]:
        """Return the numbers at a figure's axes."""
        return sorted(text for text, of in self.page.evaluate(_LABELS, anchor) if of in axis)

    def hover(self, anchor: str, **wanted: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Move the pointer to a point that no other point covers; return its data and the tooltip by name."""
        self.page.mouse.move(1, 1)
        self.page.evaluate(
            "anchor => document.getElementById('chart-' + anchor).scrollIntoView({block: 'center'})", anchor
        )
        for point in self.drawn(anchor):
            if point["on_top"] and wanted.items() <= point.items():
                self.page.mouse.move(point["x"], point["y"])
                self.page.wait_for_selector("#vg-tooltip-element.visible")
                return point, {name.rstrip(":"): value for name, value in self.page.evaluate(_TOOLTIP)}
        raise AssertionError(f"{anchor} has no point {wanted} that the pointer can reach")

    def choose(self, layer: str) -> None:
        """Choose a layer, and wait until all figures show it."""
        self.page.select_option("#layer", layer)
        self.page.wait_for_function("(layer) => document.body.dataset.layer === layer", arg=layer)

    def settle(self) -> None:
        """Wait until the effect of the last event is drawn, which may be in the next frame."""
        self.page.evaluate(
            "new Promise((done) => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 60))"
        )

    def texts(self) -> list[dict[str, Any]]:
        """Return every visible text with its color, its background and its size."""
        return self.page.evaluate(_TEXTS)


class Browser:
    """A running Chromium.

    Args:
        chromium: the browser object of playwright.
    """

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium

    @contextmanager
    def open(self, file: Path, query: str = "?all", **options: Any) -> Iterator[Shown]:
        """Open a file without a network; at the end, check that it made no requests and no complaints.

        Args:
            file: the page.
            query: end of the address. Default: all figures are drawn at once, not only those near the screen.
            options: of the browser's context.
        """
        context = self._chromium.new_context(offline=True, **{**DESK, **options})
        address = file.absolute().as_uri() + query
        try:
            shown = Shown(context.new_page(), address)
            yield shown
            asked = [url for url in shown.requests if not url.startswith(("data:", "blob:"))]
            assert [url.partition("#")[0] for url in asked] == [address.partition("#")[0]], asked
            assert not shown.complaints, shown.complaints
        finally:
            context.close()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the system's Chromium, else playwright's own; if neither is installed the test is skipped."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=_ARGUMENTS)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium that starts; try `playwright install chromium` ({str(error).splitlines()[0]})")
        yield Browser(browser)
        browser.close()


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colors, 1 to 21 (WCAG 2)."""
    brighter, darker = sorted(map(_luminance, (one, other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(color: str) -> float:
    channels = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
