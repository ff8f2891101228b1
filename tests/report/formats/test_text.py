"""Reports as text: tables can be read back from Markdown and LaTeX, and exact numbers from the CSV."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo.report.compared_runs import Run, load_runs
from lightning_normgeo.report.formats.latex import latex_escaped
from lightning_normgeo.report.formats.text import as_csv, as_latex, as_markdown
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.tables.table import Table, number, text
from support import reference as ref
from support.evaluated_runs import MEASURED, N, correct, write_run
from support.latex import check_latex

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)
NASTY = [
    "a|b",
    "*x*",
    "_y_",
    "<b>",
    "`c`",
    "[u](v)",
    "\\d",
    "&lt;",
    "~~z~~",
    "two\nlines",
    "50 % & more_of #1 {x} $y$ ^~",
]


def study() -> list[Run]:
    cases = {"bn": ("bn", 0.0), "bn+wd": ("bn", 5e-4), "gn": ("gn", 0.0), "gn+wd": ("gn", 5e-4)}
    return load_runs([write_run(x, norm=norm, decay=wd, metrics=MEASURED) for x, (norm, wd) in cases.items()])


def one_table(*cells: str) -> Table:
    rows = [[text(cell), number(-1.5e-05, ".2g")] for cell in cells]
    return Table("an-anchor", "Title |x|", "Caption |γ² − σ²|.", ["‖W‖ of _all_", "n"], rows)


# --- Markdown ---------------------------------------------------------------------------------------------------------


def read_markdown(page: str) -> list[tuple[str, str, list[list[str]]]]:
    """Read titles, captions and cells as GitHub shows them."""

    def shown(source: str) -> str:
        return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", source)

    found = []
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, caption, drawn = part.strip().split("\n\n")
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in drawn.splitlines()]
        assert {len(line) for line in lines} == {len(lines[0])}
        assert all(re.fullmatch(r" ---:? ", mark) for mark in lines[1])
        cells = [[shown(cell.strip()) for cell in line] for line in (lines[0], *lines[2:])]
        found.append((shown(title), shown(caption), cells))
    return found


def test_markdown_has_every_cell():
    tables = all_tables(study())
    page = as_markdown("a study", tables)
    assert page.startswith("# a study\n\n## ")
    assert read_markdown(page) == [
        (table.title, table.caption, [table.columns, *([cell.text for cell in row] for row in table.rows)])
        for table in tables
    ]


def test_markdown_shows_special_characters_as_they_are():
    ((title, caption, cells),) = read_markdown(as_markdown("x", [one_table(*NASTY)]))
    assert (title, caption) == ("Title |x|", "Caption |γ² − σ²|.")
    assert [row[0] for row in cells] == ["‖W‖ of _all_", *(cell.replace("\n", " ") for cell in NASTY)]


def test_markdown_leaves_no_mark():
    page = as_markdown("_t_", [one_table(*NASTY, "bim_eps0.03")])
    for mark in ("*", "<", "`", "](", "&lt", "~~", " _", "_ "):
        assert not re.search(r"(?<!\\)" + re.escape(mark), page), mark
    assert "bim_eps0.03" in page, "an underscore inside a word is none"
    assert page.startswith("# \\_t\\_\n")


def test_numbers_are_on_the_right():
    page = as_markdown("x", [Table("a", "A", "B", ["c", "d"], [[text("e"), number(1)], [text("f"), text("")]])])
    assert "| --- | ---: |" in page


# --- LaTeX ------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.text(st.sampled_from("abW |‖γσ²³⁻₂∇−-–—…,'\"`<>[]{}()\\$%&#_^~/·×→é日𝛾€\n\t\x001e+.5")))
def test_any_text_is_escaped(source: str):
    check_latex(latex_escaped(source))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("‖W‖, first → last", r"$\| W\|$, first $\to$ last"),
        ("|γ² − σ²|, median", r"$|\gamma ^{2} - \sigma ^{2}|$, median"),
        ("γ²/σ²", r"$\gamma ^{2}/\sigma ^{2}$"),
        ("Σ η²‖∇W‖² (eq 16)", r"$\sum  \eta ^{2}\| \nabla W\| ^{2}$ (eq 16)"),
        ("12.50 % [-1.00, +3.00]", r"12.50 \% [$-$1.00, +3.00]"),
        ("1.2e-05 and -3e+10", r"$1.2\times 10^{-5}$ and $-3\times 10^{10}$"),
        ("bim_eps1e-05", r"bim\_eps1e-05"),
        ("weight-decay 5-4", "weight-decay 5-4"),
        ("–", "--"),
        ("--x ,,", "-{}-x ,{},"),
        ("2 × W100", r"2 $\times$ W100"),
        ("Weights ∇ Weights", r"Weights $\nabla$ Weights"),
        ("x²³ a₁₂", "x$^{23}$ a$_{12}$"),
        ("² ³", "$^{2}{}^{3}$"),
        ("日", "[U+65E5]"),
        ("a\n  b", "a b"),
        ('don\'t "quote"', r"don't \textquotedbl{}quote\textquotedbl{}"),
    ],
)
def test_symbols_become_formulas(source: str, expected: str):
    found = latex_escaped(source)
    assert re.sub(r" +", " ", found) == re.sub(r" +", " ", expected)
    check_latex(found)


def read_latex(page: str) -> list[tuple[str, list[str]]]:
    """Return the columns' alignment and the lines of every table."""
    found = []
    for part in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", page, flags=re.DOTALL):
        alignment, top, *lines, bottom = part.strip().split("\n")
        assert (top, bottom, lines[1]) == (r"\toprule", r"\bottomrule", r"\midrule")
        found.append((alignment.strip("{}"), [lines[0], *lines[2:]]))
    return found


