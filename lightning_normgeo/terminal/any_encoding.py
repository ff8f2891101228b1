"""Text that every terminal can show: Greek letters and mathematical signs in words where an encoding lacks them."""

from __future__ import annotations

import codecs
import sys
import unicodedata

_HANDLER = "lightning_normgeo.in_words"
_IN_WORDS = {
    "Δ": "Delta ",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "ε": "eps",
    "η": "eta",
    "μ": "mu",
    "σ": "sigma",
    "τ": "tau",
    "∇": "grad ",
    "‖": "|",
    "⟨": "<",
    "⟩": ">",
    "∞": "inf",
    "√": "sqrt ",
    "²": "^2",
    "×": "x",
    "·": "*",
    "−": "-",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "…": "...",
    "–": "-",
    "—": "-",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}


def speak_any_encoding() -> None:
    """Let the standard streams write signs that their encoding lacks in words, instead of failing."""
    codecs.register_error(_HANDLER, _in_words)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # not of what others have put in their place
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


def _in_words(error: UnicodeError) -> tuple[str, int]:
    """Handle an error of encoding; see :func:`codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_in_ascii(sign) for sign in signs), error.end


def _in_ascii(sign: str) -> str:
    known = _IN_WORDS.get(sign)
    if known is not None:
        return known
    letters = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()  # é as e
    return letters or "?"
