"""A strict reader of LaTeX tables."""

from __future__ import annotations

import re

COMMANDS = (
    r"alpha|beta|gamma|delta|varepsilon|eta|theta|lambda|mu|pi|rho|sigma|tau|phi|Delta|sum|nabla|partial|infty|surd|times"
    r"|cdot|pm|to|leq|geq|neq|approx|ell|langle|rangle"
)


def check_latex(body: str) -> None:
    """Check the LaTeX code: balanced braces and formulas, and only known commands and characters."""
    rest = re.sub(
        r"\\(textbackslash|textasciitilde|textasciicircum|textasciigrave|textquotedbl|dots|textdegree)\{\}", "", body
    )
    rest = re.sub(r"\\[&%$#_{}]", "", rest)
    formulas = re.findall(r"\$([^$]*)\$", rest)
    assert "$" not in re.sub(r"\$[^$]+\$", "", rest), "no empty, displayed or open formula"
    for formula in formulas:
        plain = re.sub(rf"\\(?:{COMMANDS})(?![a-zA-Z])|\\\||[\^_]\{{[-+\d]+\}}|\{{\}}", "", formula)
        assert re.fullmatch(r"[-+W|<>,/ \d.]*", plain), formula
        assert not re.search(r"\^\{[^}]+\} *\^|_\{[^}]+\} *_", formula), "no double superscript"
    outside = re.sub(r"\$[^$]*\$", "", rest)
    assert not re.search(r"[\\%#&_^~|<>\"`]", outside.replace("{}", "").replace("``", "").replace("~", "")), outside
    assert outside.replace("{}", "").count("{") == outside.replace("{}", "").count("}") == 0
    assert all(" " <= x <= "~" or "À" <= x <= "ÿ" for x in outside), outside
