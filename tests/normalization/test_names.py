"""Names of weights: the original names of pruned or normalized weights, each listed once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_normgeo.normalization.names import by_clean_name, layer_name, named_weights
from lightning_normgeo.symmetries import scale_invariant_units


class LowRank(nn.Module):
    """Parametrization W = U V."""

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return u @ v

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :2] * s[:2], v[:2]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


def weights(module: nn.Module) -> list[tuple[str, str]]:
    return [(name, layer_name(name)) for name, _ in named_weights(module)]


def old_weight_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), old_weight_norm, nn.utils.spectral_norm],
    ids=["pruned", "old-weight-norm", "old-spectral-norm"],
)
def test_a_weight_keeps_its_name(change) -> None:  # type: ignore[no-untyped-def]
    layer = nn.Sequential(nn.Linear(6, 4))
    change(layer[0])
    assert weights(layer) == [("0.weight", "0")]


def test_the_units_of_a_pruned_network_are_those_of_the_network() -> None:
    module = net().double()
    module(x := torch.rand(5, 3, 6, 6, dtype=torch.float64))
    before = scale_invariant_units(module, x)
    prune.l1_unstructured(module[0], "weight", 0.5)
    prune.random_unstructured(module[4], "bias", 0.5)
    assert scale_invariant_units(module, x) == before


def test_the_direction_of_a_weight_normalization_goes_for_the_weight() -> None:
    module = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)))
    assert weights(module) == [("0.parametrizations.weight.original1", "0")]
    module = nn.Sequential(parametrizations.weight_norm(nn.ConvTranspose2d(6, 4, 3), dim=1))
    assert weights(module) == [("0.parametrizations.weight.original1", "0")]


def test_both_factors_of_a_weight_have_names() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    parametrize.register_parametrization(module[0], "weight", LowRank())
    assert weights(module) == [(f"0.weight.original{i}", f"0.weight.original{i}") for i in range(2)]
    units = scale_invariant_units(module, torch.rand(5, 6))
    assert [(u.kind, u.count) for u in units] == [("filter", 8), ("layer", 1)]


def test_a_name_that_is_taken_stays_another() -> None:
    module = nn.ParameterDict({name: torch.rand(3, 2) for name in ("weight", "weight_orig", "weight_v")})
    assert [name for name, _ in named_weights(module)] == ["weight", "weight_orig", "weight_v"]


PARTS = st.lists(st.sampled_from(["weight", "a", "parametrizations", "original0", "b"]), max_size=3)
ENDS = st.sampled_from(["weight", "weight_orig", "weight_orig_orig", "weight_v", "weight_g", "original0", "original1"])
SHAPES = st.sampled_from([(4, 3), (4, 1), (1, 3), (2, 3)])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.dictionaries(st.tuples(PARTS, ENDS).map(lambda p: ".".join([*p[0], p[1]])), SHAPES, max_size=8))
def test_names_are_unique(shapes: dict[str, tuple[int, int]]) -> None:
    found = by_clean_name((name, torch.empty(shape)) for name, shape in shapes.items())
    assert len(found) == len(shapes)
