"""Products with patches and their covariance, against torch's layers and against unfolded patches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_normgeo.geometry import PatchMap, covariance_product
from lightning_normgeo.probes.layer_inputs.layers import batched, count_vectors, patch_map_of
from support import reference as ref
from support.tensors import draw

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def layers(data: Any) -> dict[str, Any]:
    """Return the settings of a random convolution, and the shape of an input that it takes."""
    dims, groups = data(st.integers(1, 3)), data(st.integers(1, 3))
    number = st.integers(1, 3)
    settings = {
        "kernel_size": tuple(data(number) for _ in range(dims)),
        "stride": tuple(data(st.integers(1, 2)) for _ in range(dims)),
        "dilation": tuple(data(st.integers(1, 2)) for _ in range(dims)),
        "padding": tuple(data(st.integers(0, 2)) for _ in range(dims)),
        "padding_mode": data(st.sampled_from(["zeros", "circular", "replicate"])),
        "groups": groups,
    }
    if data(st.booleans()):
        settings |= {"padding": "same", "stride": 1}
    shape = (data(number) + 1, 2 * groups, *(data(st.integers(5, 7)) for _ in range(dims)))
    return {"settings": settings, "shape": shape}


def built(case: dict[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    """Return the layer in float64, and an input."""
    shape, settings = case["shape"], case["settings"]
    layer = CONVOLUTIONS[len(shape) - 2](shape[1], 3 * settings["groups"], bias=False, **settings).double()
    with torch.no_grad():
        layer.weight.copy_(draw(*layer.weight.shape, seed=1))
    return layer, draw(*shape)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@given(layers())
def test_map_is_that_of_the_layer(case: dict[str, Any]) -> None:
    layer, x = built(case)
    patches, y = patch_map_of(layer), layer(x)
    inputs = patches.padded(x)
    n, groups = patches.width(inputs), patches.groups
    filters = layer.weight.detach().reshape(groups, -1, n)
    torch.testing.assert_close(patches.apply(inputs, filters), y, rtol=1e-10, atol=1e-10)
    assert patches.samples(inputs) == count_vectors(layer, x) == y.numel() // y.shape[1]
    columns = patches.columns(inputs)
    torch.testing.assert_close((filters @ columns).flatten(0, 1), y.movedim(1, 0).flatten(1), rtol=1e-10, atol=1e-10)
    upstream = draw(*y.shape, seed=2)
    (gradient,) = torch.autograd.grad(y, layer.weight, upstream)
    torch.testing.assert_close(
        patches.adjoint(inputs, upstream).reshape(gradient.shape), gradient, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(patches.energy(inputs), columns.square().sum((1, 2)), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@given(layers(), st.integers(1, 40))
def test_covariance_product_equals_that_of_the_unfolded_patches(case: Any, count: int) -> None:
    layer, x = built(case)
    patches = patch_map_of(layer)
    inputs = patches.padded(x)
    z = draw(patches.groups, count, patches.width(inputs), seed=3)
    products = covariance_product(inputs, z, patches)
    for group, columns in enumerate(patches.columns(inputs)):
        expected = z[group] @ torch.cov(columns, correction=0).reshape(len(columns), -1)
        torch.testing.assert_close(products[group], expected, rtol=1e-10, atol=1e-10)


def test_columns_are_the_patches_one_by_one() -> None:
    x = draw(2, 3, 7, 6)
    patches = PatchMap((3, 2), (2, 2), (2, 2), (1, 1, 1, 1))
    expected = torch.tensor(ref.patches(x.tolist(), 3, 2, 2, 1, 2), dtype=torch.float64)
    columns = patches.columns(patches.padded(x))
    assert torch.equal(columns[0].T, expected)
    chosen = torch.tensor([5, 0, 5, 3])
    assert torch.equal(patches.columns(patches.padded(x), chosen), columns[:, :, chosen])


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_linear_layer_reads_vectors(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(5, 3, bias=False).double(), draw(*shape)
    patches, vectors = patch_map_of(layer), batched(layer, x)
    assert vectors.shape == (math.prod(shape[:-1]), 5)
    y = patches.apply(vectors, layer.weight[None])
    torch.testing.assert_close(y.reshape(*shape[:-1], 3), layer(x), rtol=1e-12, atol=1e-12)
    upstream = draw(*y.shape, seed=1)
    torch.testing.assert_close(patches.adjoint(vectors, upstream)[0], upstream.T @ vectors, rtol=1e-12, atol=0)


def test_an_image_without_a_batch_is_a_batch_of_one() -> None:
    layer = nn.Conv2d(3, 4, 3)
    assert batched(layer, torch.zeros(3, 5, 5)).shape == (1, 3, 5, 5)
    assert count_vectors(layer, batched(layer, torch.zeros(3, 5, 5))) == 9
