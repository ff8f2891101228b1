"""The page on spheres has the table of its record, and its text agrees with it."""

from __future__ import annotations

import json

from support.pages import DOCS
from support.scripts import load_script

script = load_script("docs/spheres.py")
RECORD = json.loads(script.DATA.read_text(encoding="utf-8"))
PAGE = script.PAGE.read_text(encoding="utf-8")


def test_the_table_is_that_of_the_record() -> None:
    assert script.with_table(PAGE, RECORD) == PAGE
    assert len(script.table(RECORD).splitlines()) == 2 + len(script.CONDITIONS)


def test_angular_speeds_are_matched_where_the_text_says_so() -> None:
    """The mean angle per step of the last half is within a fifth of that of the training it follows."""
    speeds = {
        name: [mean for _, mean, _, _ in one["curves"]["norm_growth/angular_update"]][15:]
        for name, one in RECORD.items()
    }
    for name in ("free", "decayed"):
        own, other = (sum(speeds[key]) / len(speeds[key]) for key in (name, f"sphere-as-{name}"))
        assert abs(own / other - 1) < 0.2, name


def test_norms_are_constant_on_spheres_only() -> None:
    for name, one in RECORD.items():
        norms = [mean for _, mean, _, _ in one["curves"]["norm_growth/weight_norm"]]
        assert (abs(norms[-1] / norms[0] - 1) < 1e-4) == name.startswith("sphere")


def test_the_picture_is_there() -> None:
    assert (DOCS / "pictures" / "spheres.png").stat().st_size < 200_000
