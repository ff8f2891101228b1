"""Forward passes of the package leave models as they were, whatever the models do in them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo import batch_geometry, scale_invariant_units, scale_symmetries, swap_norm
from lightning_normgeo.normalization.autograd.tracing import trace


class Contrast(nn.Module):
    """A network with a momentum encoder, a bounded embedding, and a shift that the first batch sets."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = (nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)) for _ in range(2))
        self.key.requires_grad_(False)
        self.tokens = nn.Embedding(7, 5, max_norm=0.3)
        self.shift, self.initialized = nn.Parameter(torch.zeros(5)), False
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(torch.arange(len(x)))
        if not self.initialized:
            self.shift.data.copy_(-x.mean(0))
            self.initialized = True
        with torch.no_grad():
            for own, average in zip(self.query.parameters(), self.key.parameters(), strict=True):
                average.data = 0.9 * average.data + 0.1 * own.data
            self.key[0].weight.data *= 1.5  # type: ignore[operator]
            self.key[1].weight[0] = 3.0  # type: ignore[index]
            torch._foreach_mul_(list(self.key.parameters()), 0.5)
            keys = self.key(x + self.shift)
        self.calls.append(random.randrange(9) + np.random.randint(9))  # noqa: NPY002
        self.last = x
        return F.normalize(self.query(x + self.shift)) @ F.normalize(keys).T


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


PASSES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "units": scale_invariant_units,
    "symmetries": scale_symmetries,
    "batch geometry": batch_geometry,
}


@pytest.mark.parametrize("name", PASSES)
def test_models_that_write_to_themselves_stay_as_they_were(name: str) -> None:
    torch.manual_seed(0)
    model, x = Contrast(), torch.randn(6, 5)
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    PASSES[name](model, x)
    after = snapshot(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert (model.initialized, model.calls, hasattr(model, "last")) == (False, [], False)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_swap_draws_no_random_numbers() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + random.random() + np.random.rand()  # type: ignore[no-any-return]  # noqa: NPY002

    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    swap_norm(Noisy(nn.Linear(5, 16), nn.BatchNorm1d(16)), "gn", example_batch=torch.randn(4, 5))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


def test_operations_in_place_under_vmap_run_as_ever() -> None:
    layer = nn.Linear(5, 4)
    module = nn.Sequential(layer)
    module.forward = lambda x: torch.vmap(lambda row: layer.weight.mv(row).mul_(2).add_(layer.bias))(x)  # type: ignore[method-assign]
    (output,) = trace(module, torch.ones(3, 5))
    assert torch.equal(output, module(torch.ones(3, 5)))


def test_layers_that_are_not_initialized_yet_become_usable() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4))
    assert scale_invariant_units(module, torch.randn(6, 5))["0"].kind == "filter"
    assert (type(module[0]), module[0].in_features) == (nn.Linear, 5)
