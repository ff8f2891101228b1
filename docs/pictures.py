"""Draws every picture of the documentation from studies that anyone can run, and records the numbers of its texts.

``python docs/pictures.py runs/paper_small runs/paper_resnet18 runs/effective_weights runs/cumulative runs/quickstart``
reads any of these studies and runs, and writes

- paper_small: docs/records/paper_small.json, the picture of the README, and a picture of the report;
- paper_resnet18: docs/records/paper_resnet18.json, docs/reference/gallery.md, and the pictures of that page and of the
  callbacks;
- channels (docs/records/channels.yaml): docs/records/channels.json, the picture and the numbers of
  docs/callbacks/channels.md;
- effective_weights (docs/records/effective_weights.yaml): docs/records/effective_weights.json, for the tables of the
  page of effective weights;
- cumulative (docs/records/cumulative.yaml): the picture of the sums over all steps;
- quickstart (``normgeo fit --config quickstart --run runs/quickstart``): docs/records/quickstart.txt, its summary.

Without an argument it draws the picture of the README from its record. A picture of the report needs playwright and
Chromium. Tests compare the numbers in the texts with the records.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gallery
import overview
from PIL import Image
from recorded_numbers import channel_numbers, effective_numbers, finished, gallery_numbers, overview_numbers

import channels
from lightning_normgeo import summarize
from lightning_normgeo.report import write_report

DOCS = Path(__file__).resolve().parent
RECORDS, PICTURES = DOCS / "records", DOCS / "pictures"
REPORT = DOCS / "report.png"
GALLERY = (
    "orthogonality",
    "orthogonality-layers",
    "increments",
    "terms",
    "norms",
    "angles",
    "affine",
    "accuracies",
    "against-eps",
)
"""Figures of the report of paper_resnet18 that the documentation shows."""
_WIDTH, _HEIGHT, _COLORS = 1200, 1500, 64
_INNERMOST = re.compile(r"[\[{][^\[\]{}]*[\]}]")


def write_record(name: str, content: Mapping[str, Any]) -> Path:
    """Write the numbers of a study, each innermost list or dictionary on one line; return the file."""
    path = RECORDS / f"{name}.json"
    text = _INNERMOST.sub(lambda match: " ".join(match[0].split()), json.dumps(content, ensure_ascii=False, indent=1))
    path.write_text(f"{text}\n", encoding="utf-8")
    return path


def write_summary(run: Path) -> Path:
    """Write the summary of a run, without the line that names its folder; return the file."""
    path = RECORDS / f"{run.name}.txt"
    lines = [line.rstrip() for line in str(summarize(run)).splitlines() if not line.startswith("record:")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def figures(runs: Sequence[Path], names: Sequence[str]) -> Iterator[Path]:
    """Draw figures of runs with few colors, which makes small files; yield these."""
    with TemporaryDirectory() as folder:
        write_report(runs, folder, form="png")
        for name in names:
            yield on_paper(Path(folder, f"{name}.png"), PICTURES / f"{name}.png")


def on_paper(figure: Path, path: Path) -> Path:
    """Save a figure on white with few colors, which makes a small file; return the file."""
    with Image.open(figure) as picture:
        paper = Image.new("RGB", picture.size, "white")
        paper.paste(picture, mask=picture.getchannel("A"))
        paper.quantize(_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def photograph(study: Path) -> Path:
    """Take a picture of the upper part of a study's report in a browser; return the file."""
    from playwright.sync_api import sync_playwright

    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = write_report(study, Path(folder, "report.html"))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-drawn=yes]", state="attached")
        tab.screenshot(path=REPORT)
        browser.close()
    return REPORT


def update(study: Path) -> Iterator[Path]:
    """Write everything that the documentation has from a study; yield the files."""
    index = study / "study.json"
    name = json.loads(index.read_text(encoding="utf-8"))["name"] if index.exists() else study.name
    match name:
        case "paper_small":
            numbers = overview_numbers(study)
            yield write_record(name, numbers)
            yield from overview.draw(numbers)
            yield photograph(study)
        case "paper_resnet18":
            yield write_record(name, gallery_numbers(study))
            yield from figures(finished(study), GALLERY)
            gallery.PAGE.write_text(gallery.page(), encoding="utf-8")
            yield gallery.PAGE
        case "channels":
            yield write_record(name, channel_numbers(study))
            channels.PAGE.write_text(channels.page(), encoding="utf-8")
            yield channels.PAGE
            yield from figures([study], ["channels"])
        case "effective_weights":
            yield write_record(name, effective_numbers(study))
        case "cumulative":
            yield from figures(finished(study), ["cumulative"])
        case "quickstart":
            yield write_summary(study)
        case _:
            raise SystemExit(f"{study} is none of the studies and runs of the documentation")


def main(arguments: Sequence[str]) -> None:
    """Update the documentation from the given studies, or draw the README's picture from its record."""
    for study in arguments:
        for path in update(Path(study)):
            print(path.relative_to(DOCS.parent), flush=True)
    if not arguments:
        overview.draw(json.loads((RECORDS / "paper_small.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
