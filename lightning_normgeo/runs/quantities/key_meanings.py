"""Units and meanings of single metric keys in words that need no other key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from lightning_normgeo.runs.quantities.table import QUANTITIES

COLUMNS = ["key", "unit", "meaning"]
"""Columns of the table of keys."""
_CONTROL, _CUMULATIVE = "_control/", "/cumulative_"
_FORM = re.compile(r"_(pooled_mean|mean_view(\d+)|median|q90|channel)$")
_OF_FORM = {"median": "median", "q90": "90 % quantile"}


def key_rows(keys: Iterable[str]) -> list[list[str]]:
    """Return the rows of the table of keys, in the order of the documentation; keys of others are left out."""
    order = {known: place for place, known in enumerate(QUANTITIES)}
    rows = {key: meaning_of(key) for key in keys}
    known = sorted((key for key in rows if rows[key][1]), key=lambda key: (order.get(key, len(order)), key))
    return [[key, *rows[key]] for key in known]


def meaning_of(key: str) -> tuple[str, str]:
    """Return the unit and the meaning of a key of a monitor, also of one layer; both empty for another key."""
    group, _, name = key.partition("/")
    quantity, _, layer = name.partition("/")
    unit, meaning = _of_aggregate(f"{group}/{quantity}")
    return unit, f"{meaning}; of layer {layer}" if meaning and layer else meaning


def _of_aggregate(key: str) -> tuple[str, str]:
    known = QUANTITIES.get(key)
    if known is not None and known.meaning:
        return known.unit, known.meaning.partition("; also ")[0]
    if _CUMULATIVE in key:
        return _with(key.replace(_CUMULATIVE, "/"), "summed over all steps so far")
    if _CONTROL in key:
        return _with(key.replace(_CONTROL, "/"), "of weights that are not scale invariant")
    form = _FORM.search(key)
    if form is not None:
        return _of_form(key[: form.start()], form)
    several = (one for one in QUANTITIES.values() if "*" in one.key and fnmatchcase(key, one.key))
    return next(((one.unit, one.meaning) for one in several), ("", ""))


def _with(key: str, addition: str) -> tuple[str, str]:
    unit, meaning = _of_aggregate(key)
    return unit, f"{meaning}; {addition}" if meaning else ""


def _of_form(stem: str, form: re.Match[str]) -> tuple[str, str]:
    """Return the meaning of another statistic of a quantity whose mean is documented."""
    unit, meaning = _of_aggregate(f"{stem}_mean")
    quantity = meaning.partition(", ")[0]
    if form[1] == "channel":
        return unit, f"{quantity} of one channel, drawn by a seed"
    if form[2]:
        return unit, f"{meaning}, in pass {form[2]} of each layer that runs several times before one backward pass"
    if form[1] == "pooled_mean":
        return unit, f"{meaning}, with σ and μ of all passes of a layer together"
    return unit, f"{quantity}, {_OF_FORM[form[1]]} over all channels"
