"""Numbers of verdicts: rounded, and never to the other side of a limit."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_normgeo.runs.verdicts.wording import (
    counted,
    exactly,
    nearly_all,
    p_value,
    percent,
    points,
    scientific,
    significant,
)


def side(value: float, limit: float) -> int:
    return (value > limit) - (value < limit)


@given(limit=st.floats(1e-10, 1e3), factor=st.floats(0.9, 1.1))
@example(limit=1.3303761139571861, factor=1.0)  # needs 17 digits
def test_a_number_stays_on_its_side_of_a_limit(limit: float, factor: float) -> None:
    value = limit * factor
    assert float(exactly(limit)) == limit
    for written in (scientific(value, limit), significant(value, limit), p_value(value, limit)):
        assert side(float(written), limit) == side(value, limit), written


@given(share=st.just(1.0) | st.floats(0, 1 - 1e-9), limit=st.floats(0.01, 0.99))
def test_a_share_is_all_only_if_it_is(share: float, limit: float) -> None:
    for written in (percent(share, limit), nearly_all(share, limit)):
        number = float(written.removeprefix("> ").removesuffix(" %"))
        assert (number == 100) == (share == 1)
        assert number == pytest.approx(100 * share, abs=0.5)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (scientific(3.14e-5, 1e-3), "3.1e-05"),
        (scientific(0.0, 1e-3), "0.0e+00"),
        (exactly(0.025), "2.5e-02"),
        (percent(1.0), "100 %"),
        (percent(0.9996), "99.96 %"),
        (percent(0.003, 0.5), "0.3 %"),
        (nearly_all(0.999955, 0.99), "99.9955 %"),
        (nearly_all(1 - 1e-9, 0.99), "> 99.999999 %"),
        (nearly_all(1.0, 0.99), "100.0 %"),
        (points(0.8 - 0.77, 0.03), "3.00 pt"),
        (points(0.03004, 0.03), "3.004 pt"),
        (points(-0.0028, 0.03, sign="+"), "-0.28 pt"),
        (points(-1e-9, sign="+"), "+0.00 pt"),
        (p_value(0.0496, 0.05), "0.0496"),
        (p_value(0.05, 0.05), "0.05"),
        (p_value(0.0, 0.05), "<1e-300"),
        (significant(5512.0), "5500"),
        (counted(1, "pair"), "1 pair"),
        (counted(1000, "pair"), "1,000 pairs"),
    ],
)
def test_numbers_in_words(written: str, expected: str) -> None:
    assert written == expected
