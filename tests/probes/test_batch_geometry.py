"""batch_geometry: one call on anybody's model, without side effects, and its tables."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from lightning_normgeo import batch_geometry
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.geometry import covariance_rank, patch_columns
from lightning_normgeo.probes.layer_inputs.layers import before_batch_norms, readable_layers
from support.projects import ConvNet
from support.tensors import draw


def state(module: nn.Module) -> Any:
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in module.named_modules()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    return copy.deepcopy((module.state_dict(), hooks, gradients, torch.get_rng_state()))


def test_a_call_leaves_the_model_and_random_numbers_as_they_were() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(ConvNet(), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    x = torch.rand(4, 3, 8, 8)
    network(x).sum().backward()
    before = state(network)
    for exact_up_to in (640, 4):
        batch_geometry(network, x, exact_up_to=exact_up_to)
    after = state(network)
    assert before[1] == after[1]
    for a, b in ((before[0], after[0]), (before[2], after[2])):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(before[3], after[3])


def test_ranks_of_a_resnet_are_those_of_its_patches() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10).double().train()
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in readable_layers(network).items():
        layer.register_forward_hook(lambda m, args, y, name=name: inputs.update({name: args[0].detach()}))
    found = batch_geometry(network, draw(2, 3, 32, 32))
    assert list(found.layers) == list(readable_layers(network))
    assert len(found) == 21
    for name in ("conv1", "layer1.0.conv1", "layer2.0.downsample.0", "layer4.1.conv2"):
        layer = network.get_submodule(name)
        columns = patch_columns(inputs[name], layer.kernel_size, layer.stride[0], layer.padding[0])
        assert found[name].inputs.rank.item() == covariance_rank(columns), name
    assert found["fc"].inputs.bound == 1


def test_text_and_frames() -> None:
    torch.manual_seed(0)
    found = batch_geometry(ConvNet().train(), torch.rand(2, 3, 8, 8))
    assert repr(found) == "BatchGeometry(3 layers, 2 batch normalizations)"
    text = str(found)
    assert [line.split()[0] for line in text.splitlines() if line[:1].isdigit()] == ["0", "3", "8", "1", "4"]
    assert "bound = min(n, N - 1)" in text
    frame, norms = found.to_frame(), found.batch_norms_frame()
    assert list(frame.index) == ["0", "3", "8"]
    assert frame.loc["0", ["n", "N", "rank", "bound"]].tolist() == [27, 128, "27", 27]
    assert norms.loc["4", ["N", "channels", "collapsed"]].tolist() == [128, 8, 0]
    assert "<table" in found._repr_html_()


def test_unknown_ranks_are_shown_as_bounds() -> None:
    text = str(batch_geometry(ConvNet().train(), torch.rand(4, 3, 8, 8), exact_up_to=20))
    (row,) = (line for line in text.splitlines() if line.startswith("3 "))
    assert "≥ 19" in row
    assert row.count("–") == 2, "no kernel shares"


def test_pairs_are_noted() -> None:
    network = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    assert "at most two values per channel" in str(batch_geometry(network, torch.rand(2, 5)))
    assert "at most two values per channel" not in str(batch_geometry(network, torch.rand(3, 5)))


def test_layers_of_a_glob() -> None:
    assert list(batch_geometry(ConvNet().train(), torch.rand(2, 3, 8, 8), layers="[03]").layers) == ["0", "3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "conv*"}, r"layers='conv\*' matches none of the 3 linear and convolution layers"),
        ({"probes": 1}, "probes=1 must be an integer, at least 2"),
        ({"example_batch": torch.rand(2, 4)}, "cannot take the example batch"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        batch_geometry(**{"module": ConvNet().train(), "example_batch": torch.rand(2, 3, 8, 8), **settings})


def test_evaluation_mode_says_that_nothing_is_read() -> None:
    with pytest.warns(MeasurementWarning, match="none of the chosen layers ran in training mode"):
        found = batch_geometry(ConvNet().eval(), torch.rand(2, 3, 8, 8))
    assert str(found) == "no layer"


def test_layers_in_front_of_batch_normalizations() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.BatchNorm2d(5),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 6, 3)),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 2, 3),
        nn.BatchNorm2d(7),
    )
    assert before_batch_norms(network) == ["0", "5"]


def test_layers_with_a_forward_of_their_own_are_not_read() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Padded(nn.Conv2d):
        def _conv_forward(self, x: Any, weight: Any, bias: Any) -> torch.Tensor:
            return super()._conv_forward(nn.functional.pad(x, (1, 0)), weight, bias)

    layers = nn.Sequential(Standardized(3, 4, 3), Padded(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4))
    assert list(readable_layers(layers)) == ["3"]
