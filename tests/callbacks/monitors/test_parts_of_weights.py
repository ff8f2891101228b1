"""Units of parts of a weight: queries and keys that are normalized, packed into one weight with values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, RecordLogger, read_record, scale_invariant_units
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.normalization.autograd.tracing import traced_graph
from lightning_normgeo.symmetries.units.discovery import search
from support.projects import Project, images, sgd, trainer

EPS = 1e-40


class Attention(nn.Module):
    """Self-attention with normalized queries and keys, and one packed projection."""

    def __init__(self, bias: bool = False, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Linear(24, width)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, eps=EPS) for _ in range(2))
        self.head = nn.Linear(width, 4)
        self.packed = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2).flatten(2)).tanh()
        samples, tokens, width = x.shape
        qkv = self.qkv(x).view(samples, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.packed:
            q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        logits: Tensor = self.head(y.mean(1)).tanh()
        return logits


def project(bias: bool = False) -> Project:
    torch.manual_seed(0)
    return Project(sgd(), Attention(bias)).double()


def observed(folder: Path, own: Project, *callbacks: Any, steps: int = 4) -> dict[str, list[float]]:
    logger = RecordLogger(str(folder))
    trainer(*callbacks, logger=logger, steps=steps, precision="64-true").fit(own, images(80, dtype=torch.float64))
    return {key: [value for _, value in points] for key, points in read_record(logger.folder).metrics.items()}


@pytest.mark.parametrize("bias", [False, True])
def test_heads_of_queries_and_keys_are_units_and_values_are_not(bias: bool) -> None:
    net = Attention(bias).double()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    found = {units.name: units for units in search(net, traced_graph(net, x))[1]}
    part = found["qkv.weight[0:16]"]
    assert (part.kind, part.count, part.part, part.parameter) == ("group", 4, (0, 16), "qkv.weight")
    assert (part.layer, part.bias) == ("qkv[0:16]", "qkv.bias" if bias else None)
    rest = found["qkv.weight[16:24]"]
    assert (rest.kind, rest.count) == ("none", 8)
    assert "qkv.weight" not in found
    whole = scale_invariant_units(net, x)["qkv"]
    assert (whole.kind, whole.reason) == ("none", "only some of its slices are invariant alone")


@pytest.mark.parametrize("bias", [False, True])
def test_parts_are_measured_as_by_hand(tmp_path: Path, bias: bool) -> None:
    own = project(bias)
    by_hand = copy.deepcopy(own).train()
    optimizer = by_hand.configure_optimizers()
    metrics = observed(tmp_path, own, OrthogonalityMonitor(layers="*"), NormGrowthMonitor(layers="*", cumulative=True))
    for step, batch in zip(range(4), images(80, dtype=torch.float64), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(by_hand(batch[0]), batch[1]).backward()
        linear = by_hand.net.qkv  # type: ignore[union-attr]
        parts = [linear.weight] + ([linear.bias] if bias else [])  # type: ignore[list-item]

        def rows(tensors: list[Tensor]) -> Tensor:
            return torch.cat([t.detach().clone()[:16].reshape(4, -1) for t in tensors], 1)

        before, gradient = rows(parts), rows([p.grad for p in parts if p.grad is not None])
        values = linear.weight.detach().clone()[16:]  # type: ignore[operator]
        optimizer.step()
        increment = (rows(parts).square().sum() - before.square().sum()).item()
        of_values = (linear.weight[16:].square().sum() - values.square().sum()).item()  # type: ignore[operator]
        assert metrics["orthogonality/max_abs_cos/qkv[0:16]".replace("qkv", "net.qkv")][step] < 1e-12
        assert metrics["norm_growth/increment/net.qkv[0:16]"][step] == pytest.approx(increment, rel=1e-9)
        assert metrics["norm_growth/predicted/net.qkv[0:16]"][step] == pytest.approx(
            0.01 * gradient.square().sum().item(), rel=1e-12
        )
        assert metrics["norm_growth_control/increment/net.qkv[16:24]"][step] == pytest.approx(of_values, rel=1e-6)


def test_training_is_bit_identical() -> None:
    plain, watched = project(), project()
    trainer(steps=5, precision="64-true").fit(plain, images(80, dtype=torch.float64))
    callbacks = OrthogonalityMonitor(), NormGrowthMonitor()
    trainer(*callbacks, steps=5, precision="64-true").fit(watched, images(80, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


class TwoWays(Project):
    """Two backward passes of a step, with and without normalized queries and keys."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for packed in (True, False):
            self.net.packed = packed  # type: ignore[assignment]
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_graphs_that_cut_a_weight_differently_make_it_a_control(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(MeasurementWarning, match="None of"):
        metrics = observed(tmp_path, TwoWays(sgd(), Attention()).double(), NormGrowthMonitor(layers="*"))
    assert "norm_growth_control/increment/net.qkv" in metrics
    assert not any("[" in key for key in metrics)
