"""Effective weights of whole models, against folded layers, dense operators, and sums over all paths."""

from __future__ import annotations

import itertools
import math
import random as python_random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_normgeo import EffectiveWeights, effective_weights, swap_norm
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.model.rescaled_model import RescaledModel

SIZE = 6


def images(batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def trained(
    module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64, eps: float | None = None
) -> nn.Module:
    """Return a model with random weights, γ, β and running statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2 and not name.endswith("original0"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eps = layer.eps if eps is None else eps
                layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator))
                layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.1)
    return module.eval()


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Block(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)


def residual(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    """Five convolutions with a normalization behind each, in two residual blocks, and a classifier ``fc``."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), norm(8), nn.ReLU(), Block(norm), Block(norm))
    net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    net.add_module("fc", nn.Linear(8, 4))
    return net


def dense(function: Any, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a function that is affine, from its values at the unit vectors."""
    with torch.no_grad():
        offset = function(torch.zeros(1, *shape).double()).flatten()
        units = torch.eye(math.prod(shape)).double()
        return torch.stack([function(unit.view(1, *shape)).flatten() - offset for unit in units], 1)


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0])


def test_each_row_is_that_of_the_folded_layer() -> None:
    """The effective operator is what convolution and batch normalization compute together."""
    net = trained(chain())
    found = effective_weights(net, images(), steps=80)
    assert [row.layer for row in found] == ["0", "3", "7"]
    for (conv, norm), shape in (((0, 1), (3, SIZE, SIZE)), ((3, 4), (5, 3, 3))):
        row, folded = found[str(conv)], nn.utils.fuse_conv_bn_eval(net[conv], net[norm])
        assert row.effective_norm == pytest.approx(float(folded.weight.detach().norm()), rel=1e-12)
        assert row.weight_norm == pytest.approx(float(net[conv].weight.detach().norm()), rel=1e-12)
        assert row.unit_norms.numpy() == pytest.approx(folded.weight.detach().flatten(1).norm(dim=1).numpy(), rel=1e-12)
        assert row.spectral_norm.value == pytest.approx(spectral(dense(net[conv], shape)), rel=1e-9)
        behind = dense(lambda x, a=net[conv], b=net[norm]: b(a(x)), shape)
        assert row.effective_spectral_norm.value == pytest.approx(spectral(behind), rel=1e-9)
        assert row.input_size == shape
        assert row.normalization == f"batch normalization {norm}"
        assert row.epsilon_ratio == pytest.approx(float((net[norm].eps / net[norm].running_var).median()), rel=1e-12)
    last = found["7"]
    assert last.effective_norm == last.weight_norm == pytest.approx(float(net[7].weight.detach().norm()), rel=1e-12)
    assert last.effective_spectral_norm.value == pytest.approx(spectral(net[7].weight.detach()), rel=1e-12)
    assert (last.normalization, last.note, last.epsilon_ratio) == ("none", "", None)


def test_the_identity_of_the_ellipsoid_holds_for_the_units_of_a_model() -> None:
    """W'Σ_X W'ᵀ = γ²σ²/(σ² + ε) with dense Σ_X, where the running variance is that of the batch."""
    x, net = images(), trained(chain())
    patches = F.unfold(x, 3, padding=1, stride=2).movedim(1, 0).flatten(1)
    with torch.no_grad():
        variance = net[0](x).var((0, 2, 3), unbiased=False)
        net[1].running_var.copy_(variance)
    sigma = torch.cov(patches, correction=0)
    row = effective_weights(net, x)["0"]
    gain = net[1].weight.detach() / (variance + net[1].eps).sqrt()
    effective = gain[:, None] * net[0].weight.detach().flatten(1)
    assert row.unit_norms.numpy() == pytest.approx(effective.norm(dim=1).numpy(), rel=1e-12)
    on_ellipsoid = ((effective @ sigma) * effective).sum(1)
    expected = net[1].weight.detach().square() * variance / (variance + net[1].eps)
    assert float((on_ellipsoid / expected - 1).abs().max()) <= 1e-12


def test_the_quantities_of_a_chain() -> None:
    net = trained(chain())
    found = effective_weights(net, images(), steps=80)
    rows = list(found)
    norms = [row.effective_norm for row in rows]
    assert found.quantities["weight_norm"] == pytest.approx(math.dist(norms, [0, 0, 0]), rel=1e-12)
    product = math.prod(row.effective_spectral_norm.value for row in rows)
    assert found.quantities["log10_spectral_product"] == pytest.approx(math.log10(product), rel=1e-12)
    product = math.prod(row.spectral_norm.value for row in rows)
    assert found.quantities["log10_spectral_product_raw"] == pytest.approx(math.log10(product), rel=1e-12)
    assert found.quantities["last_layer_norm"] == rows[-1].weight_norm
    assert found.quantities["epsilon_over_variance"] == max(row.epsilon_ratio for row in rows[:2])
    assert found.undefined == {}


def test_the_product_bounds_what_a_chain_does_to_any_change() -> None:
    net = trained(chain())
    bound = 10 ** effective_weights(net, images()).quantities["log10_spectral_product"]
    x = images(64)
    with torch.no_grad():
        for size in (1e-3, 1.0):
            step = size * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
            stretched = (net(x + step) - net(x)).norm(dim=1) / step.flatten(1).norm(dim=1)
            assert float(stretched.max()) <= bound


def sum_over_paths(matrices: list[Tensor]) -> float:
    """Σ over all paths of the product of squared weights, path by path."""
    sizes = [matrices[0].shape[1], *(len(matrix) for matrix in matrices)]
    matrices = [matrix.detach() for matrix in matrices]
    total = 0.0
    for path in itertools.product(*map(range, sizes)):
        weights = (float(m[b, a]) for m, a, b in zip(matrices, path, path[1:], strict=False))
        total += math.prod(weight**2 for weight in weights)
    return total


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.first((x - 0.5) / 0.25)))
        logits: Tensor = self.last(x + F.relu(self.inner(x)))
        return logits


def test_the_path_norm_is_the_sum_over_all_paths() -> None:
    """Also over a residual connection; a fixed transformation of the input is none of the weights."""
    net = trained(Residual())
    gain = net.bn.weight / (net.bn.running_var + net.bn.eps).sqrt()
    first, inner, last = net.first.weight, net.inner.weight, net.last.weight
    found = effective_weights(net, images(4)[:, :, 0, 0]).quantities
    for name, start in (("log10_path_norm", gain[:, None] * first), ("log10_path_norm_raw", first)):
        expected = sum_over_paths([start, inner, last]) + sum_over_paths([start, last])
        assert found[name] == pytest.approx(0.5 * math.log10(expected), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_longer_weights_have_the_same_effective_weights(dtype: torch.dtype) -> None:
    """Scale-invariant weights times 3, with running statistics to match: raw norms triple, effective ones stay."""
    torch.manual_seed(0)
    # ε is not rescaled: it has to be negligible for an exact statement, and 1e-5 shows its part
    net = trained(residual(), dtype=dtype, eps=1e-30 if dtype == torch.float64 else 1e-12)
    x = torch.randn(4, 3, 16, 16, dtype=dtype)
    before = effective_weights(net, x)
    with RescaledModel(net, net, x, factor=3.0).active():
        after = effective_weights(net, x)
    exact = 1e-10 if dtype == torch.float64 else 1e-6
    for row in before:
        again, factor = after[row.layer], 1 if row.layer == "fc" else 3
        assert again.weight_norm == pytest.approx(factor * row.weight_norm, rel=1e-6)
        assert again.spectral_norm.value == pytest.approx(factor * row.spectral_norm.value, rel=1e-6)
        assert again.effective_norm == pytest.approx(row.effective_norm, rel=exact)
        assert again.effective_spectral_norm.value == pytest.approx(row.effective_spectral_norm.value, rel=exact)
    for name in ("weight_norm", "log10_spectral_product", "log10_path_norm", "last_layer_norm"):
        assert after.quantities[name] == pytest.approx(before.quantities[name], rel=exact)
    raised = after.quantities["log10_spectral_product_raw"] - before.quantities["log10_spectral_product_raw"]
    assert raised == pytest.approx(5 * math.log10(3), rel=1e-6)


@pytest.mark.parametrize("norm", ["gn", "ln", "in", "gn+ws"])
def test_a_factor_of_the_sample_gives_no_effective_weight(norm: str) -> None:
    torch.manual_seed(0)
    net = residual()
    swap_norm(net, norm, example_batch=images(dtype=torch.float32))
    found = effective_weights(net, images(dtype=torch.float32))
    assert len(found) == 6
    for row in list(found)[:-1]:
        assert row.note == "depends on the sample"
        assert row.normalization.startswith(("group", "layer", "instance"))
        assert row.effective_norm is None
        assert row.effective_spectral_norm is None
        assert row.weight_norm > 0
    assert set(found.undefined) == {"weight_norm", "log10_spectral_product", "log10_path_norm"}
    assert "5 of 6 layers have no fixed weight (depends on the sample)" in found.undefined["weight_norm"]
    assert found.quantities.keys() >= {"weight_norm_raw", "log10_spectral_product_raw", "last_layer_norm"}


class WrittenOut(nn.Module):
    """A root mean square normalization that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        logits: Tensor = self.second(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8))
        return logits


def test_normalizations_that_are_written_out_are_found() -> None:
    found = effective_weights(WrittenOut(), torch.randn(4, 3))
    assert found["first"].note == "depends on the sample"
    assert found["second"].note == ""


@pytest.mark.parametrize("norm", ["wn", "ws", "cwn", "sn", "bn+ws", "bn+cwn", "bn+sn", "wn+mbn"])
def test_parametrized_weights_count_as_computed(norm: str) -> None:
    torch.manual_seed(0)
    net = chain()
    swap_norm(net, norm, example_batch=images(dtype=torch.float32))
    net = trained(net)
    found = effective_weights(net, images())
    for conv, after in ((0, 1), (3, 4)):
        row, computed = found[str(conv)], net[conv].weight.detach()
        assert row.weight_norm == pytest.approx(float(computed.norm()), rel=1e-12)
        gain = torch.ones(len(computed)).double()
        if norm.startswith("bn"):
            gain = (net[after].weight / (net[after].running_var + net[after].eps).sqrt()).detach()
            assert row.normalization == f"batch normalization {after}"
        else:
            assert row.normalization.startswith("mean-only" if norm == "wn+mbn" else ("weight", "centered", "spectral"))
        assert row.effective_norm == pytest.approx(float((computed.flatten(1) * gain[:, None]).norm()), rel=1e-12)
        assert row.note == ""


def test_normalizations_that_no_layer_takes_in_are_factors_of_their_own() -> None:
    net = trained(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    found = effective_weights(net, images()[:, :, 0, 0])
    assert [row.layer for row in found] == ["0", "1", "3", "4"]
    product = 0.0
    for row, layer in zip(found, (net[0], net[1], net[3], net[4]), strict=True):
        if isinstance(layer, nn.BatchNorm1d):
            largest = float((layer.weight.detach() / (layer.running_var + layer.eps).sqrt()).abs().max())
            assert row.effective_spectral_norm.value == pytest.approx(largest, rel=1e-12)
            assert row.is_normalization
            assert row.note.startswith("a factor of its own: ")
        product += math.log10(row.effective_spectral_norm.value)
    assert found.quantities["log10_spectral_product"] == pytest.approx(product, rel=1e-12)
    raw = sum(math.log10(spectral(layer.weight.detach())) for layer in (net[1], net[4]))
    assert found.quantities["log10_spectral_product_raw"] == pytest.approx(raw, rel=1e-12)
    gains = [layer.weight / (layer.running_var + layer.eps).sqrt() for layer in (net[0], net[3])]
    matrices = [net[1].weight, gains[1].diag(), net[4].weight]
    assert found.quantities["log10_path_norm"] == pytest.approx(0.5 * math.log10(sum_over_paths(matrices)), rel=1e-12)


def test_layers_that_run_twice_count_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(F.relu(self.layer(x)))
            return found

    net = Twice().double()
    found = effective_weights(net, images()[:, :, 0, 0])
    assert [row.calls for row in found] == [2]
    once = math.log10(spectral(net.layer.weight.detach()))
    assert found.quantities["log10_spectral_product"] == pytest.approx(2 * once, rel=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5, 5)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 5)),
        (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (3, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 6, 6)),
        (nn.Conv2d(3, 4, 1, padding=1), (3, 4, 4)),
        (nn.Conv2d(3, 4, 1, stride=2), (3, 5, 5)),
        (nn.Conv1d(3, 4, 3, stride=2), (3, 9)),
        (nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    ],
    ids=str,
)
def test_each_kind_of_layer_is_its_own_linear_map(layer: nn.Module, shape: tuple[int, ...]) -> None:
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape) + 1](layer.out_channels)
    net = trained(nn.Sequential(layer, norm))
    found = effective_weights(net, torch.randn(2, *shape).double(), steps=120)
    (row,) = found
    assert row.spectral_norm.value == pytest.approx(spectral(dense(layer, shape)), rel=1e-9)
    assert row.effective_spectral_norm.value == pytest.approx(spectral(dense(net, shape)), rel=1e-9)


