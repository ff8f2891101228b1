"""The solutions of equations between exponents, against a dense decomposition in double precision."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from lightning_normgeo.symmetries.equations.exponents import Exponents
from lightning_normgeo.symmetries.equations.nullspace import solution

_UNKNOWNS = 7
terms = st.tuples(st.integers(1, _UNKNOWNS), st.sampled_from([-2.0, -1.0, 0.5, 1.0, 2.0]))
"""An unknown and its coefficient; few of each, so that equations share all unknowns but one."""


def dense(equations: list[list[tuple[int, float]]]) -> npt.NDArray[np.float64]:
    matrix = np.zeros((len(equations), _UNKNOWNS + 1))
    for row, equation in zip(matrix, equations, strict=True):
        for unknown, coefficient in equation:
            row[unknown] += coefficient
    return matrix


@given(equations=st.lists(st.lists(terms, min_size=3, max_size=4), min_size=1, max_size=12))
def test_solutions_satisfy_all_equations_and_are_all_there_are(equations: list[list[tuple[int, float]]]) -> None:
    exponents = Exponents()
    exponents.new((_UNKNOWNS,))
    for equation in equations:
        exponents.add_to_zero([(np.array([unknown]), coefficient) for unknown, coefficient in equation])
    found = solution(exponents).toarray()
    matrix = dense(equations)
    assert np.abs(found @ matrix.T).max(initial=0.0) < 1e-6
    assert np.linalg.matrix_rank(found, tol=1e-9) == len(found) == _UNKNOWNS - np.linalg.matrix_rank(matrix, tol=1e-9)
