"""Rows of weights whose channels come last are views, and have the sums of the same weight with channels first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normgeo.geometry.rows import as_rows, in_memory_order
from lightning_normgeo.probes.weight_reader import WeightReader
from lightning_normgeo.probes.weight_step import Observed
from lightning_normgeo.symmetries.units.weight_units import WeightUnits
from support.tensors import draw

SHAPES = [(6, 4, 3, 3), (6, 4, 1, 1), (6, 1, 3, 3), (1, 4, 3, 3), (5, 2, 3, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_memory_order_are_views(shape: tuple[int, ...]) -> None:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    weight = draw(*shape).to(memory_format=last)
    rows = as_rows(in_memory_order(weight, weight), shape[0])
    assert rows.data_ptr() == weight.data_ptr()
    assert torch.equal(rows.sort(1).values, weight.flatten(1).sort(1).values)
    other = draw(*shape, seed=1)  # of another layout: the same elements are at the same places
    products = (rows * as_rows(in_memory_order(other, weight), shape[0])).sum(1)
    torch.testing.assert_close(products, (weight * other).flatten(1).sum(1))


@pytest.mark.parametrize("layout", ["weight", "gradient", "both"])
@pytest.mark.parametrize("count", [6, 3, 1])
def test_a_step_has_the_same_numbers_in_any_memory_format(layout: str, count: int) -> None:
    steps = []
    for last in (False, True):
        weight = nn.Parameter(draw(6, 4, 3, 3).float())
        weight.grad = draw(6, 4, 3, 3, seed=1).float()
        if last and layout != "gradient":
            weight.data = weight.data.to(memory_format=torch.channels_last)
        if last and layout != "weight":
            weight.grad = weight.grad.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        optimizer.state[weight]["momentum_buffer"] = draw(6, 4, 3, 3, seed=2).float()
        units = WeightUnits(name="layer.weight", kind="filter" if count == 6 else "group", count=count)
        observed, reader = [Observed(units, weight)], WeightReader()
        with torch.no_grad():
            (step,) = reader.read(observed, optimizer, {id(weight): optimizer.param_groups[0]}, keep=True)
            optimizer.step()
            reader.add_updates([step], observed)
        assert step.terms is not None
        assert step.update is not None
        steps.append([step.weight_sq, step.inner, step.gradient_sq, *step.terms, *step.update])
    for first, second in zip(*steps, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("shape", "units"), [((0, 4), 0), ((4, 0), 4), ((0,), 0), ((4, 0), 1), ((0, 3, 3, 3), 0)])
def test_empty_tensors_have_empty_rows(shape: tuple[int, ...], units: int) -> None:
    assert as_rows(torch.empty(shape), units).shape == (units, 0)