def test_reasons_for_quantities_that_are_not_defined() -> None:
    x = images()
    smooth = trained(nn.Sequential(nn.Conv2d(3, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 2)))
    found = effective_weights(smooth, x)
    assert "the network is not homogeneous" in found.undefined["log10_path_norm"]
    assert "log10_spectral_product" in found.quantities
    slope = trained(nn.Sequential(nn.Conv2d(3, 2, 3), nn.PReLU(), nn.Flatten(), nn.Linear(32, 2)))
    assert (
        "parameters outside of linear layers and normalizations: 1.weight"
        in (effective_weights(slope, x).undefined["weight_norm"])
    )
    zero = trained(chain())
    nn.init.zeros_(zero[3].weight)
    assert effective_weights(zero, x).undefined["log10_spectral_product"] == "the linear map of 3 is zero"
    own = timm.layers.StdConv2d(3, 4, 3, padding=0)
    found = effective_weights(nn.Sequential(own, nn.Flatten(), nn.Linear(64, 2)).double(), x)
    assert found["0"].note == "its forward is its own"
    assert "its forward is its own" in found.undefined["weight_norm_raw"]
    assert "no linear" in effective_weights(nn.Sequential(nn.PReLU()), x.float()).undefined["weight_norm"]


def test_activations_inside_of_a_normalization() -> None:
    torch.manual_seed(0)
    joined = trained(nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4), nn.Flatten(), nn.Linear(64, 2)))
    apart = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)))
    with torch.no_grad():
        for one, other in zip(apart.state_dict().values(), joined.state_dict().values(), strict=True):
            one.copy_(other)
    assert effective_weights(joined, images()).quantities == effective_weights(apart, images()).quantities