def test_latex_has_every_cell():
    tables = all_tables(study())
    page = as_latex("a study", tables)
    for environment in ("document", "table", "tabular"):
        assert page.count(f"\\begin{{{environment}}}") == page.count(f"\\end{{{environment}}}") > 0
    read = read_latex(page)
    assert len(read) == len(tables)
    for table, (alignment, lines) in zip(tables, read, strict=True):
        assert len(alignment) == len(table.columns)
        cells = [table.columns, *([cell.text for cell in row] for row in table.rows)]
        for line, row in zip(lines, cells, strict=True):
            assert line.endswith(r" \\")
            assert re.split(r"(?<!\\)&", line[:-3]) == [
                (" " if k else "") + latex_escaped(cell) + (" " if k < len(row) - 1 else "")
                for k, cell in enumerate(row)
            ]
            for cell in row:
                check_latex(latex_escaped(cell))
        assert f"\\label{{tab:{table.anchor}}}" in page
        assert latex_escaped(table.caption) in page
    assert all(ord(x) < 256 for x in page)


def test_latex_of_long_tables_is_continued():
    table = one_table(*(f"row {k}" for k in range(95)))
    read = read_latex(as_latex("x", [table]))
    assert [len(lines) for _, lines in read] == [41, 41, 16]
    assert [line.partition(" &")[0] for _, lines in read for line in lines[1:]] == [f"row {k}" for k in range(95)]
    page = as_latex("x", [table])
    assert page.count("(continued)") == 2
    assert page.count(r"\label") == 1


def test_rows_that_begin_like_an_option_are_none():
    _, lines = read_latex(as_latex("x", [one_table("[1pt]", "*", "日")]))[0]
    assert [line[:3] for line in lines[1:]] == ["{}[", "{}*", "{}["]


def test_table_without_rows_is_one():
    table = Table("a", "A", "Not paired.", ["x", "y"], [])
    assert read_latex(as_latex("x", [table])) == [("rr", [r"x & y \\"])]
    assert "Not paired" in as_markdown("x", [table])


