"""Output in any encoding: Greek letters and mathematical signs are written in ASCII where an encoding lacks them."""

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
    """Let the standard streams write characters that their encoding lacks in ASCII, instead of raising an error."""
    codecs.register_error(_HANDLER, _in_words)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # missing where a notebook has replaced the stream
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


def _in_words(error: UnicodeError) -> tuple[str, int]:
    """Replace the characters of an encoding error; a handler for :func:`codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_in_ascii(sign) for sign in signs), error.end


def _in_ascii(sign: str) -> str:
    known = _IN_WORDS.get(sign)
    if known is not None:
        return known
    letters = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()  # é becomes e
    return letters or "?"