class Shy(nn.Module):
    """A model that changes itself in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(chain(), nn.Dropout(0.5))
        self.register_buffer("passes", torch.zeros(1))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.seen.append(len(x))
        self.last = float(torch.rand(1) + np.random.rand() + python_random.random())  # noqa: NPY002
        found: Tensor = self.net(x)
        return found


@pytest.mark.parametrize("inference", [False, True])
def test_the_model_and_all_random_numbers_stay_bit_for_bit(inference: bool) -> None:
    net = trained(Shy()).train()
    net.net[0][0].eval()
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    net.net[0][3].weight.requires_grad_(False)

    def state() -> Any:
        tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
        return (
            [(id(t), t.clone()) for t in tensors],
            [p.requires_grad for p in net.parameters()],
            [(child.training, sorted(vars(child)), len(child._forward_pre_hooks)) for child in net.modules()],
            (torch.get_rng_state(), np.random.get_state()[1].tolist(), python_random.getstate()),  # noqa: NPY002
            list(net.seen),
        )

    before = state()
    with torch.inference_mode(inference):
        found = effective_weights(net, images())
    after = state()
    assert len(found) == 3
    for (one, a), (other, b) in zip(before[0], after[0], strict=True):
        assert one == other
        assert torch.equal(a, b)
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3][0], after[3][0])
    assert before[3][1:] == after[3][1:]
    assert before[4] == after[4]


def test_the_result_as_text_table_frame_and_plain_values() -> None:
    found = effective_weights(trained(chain()), images())
    text = str(found)
    assert text.splitlines()[0].split() == [
        "layer", "normalization", "input", "size", "‖W‖", "‖W'‖", "σmax(W)", "σmax(W')", "residual", "ε/σ²", "note",
    ]  # fmt: skip
    assert "batch normalization 1" in text
    assert "with residual connections it is no bound" in text
    assert repr(found).startswith("EffectiveWeights(3 layers, weight_norm=")
    frame = found.to_frame()
    assert list(frame.index) == ["0", "3", "7"]
    assert frame.loc["0", "‖W‖"] == found["0"].weight_norm
    assert "<table" in found._repr_html_()
    plain = found.as_dict()
    assert set(plain) == {"quantities", "undefined", "steps", "layers"}
    assert plain["layers"][0]["spectral_norm"] == found["0"].spectral_norm.value
    assert plain["layers"][0]["effective_spectral_residual"] == found["0"].effective_spectral_norm.residual
    assert len(found) == 3
    assert isinstance(found, EffectiveWeights)
    assert found[0] is found["0"]


def test_progress_names_each_layer() -> None:
    names: list[str] = []
    effective_weights(trained(chain()), images(), progress=names.append)
    assert names == ["0", "1", "3", "4", "7"]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"effective_weights\(module, example_batch\) got the class Linear"):
        effective_weights(nn.Linear, images())
    with pytest.raises(ConfigurationError, match="cannot take the example batch"):
        effective_weights(chain().double(), images()[:, :2])
    with pytest.raises(ConfigurationError, match="steps=0"):
        effective_weights(chain().double(), images(), steps=0)
    compiled = chain()
    compiled.compile()
    with pytest.raises(ConfigurationError, match="effective_weights cannot look into a compiled model"):
        effective_weights(compiled, images())


def test_weight_norm_of_torch_counts_as_computed() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)).double()
    row = effective_weights(net, images()[:, :, 0, 0])["0"]
    assert row.normalization == "weight normalization"
    assert row.effective_norm == pytest.approx(float(net[0].weight.detach().norm()), rel=1e-12)
