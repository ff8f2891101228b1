"""The table of channels of a network."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo import channel_table
from lightning_normgeo.channels.table import COLUMNS
from lightning_normgeo.errors import ConfigurationError, UnsuitableError
from support.module_states import equal, fingerprint
from support.small_models import worn
from support.tensors import draw


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    )
    return worn(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))).double()  # type: ignore[return-value]


def images(count: int = 8) -> Tensor:
    return draw(count, 3, 6, 6, seed=5)


def test_values_are_those_of_a_direct_computation() -> None:
    net, x = network().eval(), images()
    table = channel_table(net, x)
    with torch.no_grad():
        pre = net[0](x).movedim(1, 0).flatten(1)
        z = net[:2](x).movedim(1, 0).flatten(1)
    found = table["1"]
    assert torch.equal(found.gamma, net[1].weight.detach())
    assert torch.equal(found.beta, net[1].bias.detach())
    assert torch.allclose(found.eps_ratio, net[1].eps / pre.var(1, correction=0), rtol=1e-12)
    assert torch.allclose(found.output_correlations(), torch.corrcoef(z), atol=1e-6)
    assert found.values == 8 * 36
    pairs = [(i, j) for i in range(6) for j in range(i)]
    size = [(g**2 + b**2) for g, b in zip(found.gamma.tolist(), found.beta.tolist(), strict=True)]
    gamma, beta = found.gamma.abs().tolist(), found.beta.tolist()
    distance = {
        (i, j): (((gamma[i] - gamma[j]) ** 2 + (beta[i] - beta[j]) ** 2) / ((size[i] + size[j]) / 2)) ** 0.5
        for i, j in pairs
    }
    for channel, near in enumerate(found.nearest().tolist()):
        assert near == min(
            (k for k in range(6) if k != channel), key=lambda k: distance[max(k, channel), min(k, channel)]
        )


def test_the_output_of_a_copy_is_most_alike_whatever_its_scale() -> None:
    """Channel 3 becomes minus three times channel 1 in front of the normalization, and half of it behind."""
    net = network()
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = -3 * net[0].weight[1], 7
        net[1].weight[3], net[1].bias[3] = -0.5 * net[1].weight[1], 0.5 * net[1].bias[1]
        net[1].eps = 1e-30
    found = channel_table(net, images())["1"]
    assert int(found.most_alike()[3]) == 1
    assert float(found.cosines()[3, 1]) == pytest.approx(1, abs=1e-6)
    assert float(found.output_correlations()[3, 1]) == pytest.approx(1, abs=1e-6)
    assert float(found.distances()[3, 1]) > 0.3, "the distance in (γ, β) does not see it"
    assert float(found.ratio(torch.tensor([3]), torch.tensor([1]))) == pytest.approx(0.5, abs=1e-6)


def test_pairs_are_counted() -> None:
    net = network()
    with torch.no_grad():
        net[1].weight.fill_(1.0)
        net[1].bias.fill_(0.0)
        for k in (2, 4):
            net[0].weight[k] = 2 * net[0].weight[0]
    counts = channel_table(net, images(), similar=0.01).pair_counts()
    assert counts.pairs == 15 + 6
    assert counts.close >= 15
    assert (counts.redundant, counts.clusters, counts.superfluous) == (3, 1, 2)
    strict = channel_table(net, images(), similar=0.01, correlated=1.0).pair_counts()
    assert strict.correlated <= counts.correlated


def test_frame_text_and_representation() -> None:
    table = channel_table(network(), images())
    frame = table.to_frame()
    assert list(frame.reset_index().columns) == list(COLUMNS)
    assert len(frame) == len(table) == 10
    assert frame.loc["4"]["product"].notna().all()
    text = str(table)
    assert re.search(r"^1 +6 ", text, re.MULTILINE)
    assert "pairs in one layer" in text
    assert repr(table).startswith("ChannelTable(10 channels in 2 layers")
    assert "<table" in table._repr_html_()


def test_a_constant_channel_has_an_infinite_ratio() -> None:
    net = network()
    with torch.no_grad():
        net[0].weight[2] = 0
    found = channel_table(net, images())["1"]
    assert found.eps_ratio[2] == torch.inf
    assert found.effective_gamma[2] == 0
    assert found.cosines().isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training: bool) -> None:
    net = nn.Sequential(*network(), nn.Dropout(0.5)).train(training)
    net[1].training = not training
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[3].weight.requires_grad_(False)
    before = fingerprint(net)
    channel_table(net, images())
    assert equal(before, fingerprint(net))
    with torch.inference_mode():
        inside = channel_table(net, images())
    assert equal(before, fingerprint(net))
    assert torch.equal(inside.joined("product"), channel_table(net, images()).joined("product"))


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UnsuitableError, match="no batch normalization with γ and β"):
        channel_table(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), draw(5, 3))
    with pytest.raises(ConfigurationError, match=r"correlated=2 must be a number between -1 and 1"):
        channel_table(network(), images(), correlated=2)
    with pytest.raises(ConfigurationError, match=r"similar='much' must be a number"):
        channel_table(network(), images(), similar="much")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="takes 3 channels"):
        channel_table(network(), draw(8, 2, 6, 6))
    with pytest.raises(ConfigurationError, match=r"Give a torch\.nn\.Module first"):
        channel_table(images(), network())  # type: ignore[arg-type]


def test_a_layer_that_does_not_run_is_left_out() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = network(), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    table = channel_table(Idle().double(), images())
    assert list(table.layers) == ["used.1", "used.4"]
    assert table.left_out == {"unused": "it did not run"}
    assert "unused: left out, it did not run" in str(table)


def test_a_layer_that_runs_twice_counts_both_passes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net(2 * x)

    net, x = Twice(), images()
    both = torch.cat([net.net[0](x), net.net[0](2 * x)]).detach().movedim(1, 0).flatten(1)
    found = channel_table(net, x)["net.1"]
    assert found.values == 2 * 8 * 36
    assert torch.allclose(found.eps_ratio, net.net[1].eps / both.var(1, correction=0), rtol=1e-12)
