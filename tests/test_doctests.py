"""The examples in docstrings are correct, and every public function of the geometry has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

from lightning_normgeo import geometry, symmetries

MODULES = [
    module.name
    for package in (geometry, symmetries)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
OTHERS = [
    "channels.masked_model",
    "channels.measure",
    "callbacks._readings.reductions.quantiles",
    "normalization.surgery.swap",
    "probes.layer_inputs.table",
    "robustness.effective.measure",
    "runs.summary",
]
"""Modules outside these packages with examples that run; those of others take names from the reader's project."""
# modules in which each public function has an example: an import, a seed and at least one relation that holds
COMPLETE = (
    "steps.angles",
    "batches.batch_outputs",
    "batches.batch_statistics",
    "charges",
    "steps.equilibrium",
    "increments.norm_increments",
    "increments.rounding_floors",
    "input_covariance.exact_spectrum",
    "input_covariance.input_geometry",
    "input_covariance.input_spectrum",
    "input_covariance.patch_map",
    "steps.joint_angles",
    "matrix_laws",
    "orthogonality",
    "rows",
    "sphere",
    "steps.weight_decay",
    "weight_normalizations",
)
LEAST = 3


def imported(name: str) -> ModuleType:
    if name.endswith((".numba_kernels", ".row_column_loops")):
        pytest.importorskip("numba")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", [*MODULES, *(f"lightning_normgeo.{name}" for name in OTHERS)])
def test_examples_hold(name: str) -> None:
    module = imported(name)
    examples = sum(len(test.examples) for test in doctest.DocTestFinder().find(module))
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted == examples


@pytest.mark.parametrize("part", COMPLETE)
def test_every_public_function_has_an_example(part: str) -> None:
    name = f"{geometry.__name__}.{part}"
    public = [value for value in vars(geometry).values() if getattr(value, "__module__", None) == name]
    functions = [value.__name__ for value in public if inspect.isfunction(value)]
    found = {test.name: len(test.examples) for test in doctest.DocTestFinder().find(imported(name))}
    assert functions
    assert [function for function in functions if found.get(f"{name}.{function}", 0) < LEAST] == []
