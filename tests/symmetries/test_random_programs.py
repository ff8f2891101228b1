"""Random programs have no symmetry that does not exist."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.symmetries import scale_symmetries
from support.symmetry_oracle import elementwise, products, randomize
from support.symmetry_programs import OPERATIONS, DegenerateError, Program, Step

STEPS = st.builds(
    Step,
    name=st.sampled_from(sorted(OPERATIONS)),
    sources=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    choice=st.integers(0, 59),
    shared=st.booleans(),
    frozen=st.sampled_from([False, False, False, True]),
)
ENDS = st.sampled_from(["layer norm", "normalize", "softmax", "channel norm", "function", "quotient"])
END = st.builds(Step, name=ENDS, sources=st.just((0, 0)), choice=st.integers(0, 59))


def well_conditioned(program: Program, x: torch.Tensor) -> bool:
    """Whether a tiny change of the input and all parameters changes the outputs a little only."""
    try:
        before = torch.cat([y.detach().flatten() for y in program(x)])
        with torch.no_grad():
            for parameter in program.parameters():
                parameter.mul_(1 + 1e-13 * torch.randn_like(parameter))
        after = torch.cat([y.detach().flatten() for y in program(x * (1 + 1e-13 * torch.randn_like(x)))])
    except DegenerateError:
        return False
    return float((before - after).abs().max()) < 1e-9 * float(before.abs().max())


def check(steps: list[Step], outputs: int) -> int:
    """Search for symmetries of a program, check their charges, and return their number."""
    program = Program(steps, outputs)
    torch.manual_seed(3)
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    try:
        program(x)
        assume(any(parameter.requires_grad for parameter in program.parameters()))
        randomize(program, 0)
        found = scale_symmetries(program, x)
    except (ConfigurationError, DegenerateError):
        assume(False)
    if not len(found):
        return 0
    exponents = elementwise(found, program)
    assert np.linalg.matrix_rank(exponents) == len(found), found
    charges = []
    for seed in range(12):
        randomize(program, seed)
        torch.manual_seed(seed)
        x = torch.randn_like(x)
        if not well_conditioned(program, x):
            continue
        gradients = products(program, x)
        size = np.abs(gradients).sum()
        if np.isfinite(size) and size < 1e20:
            own = np.abs(exponents) @ np.abs(gradients)
            charges.append(np.abs(exponents @ gradients) / np.maximum(own, 1e-4 * max(size, 1.0)))
    assume(len(charges) > 4)
    assert (np.median(charges, axis=0) < 1e-10).all(), found
    return len(found)


def run(steps: list[Step], end: Step, outputs: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check([*steps, end], outputs)


GIVEN = given(steps=st.lists(STEPS, min_size=1, max_size=8), end=END, outputs=st.integers(1, 2))
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=150, **SETTINGS)
@GIVEN
def test_charges_of_random_programs_vanish(steps: list[Step], end: Step, outputs: int) -> None:
    run(steps, end, outputs)


@pytest.mark.slow
@settings(max_examples=5000, **SETTINGS)
@GIVEN
def test_charges_of_many_random_programs_vanish(steps: list[Step], end: Step, outputs: int) -> None:
    run(steps, end, outputs)