def has_latex() -> bool:
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_latex(), reason="no LaTeX with booktabs")
def test_latex_compiles():
    printable = "".join(chr(k) for k in range(32, 256) if unicodedata.category(chr(k))[0] != "C")
    symbols = "αβγδηθλμπρστφεΔΣ∇∂∞√×·±→≤≥≠≈ℓ‖⟨⟩²³⁺⁻₀₁−|<>–—…’“”°日"
    tables = [
        *all_tables(study()),
        one_table(*NASTY, printable, symbols, " ".join(symbols), "[1pt]", *map(str, range(60))),
    ]
    Path("report.tex").write_text(as_latex(f"a study {NASTY}", tables), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, capture_output=True, check=False)
    log = done.stdout.decode("utf-8", errors="replace")
    assert done.returncode == 0, log[-2000:]
    assert "Overfull \\hbox" not in log
    assert "Missing character" not in log


# --- CSV --------------------------------------------------------------------------------------------------------------


def read_csv(page: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(page)))


def test_csv_has_every_number_exactly():
    runs = study()
    rows = read_csv(as_csv(runs))
    assert [(row["run"], row["attack"]) for row in rows] == [
        (run.name, attack) for run in runs for attack in ("clean", "gaussian", "bim")
    ]
    for row, run in zip(rows, [run for run in runs for _ in range(3)], strict=True):
        recorded = next(one for one in run.results if one["attack"] == row["attack"])
        clean, found = correct(run, "clean"), correct(run, row["attack"])
        assert (int(row["correct"]), int(row["n"]), float(row["accuracy"])) == (found.sum(), N, found.mean())
        for name in ("ci_low", "ci_high", "loss", "linf", "l2"):
            assert float(row[name]) == recorded[name]
        assert float(row["drop"]) == recorded["accuracy_drop"] == pytest.approx((clean - found).mean())
        assert row["eps"] == (str(8 / 255) if row["attack"] == "bim" else "")
        assert row["std"] == ("0.05" if row["attack"] == "gaussian" else "")
        assert row["optimizer.init_args.weight_decay"] == run.differing["optimizer.init_args.weight_decay"]
        assert (row["model.norm"], row["group"], row["complete"]) == (run.differing["model.norm"], run.group, "True")
        assert row["folder"] == str(run.record.folder)
        only = int((clean > found).sum()), int((found > clean).sum())
        if row["attack"] == "clean":
            assert (row["only_clean"], row["only_attack"], row["drop_ci_low"], row["drop_ci_high"]) == ("", "", "", "")
        else:
            assert (int(row["only_clean"]), int(row["only_attack"])) == only
            ends = float(row["drop_ci_low"]), float(row["drop_ci_high"])
            assert ends == pytest.approx(ref.paired(only[1], only[0], N), rel=1e-12)


def test_csv_is_empty_where_decisions_are_missing():
    folder = write_run("a")
    (folder / "robustness.npz").unlink()
    for row in read_csv(as_csv(load_runs([folder]))):
        assert float(row["drop"]) >= 0
        assert row["drop_ci_low"] == row["drop_ci_high"] == row["only_clean"] == row["only_attack"] == ""


def test_csv_keeps_settings_apart_from_its_own_columns():
    runs = load_runs([write_run("a", settings={"n": 7, "eps": "1,5\n"}), write_run("b", settings={"n": 8})])
    rows = read_csv(as_csv(runs))
    assert [row["setting.n"] for row in rows] == 3 * ["7"] + 3 * ["8"]
    assert [row["setting.eps"] for row in rows] == 3 * ["1,5\n"] + 3 * ["–"]
    assert {row["n"] for row in rows} == {str(N)}


def test_csv_of_runs_without_an_evaluation_has_a_head_only():
    page = as_csv(load_runs([write_run("a", shares={})]))
    assert page.splitlines()[1:] == []
    assert page.startswith("run,folder,group,complete,attack,correct,n,accuracy,")


def test_csv_means_are_those_of_the_tables():
    runs = load_runs([write_run(f"a{seed}", seed=seed) for seed in range(3)])
    table = all_tables(runs)[0]
    rows = read_csv(as_csv(runs))
    for attack, cell in zip(("clean", "gaussian", "bim"), table.rows[0][2:], strict=True):
        values = [float(row["accuracy"]) for row in rows if row["attack"] == attack]
        assert cell.value == pytest.approx(np.mean(values))
