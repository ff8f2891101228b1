"""SymmetryMonitor: charges, drifts and joint norms of all scale symmetries, against independent sums over elements."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, RecordLogger, SymmetryMonitor, read_record
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.runs.records.record import Record
from support.projects import ConvNet, Project, images, sgd, trainer

WIDTH, HEADS = 8, 2


class Block(nn.Module):
    """A pre-norm transformer block with packed queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=1e-30)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-30)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small vision transformer: rows of pixels are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH, eps=1e-30)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.permute(0, 2, 1, 3).flatten(2))
        return self.head(self.norm(self.blocks(tokens)).mean(1))


WRITERS = ("embed", "out", "down")
QUERIES_AGAINST_KEYS = "8× net.blocks.0.qkv.weight[i], net.blocks.0.qkv.bias[i] against net.blocks.0.qkv.weight[8 + i]"


class Witness(pl.Callback):
    """Weights and gradients before each optimizer step, and weights after it."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = dict(pl_module.named_parameters())
        self.before.append({name: p.detach().clone() for name, p in named.items()})
        self.gradients.append({name: p.grad.clone() for name, p in named.items()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if len(self.after) < len(self.before):
            self.after.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def fit(folder: Path, net: nn.Module | None = None, *more: Any, optimizers: Any = None, **settings: Any) -> Record:
    torch.manual_seed(0)
    project = Project(optimizers or sgd(lr=0.05), Transformer() if net is None else net)
    record = RecordLogger(str(folder))
    double = settings.pop("precision", "64-true")
    data = images(dtype=torch.float64 if double == "64-true" else torch.float32)
    trainer(SymmetryMonitor(), *more, logger=[record], precision=double, **settings).fit(project, data)
    return read_record(record.folder)


def test_charges_vanish_and_their_terms_do_not(tmp_path: Path) -> None:
    metrics = fit(tmp_path).metrics
    assert max(value for _, value in metrics["symmetry/max_charge"]) < 1e-12
    assert min(value for _, value in metrics["symmetry/max_uncanceled"]) > 0.1
    assert len(metrics["symmetry/max_charge"]) == 4


def test_a_gain_of_one_number_per_filter_has_no_charge_of_its_own(tmp_path: Path) -> None:
    """Its gradient is zero up to rounding, so that the charge over its bound would be 1."""
    net = nn.Sequential(
        weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4, eps=1e-60), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )
    net(next(iter(images()))[0])
    assert max(value for _, value in fit(tmp_path, net.double()).metrics["symmetry/max_charge"]) < 1e-12


def test_one_family_against_its_definition(tmp_path: Path) -> None:
    witness = Witness()
    record = fit(tmp_path, None, witness)
    before, after = witness.before[0], witness.after[0]
    gradient = witness.gradients[0]
    weight, bias = "net.blocks.0.qkv.weight", "net.blocks.0.qkv.bias"
    quantity, size, noise, change = [], [], [], []
    for i in range(WIDTH):
        rows = {+1: (weight, i), -1: (weight, WIDTH + i)}
        sums = {
            sign: [table[name][row].square().sum() for table in (before, after, gradient)]
            for sign, (name, row) in rows.items()
        }
        plus = [table[bias][i].square() for table in (before, after, gradient)]
        one = [sums[+1][k] + plus[k] - sums[-1][k] for k in range(3)]
        quantity.append(one[0])
        size.append(sums[+1][0] + plus[0] + sums[-1][0])
        change.append(one[1] - one[0])
        noise.append(0.05**2 * one[2])
    q, s, dq, n = (torch.stack(values) for values in (quantity, size, change, noise))
    found = _family(record, QUERIES_AGAINST_KEYS)
    assert found["symmetry/imbalance"] == pytest.approx(float((q / s).abs().mean()), rel=1e-8)
    assert found["symmetry/increment"] == pytest.approx(float((q.sign() * dq / s).mean()), rel=1e-8)
    assert found["symmetry/noise"] == pytest.approx(float((q.sign() * n / s).mean()), rel=1e-8)


def _family(record: Record, family: str) -> dict[str, float]:
    """Return the values of a family at the first step, by metric key."""
    return {key: rows[0][1][family] for key, rows in record.layers.items() if family in rows[0][1]}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_increment_is_noise_and_decay_under_plain_sgd(tmp_path: Path, decay: float) -> None:
    metrics = fit(tmp_path, optimizers=sgd(lr=0.05, weight_decay=decay)).metrics
    for (_, whole), (_, noise), (_, decayed) in zip(
        metrics["symmetry/increment"], metrics["symmetry/noise"], metrics["symmetry/decay"], strict=True
    ):
        square = (0.05 * decay) ** 2  # of weight decay itself, η²λ²Q
        assert whole == pytest.approx(noise + decayed, abs=square + 1e-14)
        assert abs(whole) > 1e-8


def test_the_stream_is_one_vector(tmp_path: Path) -> None:
    witness = Witness()
    metrics = fit(tmp_path, None, witness).metrics
    stream = [name for name in witness.before[0] if any(f".{writer}." in name for writer in WRITERS)]
    assert len(stream) == 10
    old, new = (torch.cat([table[0][name].flatten() for name in stream]) for table in (witness.before, witness.after))
    angle = math.acos(min(1.0, float(F.cosine_similarity(old, new, dim=0))))
    assert metrics["symmetry/joint_norm"][0][1] == pytest.approx(float(old.norm()), rel=1e-12)
    assert metrics["symmetry/joint_angular_update"][0][1] == pytest.approx(angle, rel=1e-6)
    assert metrics["symmetry/joint_effective_lr"][0][1] == pytest.approx(0.05 / float(old.square().sum()), rel=1e-12)


def adamw(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


LOOPS: dict[str, Callable[[], dict[str, Any]]] = {
    "adamw": lambda: {"optimizers": adamw},
    "momentum": lambda: {"optimizers": sgd(momentum=0.9, nesterov=True)},
    "accumulate": lambda: {"accumulate_grad_batches": 2},
    "clipped": lambda: {"gradient_clip_val": 0.01},
}


@pytest.mark.parametrize("settings", LOOPS.values(), ids=LOOPS.keys())
def test_charges_vanish_in_every_loop(tmp_path: Path, settings: Callable[[], dict[str, Any]]) -> None:
    metrics = fit(tmp_path, **settings()).metrics
    assert max(value for _, value in metrics["symmetry/max_charge"]) < 1e-12


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-5), ("bf16-mixed", 0.1)])
def test_rounding_in_other_precisions(tmp_path: Path, precision: str, bound: float) -> None:
    metrics = fit(tmp_path, precision=precision).metrics
    assert max(value for _, value in metrics["symmetry/max_charge"]) < bound


def test_units_are_symmetries_too(tmp_path: Path) -> None:
    net = ConvNet(eps=1e-30)
    metrics = fit(tmp_path, net, OrthogonalityMonitor(), NormGrowthMonitor()).metrics
    alone = [value for _, value in metrics["symmetry/max_charge_alone"]]
    assert alone == pytest.approx([value for _, value in metrics["orthogonality/max_abs_cos"]], rel=1e-3, abs=1e-15)
    assert max(alone) < 1e-12


def test_a_network_without_symmetries_gets_one_warning(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh())
    with pytest.warns(MeasurementWarning, match="found no scale symmetry") as said:
        metrics = fit(tmp_path, net).metrics
    assert len([one for one in said if issubclass(one.category, MeasurementWarning)]) == 1
    assert not any(key.startswith("symmetry") for key in metrics)


def test_families_that_the_numbers_refute_are_left_out(tmp_path: Path) -> None:
    net = Transformer()
    net.blocks[0].qkv.weight.register_hook(lambda gradient: gradient + 0.1 * torch.ones_like(gradient))
    with pytest.warns(MeasurementWarning, match="left out from here on") as said:
        record = fit(tmp_path, net)
    assert len([one for one in said if issubclass(one.category, MeasurementWarning)]) == 1
    assert max(value for _, value in record.metrics["symmetry/max_charge"]) < 1e-12
    assert not _family(record, QUERIES_AGAINST_KEYS)


def test_clipping_by_value_refutes_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        metrics = fit(tmp_path, gradient_clip_val=1e-3, gradient_clip_algorithm="value").metrics
    assert max(value for _, value in metrics["symmetry/max_charge"]) > 1e-3


def test_at_most_twelve_keys(tmp_path: Path) -> None:
    record = fit(tmp_path)
    keys = {key for key in record.metrics if key.startswith("symmetry/") and key.count("/") == 1}
    assert 8 <= len(keys) <= 12


def test_a_sharded_model_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_normgeo.callbacks.symmetry_monitor.sharding_of", lambda trainer: object())
    with pytest.warns(MeasurementWarning, match="SymmetryMonitor measures nothing: in a model sharded by fully_shard"):
        metrics = fit(tmp_path).metrics
    assert not any(key.startswith("symmetry") for key in metrics)


def test_each_of_several_optimizers_is_read(tmp_path: Path) -> None:
    class Two(Project):
        def __init__(self) -> None:
            super().__init__(net=nn.ModuleDict({"a": Transformer(), "b": Transformer()}))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, net in zip(self.optimizers(), self.net.values(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), lr=0.05) for net in self.net.values()]

    torch.manual_seed(0)
    record = RecordLogger(str(tmp_path))
    run = trainer(SymmetryMonitor(), logger=[record], precision="64-true", steps=8)
    run.fit(Two(), images(dtype=torch.float64))
    families = read_record(record.folder).layers["symmetry/max_charge"][0][1]
    assert {name.split("net.")[1][0] for name in families} == {"a", "b"}
    assert max(families.values()) < 1e-12


def test_a_stream_that_two_optimizers_move_is_one_vector(tmp_path: Path) -> None:
    class Halves(Project):
        def __init__(self) -> None:
            super().__init__(net=Transformer())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            first.step()
            second.step()

        def configure_optimizers(self) -> Any:
            matrices = [p for p in self.parameters() if p.ndim == 2]
            vectors = [p for p in self.parameters() if p.ndim < 2]
            return [torch.optim.SGD(matrices, lr=0.05), torch.optim.SGD(vectors, lr=0.05)]

    alone = fit(tmp_path / "alone").metrics
    torch.manual_seed(0)
    record = RecordLogger(str(tmp_path / "two"))
    run = trainer(SymmetryMonitor(), logger=[record], precision="64-true", steps=8)
    run.fit(Halves(), images(dtype=torch.float64))
    metrics = read_record(record.folder).metrics
    for key in ("max_uncanceled", "imbalance", "increment", "joint_norm", "joint_angular_update", "joint_effective_lr"):
        values, expected = ([v for _, v in table[f"symmetry/{key}"]] for table in (metrics, alone))
        assert values[:4] == pytest.approx(expected, rel=1e-9), key
    assert max(value for _, value in metrics["symmetry/max_charge"]) < 1e-12


class DeadUnits(nn.Sequential):
    """Perceptron of which some units have no gradient, a zero weight, or zeros on both sides of a rescaling."""

    def __init__(self) -> None:
        first, second = nn.Linear(192, 8), nn.Linear(8, 8, bias=False)
        norm, last = nn.BatchNorm1d(8, eps=1e-30), nn.Linear(8, 4)
        with torch.no_grad():
            for tensor in (first.weight[2], first.bias[2:3], second.weight[:, 2], norm.weight[4:5], last.weight[:, 4]):
                tensor.zero_()
            norm.bias[1] = -100.0
        super().__init__(nn.Flatten(), first, nn.ReLU(), second, norm, nn.ReLU(), last)


def test_dead_units_leave_the_others_measured(tmp_path: Path) -> None:
    """A generator without weights or gradients has no charge, and one without weights no imbalance."""
    witness = Witness()
    record = fit(tmp_path, DeadUnits(), witness)
    for key in ("max_charge", "max_charge_alone", "max_charge_rescaling", "max_uncanceled"):
        values = [value for _, value in record.metrics[f"symmetry/{key}"]]
        assert len(values) == 4, key
        assert max(values) < 1e-12 if "charge" in key else min(values) > 0.1, key
    for key in ("imbalance", "increment", "noise", "decay"):
        assert len(record.metrics[f"symmetry/{key}"]) == 4, key
    weights = witness.before[0]
    incoming = weights["net.1.weight"].square().sum(1) + weights["net.1.bias"].square()
    outgoing = weights["net.3.weight"].square().sum(0)
    shares = ((incoming - outgoing) / (incoming + outgoing)).abs()
    found = _family(record, "8× net.1.weight[i], net.1.bias[i] against net.3.weight[:, i]")
    assert found["symmetry/imbalance"] == pytest.approx(float(shares.nanmean()), rel=1e-8)


class SparseRows(nn.Module):
    """Network with an embedding that has sparse gradients, and two empty layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 8, sparse=True), nn.BatchNorm1d(8, eps=1e-30)
        self.hidden, self.last, self.empty = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 0)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table((x.flatten(1)[:, 0].abs() * 5).long().clamp(max=19))
        y = self.last(self.hidden(self.norm(rows)).relu())
        return y + self.empty(y).sum()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_with_sparse_gradients_are_left_out(tmp_path: Path) -> None:
    with pytest.warns(MeasurementWarning, match=r"net\.table\.weight is left out: its gradient is sparse") as said:
        record = fit(tmp_path, SparseRows(), OrthogonalityMonitor())
    assert [one.category for one in said].count(MeasurementWarning) == 1
    families = record.layers["symmetry/max_charge"][0][1]
    assert any("net.hidden.weight" in family for family in families)
    assert not any("net.table" in family for family in families)
    assert len(record.metrics["symmetry/max_charge"]) == 4


