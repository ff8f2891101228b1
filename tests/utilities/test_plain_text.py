"""Texts from untrusted sources stay plain text in terminals, spreadsheets, Markdown, LaTeX and figures."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from lightning_normgeo.__main__ import main
from lightning_normgeo.report.compared_runs import compare_runs
from lightning_normgeo.report.formats.latex import latex_escaped
from lightning_normgeo.report.formats.text import as_csv, as_markdown
from lightning_normgeo.report.tables.table import Table, text
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.summary import summary_table
from lightning_normgeo.study.definition import Study
from lightning_normgeo.study.display import ProgressDisplay, failures, listing
from lightning_normgeo.study.study_index import Index
from lightning_normgeo.utilities.plain_text import plain, plain_line
from support.latex import check_latex

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.\u2066\u2028\u2029\x00\r\x7f\ud800"
MARKUP = "[red]x[/red] [link=file:///etc/passwd]y[/link] [/] [bold"
ANY = st.text(st.characters(codec=None), max_size=30)
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


@PROPERTY
@given(ANY)
@example(HOSTILE)
def test_plain_text_acts_on_nothing(source: str) -> None:
    found = plain(source)
    assert not UNSEEN.search(found)
    assert found.encode("utf-8").decode() == found
    assert plain(found) == found
    assert "\n" not in plain_line(source)


@pytest.mark.parametrize(
    "source", ["layer1.0.conv1", "γ² − σ²", "日本語 名前", "می‌خواهم", "👩‍🔬 a", "two\nlines\tof", "é\u00a0x"]
)
def test_what_people_write_stays(source: str) -> None:
    assert plain(source) == source


def hostile(*names: str) -> Record:
    rows = [
        {"attack": name, "accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6, "accuracy_drop": 0.1, "correct": 5, "n": 10}
        for name in names
    ]
    missing = {name: f"because {name}" for name in names}
    return Record(Path("run"), results={"robustness": {"results": rows, "not_evaluated": missing}})


def on_terminal(*what: Any, **options: Any) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=200, color_system="truecolor", legacy_windows=False
    )
    for one in what:
        console.print(one, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_summary_shows_names_as_they_are() -> None:
    shown = on_terminal(summary_table(hostile(HOSTILE, MARKUP)))
    styles = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert not UNSEEN.search(styles)
    assert "\x1b]8" not in shown, "no link"
    assert MARKUP in styles.replace("\n", "")


def test_a_study_shows_names_as_they_are(tmp_path: Path) -> None:
    study = Study("s", {MARKUP.replace("/", "|"): [1], "x": ["a"]}, save_dir=str(tmp_path))
    index = Index(study)
    (entry,) = index.entries
    entry.name, entry.status, entry.error = f"{entry.name}{HOSTILE}", "failed", HOSTILE + MARKUP
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    display = ProgressDisplay(console)
    display._tasks[entry.name] = display._progress.add_task(entry.name, total=1.0, text="")
    display.update(entry, type("RunProgress", (), {"accuracy": None})())
    shown = on_terminal(listing(index)) + on_terminal(*failures(index), markup=False)
    shown += console.file.getvalue()  # type: ignore[attr-defined]
    assert not UNSEEN.search(re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown))
    assert "\x1b]" not in shown


def test_an_error_names_what_was_given_as_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "\x1b[31m\u202enope")])
    said = capsys.readouterr().err
    assert "\\x1b[31m\\u202enope does not exist" in said
    assert not UNSEEN.search(said)


# --- tables for spreadsheets ------------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+A1", "-2+3", "@SUM(1)", "\tx", "\rx", "=cmd|' /C calc'!A0", "-", "--x", "＝1", "\n=1", "=", "+ 1"]
NUMBERS = ["-0.5", "+1e-3", "-inf", "12", "-1", "1e5"]


def cells(*values: str) -> list[dict[str, str]]:
    """Return the lines of a CSV file of runs that differ in a setting and an attack."""
    records = []
    for k, value in enumerate(values):
        record = hostile("clean")
        record.folder, record.settings = Path(f"r{k}"), {"x": value, "y": k}
        records.append(record)
    return list(csv.DictReader(io.StringIO(as_csv(compare_runs(records)))))


def test_no_cell_is_a_formula_and_numbers_stay_numbers() -> None:
    found = [row["x"] for row in cells(*FORMULAS, *NUMBERS)]
    assert all(cell.startswith("'") or cell[0] == '"' for cell in found[: len(FORMULAS)]), found
    assert found[len(FORMULAS) :] == NUMBERS


@PROPERTY
@given(
    st.lists(
        st.text(st.sampled_from("=+-@\t\r\n '\"a1.,;|＝\x1b\u2028"), min_size=1, max_size=6), min_size=2, max_size=4
    )
)
def test_no_text_becomes_a_formula(values: list[str]) -> None:
    for row in cells(*values):
        for cell in row.values():
            try:
                float(cell)
            except ValueError:
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝")), cell
            assert not UNSEEN.search(cell)


def test_names_of_columns_are_no_formulas() -> None:
    records = [hostile("clean"), hostile("clean")]
    for k, record in enumerate(records):
        record.folder, record.settings = Path(f"r{k}"), {"=HYPERLINK(1)": k}
    head = next(csv.reader(io.StringIO(as_csv(compare_runs(records)))))
    assert "'=HYPERLINK(1)" in head


# --- Markdown and LaTeX -----------------------------------------------------------------------------------------------


class Parts(HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self._cell: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag in ("td", "h1"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "h1"):
            self.cells.append("".join(self._cell or ()))

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
STRUCTURE = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td"}
MARKS = st.text(st.sampled_from("ab _*`~<>[]()!|\\&;#+-=.:/'\"$^{}\n\t1é\x1b\u2028"), max_size=16)


@PROPERTY
@given(MARKS)
@example("![x](http://a/b.png)")
@example("<script>alert(1)</script>")
@example("[a]: http://b")
@example("a\\|b | c")
@example("~~x~~ ~y~ __z__ **w** `v` &lt; \\")
def test_markdown_shows_any_text_as_it_is(source: str) -> None:
    name = plain_line(source)
    table = Table("t", "Title", "Caption.", ["x", "y"], [[text(name), text("end")]])
    parts = Parts(MARKDOWN.render(as_markdown("Report", [table])))
    assert parts.tags <= STRUCTURE
    assert parts.cells == ["Report", name, "end"]


@PROPERTY
@given(ANY)
@example(r"\input{/etc/passwd} \write18{id} \catcode`\@=0 @input %")
@example("\\\\end{document}^^5cinput ^^M")
@example(HOSTILE)
def test_latex_runs_no_text(source: str) -> None:
    check_latex(latex_escaped(source))
