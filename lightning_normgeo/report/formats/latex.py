"""Tables of a report as a LaTeX document."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_normgeo.report.tables.table import Table, holds_number

_ROWS = 40
"""Rows that fit on a page; longer tables continue in another one."""
_HEAD = r"""% To use a table elsewhere, copy it and load booktabs, graphicx and fontenc with T1.
\documentclass{article}
\usepackage[T1]{fontenc}
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\usepackage[a4paper,landscape,margin=2cm]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
"""
_TABLE = r"""
\begin{table}[htbp]
\centering\footnotesize
\caption{%(caption)s}
%(label)s\smallskip
\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%%
\begin{tabular}{%(alignment)s}
\toprule
%(head)s
\midrule
%(body)s\bottomrule
\end{tabular}}
\end{table}
"""
_NAMES = (
    "α=alpha β=beta γ=gamma δ=delta ε=varepsilon η=eta θ=theta λ=lambda μ=mu µ=mu π=pi ρ=rho σ=sigma τ=tau φ=phi "
    "Δ=Delta Σ=sum ∇=nabla ∂=partial ∞=infty √=surd ×=times ·=cdot ±=pm →=to ≤=leq ≥=geq ≠=neq ≈=approx ℓ=ell ‖=| "
    "⟨=langle ⟩=rangle ⟂=perp"
)
_MATH = dict(name.split("=") for name in _NAMES.split())
_SUPERSCRIPT, _SUBSCRIPT, _LEVEL = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-"
_UP, _DOWN = str.maketrans(_SUPERSCRIPT, _LEVEL), str.maketrans(_SUBSCRIPT, _LEVEL)
_PLAIN_MATH = "−|<>"
_TEXT = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "’": "'",
    "“": "``",
    "”": "''",
    "°": r"\textdegree{}",
    "\N{NO-BREAK SPACE}": "~",
} | {mark: f"\\{mark}" for mark in "&%$#_{}"}
_LETTERS = "".join(chr(code) for code in range(0xC0, 0x100) if chr(code).isalpha())
_SYMBOLS = re.escape("".join((*_MATH, _SUPERSCRIPT, _SUBSCRIPT, _PLAIN_MATH)))
_TOKEN = re.compile(
    r"(?P<power>(?<![\w.])[+-]?\d+(?:\.\d+)?e[+-]\d+(?![\w.]))"
    r"|(?P<minus>(?<![\w-])-(?=\d))"
    rf"|(?P<formula>[{_SYMBOLS}](?:[ ,/]*(?:[{_SYMBOLS}]|W(?![A-Za-z0-9])))*)"
    r"|(?P<ligature>([-,'])(?=\5))"
    r"|(?P<character>.)"
)


def as_latex(title: str, tables: Sequence[Table]) -> str:
    """Return tables as a LaTeX document, in which each table can be copied into a paper.

    Args:
        title: Title of the document.
        tables: Tables of the report.
    """
    drawn = [_table(table, at) for table in tables for at in range(0, max(len(table.rows), 1), _ROWS)]
    return f"{_HEAD}\\section*{{{latex_escaped(title)}}}\n{''.join(drawn)}\n\\end{{document}}\n"


def latex_escaped(text: str) -> str:
    """Return LaTeX that shows a text; symbols become formulas, and characters that fonts lack their Unicode number."""
    return _TOKEN.sub(_translated, re.sub(r"\s+", " ", text))


def _table(table: Table, at: int) -> str:
    """Return the part of a table that begins at a row; only the first part has the caption and the label."""
    first = f"\\textbf{{{latex_escaped(table.title)}.}} {latex_escaped(table.caption)}"
    return _TABLE % {
        "caption": f"\\textbf{{{latex_escaped(table.title)}}} (continued)" if at else first,
        "label": "" if at else f"\\label{{tab:{table.anchor}}}\n",
        "alignment": "".join("r" if holds_number(table, k) else "l" for k in range(len(table.columns))),
        "head": _line(table.columns),
        "body": "".join(f"{_line([cell.text for cell in row])}\n" for row in table.rows[at : at + _ROWS]),
    }


def _line(cells: Sequence[str]) -> str:
    line = " & ".join(map(latex_escaped, cells))
    if line.startswith(("[", "*")):  # LaTeX would read these as options of the preceding line break
        line = "{}" + line
    return line + r" \\"


def _translated(token: re.Match[str]) -> str:
    """Return the LaTeX of a token of :data:`_TOKEN`."""
    match token.lastgroup:
        case "power":
            mantissa, _, exponent = token[0].partition("e")
            return rf"${mantissa}\times 10^{{{int(exponent)}}}$"
        case "minus":
            return "$-$"
        case "formula":
            return f"${_formula(token[0])}$"
        case "ligature":
            return f"{token[0]}{{}}"
    character = token[0]
    if character in _TEXT:
        return _TEXT[character]
    has_glyph = " " <= character <= "~" or character in _LETTERS
    return character if has_glyph else f"[U+{ord(character):04X}]"


def _formula(symbols: str) -> str:
    """Return symbols as the content of a LaTeX formula."""
    raised = re.sub(f"[{''.join(_SUPERSCRIPT)}]+", lambda run: f"^{{{run[0].translate(_UP)}}}", symbols)
    lowered = re.sub(f"[{''.join(_SUBSCRIPT)}]+", lambda run: f"_{{{run[0].translate(_DOWN)}}}", raised)
    named = "".join(f"\\{_MATH[symbol]} " if symbol in _MATH else symbol for symbol in lowered)
    apart = re.sub(r"\} *(?=[\^_])", "}{}", named)  # a second superscript needs a base
    return apart.replace("−", "-").strip()