class ScaledByNorm(nn.Module):
    """Root mean square normalization by hand, whose ε the graph does not show to be a small number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-30)


def test_the_epsilon_of_a_normalization_by_hand_is_known(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8, bias=False), ScaledByNorm(), nn.Linear(8, 4))
    record = fit(tmp_path, net)
    assert "1× net.1.weight" in record.layers["symmetry/max_charge"][0][1]
    assert max(value for _, value in record.metrics["symmetry/max_charge"]) < 1e-12


class Moving(torch.optim.SGD):
    """An optimizer that moves the weights before it evaluates its closure."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return torch.enable_grad()(closure)()


def lbfgs(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(module.parameters(), lr=0.01, max_iter=2)


def moving(module: nn.Module) -> torch.optim.Optimizer:
    return Moving(module.parameters(), lr=0.01)


@pytest.mark.parametrize("optimizer", [lbfgs, moving])
def test_steps_that_no_gradient_describes_are_named_as_such(tmp_path: Path, optimizer: Callable[..., Any]) -> None:
    with pytest.warns(MeasurementWarning, match=r"explained, term_… and residual, and symmetry/\*") as said:
        metrics = fit(tmp_path, optimizers=optimizer).metrics
    assert len([one for one in said if issubclass(one.category, MeasurementWarning)]) == 1
    assert not any(key.startswith("symmetry") for key in metrics)
