"""BatchGeometryMonitor: every key against its definition, on the inputs that layers have in real trainings."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import BatchGeometryMonitor, OrthogonalityMonitor, RecordLogger, batch_geometry, read_record
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.geometry import kernel_fraction
from lightning_normgeo.probes.layer_inputs.probe import InputProbe
from lightning_normgeo.runs.records.record import Record
from support.projects import ConvNet, Project, Rows, images, sgd, trainer

LAYERS, NORMS = ("net.0", "net.3"), ("net.1", "net.4")


class Wide(nn.Sequential):
    """Two convolutions that are wider than the batch has positions, with batch normalization."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 20, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(20, eps=1e-3),
            nn.ReLU(),
            nn.Conv2d(20, 8, 3, stride=2, dilation=2, padding=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )


class Witness(Project):
    """A project that keeps the inputs, weights and pre-activations of its convolutions, in float64."""

    def __init__(self, net: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(sgd(**settings), Wide() if net is None else net)
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        row: dict[str, Any] = {}
        self.seen.append(row)
        hooks = []
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d):
                hooks.append(
                    layer.register_forward_hook(lambda m, a, y, name=name: row.update({name: kept(m, a[0], y)}))
                )
        loss = super().training_step(batch, batch_idx)
        for hook in hooks:
            hook.remove()
        return loss


def kept(layer: nn.Conv2d, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    columns = F.unfold(x.detach().double(), 3, layer.dilation, layer.padding, layer.stride).movedim(1, 0).flatten(1)
    weight = layer.weight.detach().double().flatten(1).clone()
    return {"X": columns, "W": weight, "x": x.detach().double().flatten(1), "y": y.detach().double()}


def fit(folder: Path, project: Project | None = None, *more: Any, **settings: Any) -> Record:
    torch.manual_seed(0)
    monitor = settings.pop("monitor", None) or BatchGeometryMonitor()
    record = RecordLogger(str(folder))
    project = project or Witness()
    double = settings.get("precision") == "64-true"
    data = settings.pop("data", None) or images(batch_size=4, dtype=torch.float64 if double else torch.float32)
    trainer(monitor, *more, logger=[record], **settings).fit(project, data)
    return read_record(record.folder)


def values(record: Record, key: str, layer: str | None = None) -> list[float]:
    if layer is not None:
        return [row[layer] for _, row in record.layers[f"batch_geometry/{key}"]]
    return [value for _, value in record.points(f"batch_geometry/{key}")]


def test_every_key_of_a_layer_is_its_definition(tmp_path: Path) -> None:
    project = Witness()
    record = fit(tmp_path, project, precision="64-true", steps=3)
    for step, row in enumerate(project.seen):
        for layer in LAYERS:
            columns, weight, h = row[layer]["X"], row[layer]["W"], row[layer]["x"]
            n, samples = columns.shape
            sigma = torch.cov(columns, correction=0)
            eigenvalues = torch.linalg.eigvalsh(sigma).flip(0)
            gap = (h @ h.T / h.square().sum() - torch.eye(len(h)).double() / len(h)).norm()
            share = kernel_fraction(weight, columns)
            rank = int(torch.linalg.matrix_rank(columns - columns.mean(1, keepdim=True)))
            assert rank == min(n, samples - 1) or layer == "net.3"
            expected = {
                "rank": rank,
                "rank_at_least": rank,
                "rank_over_bound": rank / min(n, samples - 1),
                "rank_over_inputs": rank / n,
                "samples_over_inputs": samples / n,
                "effective_rank": sigma.trace() ** 2 / sigma.square().sum(),
                "effective_rank_error": 0,
                "eigenvalue_residual": 0,
                **{f"eigenvalue_share_{k + 1}": eigenvalues[k] / sigma.trace() for k in range(4)},
                "kernel_share_mean": share.mean(),
                "kernel_share_max": share.max(),
                "orthogonality_gap": gap,
            }
            for key, value in expected.items():
                found = values(record, key, layer)[step]
                assert found == pytest.approx(float(value), rel=1e-8, abs=1e-9), (key, layer)
    assert values(record, "kernel_share_mean", "net.3")[0] > 0.5, "wider than the batch"
    assert values(record, "kernel_share_mean", "net.0") == [0, 0, 0]


def test_aggregates_are_over_the_chosen_layers(tmp_path: Path) -> None:
    record = fit(tmp_path, steps=1)
    both = {key: [values(record, key, layer)[0] for layer in LAYERS] for key in ("rank", "effective_rank")}
    for key, (a, b) in both.items():
        assert values(record, key) == pytest.approx([(a + b) / 2])
    for key, reduce in (("rank_over_inputs", min), ("samples_over_inputs", min), ("kernel_share_max", max)):
        assert values(record, key)[0] == pytest.approx(reduce(values(record, key, layer)[0] for layer in LAYERS))


def test_outputs_of_batch_normalizations_are_their_definitions(tmp_path: Path) -> None:
    project = Witness()
    with torch.no_grad():
        project.net[0].weight[:2] *= 1e-8  # two collapsed channels
        project.net[0].weight[2] *= 1e-2
    record = fit(tmp_path, project, precision="64-true", steps=1)
    reached, ratios = [], []
    for layer, norm, eps in (("net.0", "net.1", 1e-3), ("net.3", "net.4", 1e-5)):
        variance = project.seen[0][layer]["y"].var((0, 2, 3), correction=0)
        reached.append((variance / (variance + eps)).sqrt())
        ratios.append((eps / variance).clamp_max(1e7))
        assert values(record, "radius_reached_min", norm) == pytest.approx([reached[-1].min().item()], abs=1e-6)
        assert values(record, "epsilon_over_variance_max", norm) == pytest.approx([ratios[-1].max().item()], rel=1e-5)
        assert values(record, "collapsed_channels", norm) == [2 if norm == "net.1" else 0]
    radii, shares = torch.cat(reached), torch.cat(ratios)
    assert values(record, "collapsed_channels") == [2]
    assert values(record, "collapsed_share") == pytest.approx([2 / 28])
    assert values(record, "radius_reached_median") == pytest.approx([radii.quantile(0.5).item()], abs=1e-6)
    assert values(record, "epsilon_over_variance_median") == pytest.approx([shares.quantile(0.5).item()], rel=1e-5)


def test_probes_agree_with_what_is_exact(tmp_path: Path) -> None:
    data = images(128, 64)
    exact = fit(tmp_path / "exact", data=data, steps=2)
    probed = fit(tmp_path / "probed", data=data, steps=2, monitor=BatchGeometryMonitor(exact_up_to=30))
    for layer in LAYERS:
        true = values(exact, "effective_rank", layer)
        found, errors = values(probed, "effective_rank", layer), values(probed, "effective_rank_error", layer)
        for a, b, error in zip(true, found, errors, strict=True):
            assert abs(a - b) < 4 * error, "t distribution of 15 degrees of freedom"
            assert error < 0.1 * a
        lower, rank = values(probed, "rank_at_least", layer), values(exact, "rank", layer)
        assert all(0 < a <= b for a, b in zip(lower, rank, strict=True))
        leading = zip(
            values(probed, "eigenvalue_share_1", layer), values(exact, "eigenvalue_share_1", layer), strict=True
        )
        assert all(0.98 * b < a <= b * (1 + 1e-5) for a, b in leading)
    assert values(probed, "rank", "net.0") == values(exact, "rank", "net.0"), "its kernel was tested against all"
    assert "batch_geometry/rank_over_inputs" not in probed.metrics, "that of the other layer is not known"


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(192, 30, bias=False),
            nn.BatchNorm1d(30),
            nn.ReLU(),
            nn.Linear(30, 20),
            nn.BatchNorm1d(20),
            nn.Linear(20, 4),
        )


def test_a_linear_layer_has_one_vector_per_sample(tmp_path: Path) -> None:
    record = fit(tmp_path, Project(net=Mlp()), steps=2)
    assert values(record, "rank", "net.1") == [3, 3]
    assert values(record, "samples_over_inputs", "net.4") == pytest.approx([4 / 30] * 2)
    assert all(share == pytest.approx(1 - 3 / 192, abs=0.02) for share in values(record, "kernel_share_mean", "net.1"))
    assert set(record.layers["batch_geometry/rank"][0][1]) == {"net.1", "net.4"}


def test_two_values_per_channel_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(MeasurementWarning, match="2 batch normalizations have at most 2 values per channel") as said:
        fit(tmp_path, Project(net=Mlp()), data=images(16, 2), steps=3)
    assert len([one for one in said if issubclass(one.category, MeasurementWarning)]) == 1


LOOPS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.01},
    "momentum": {"project": lambda: Witness(momentum=0.9)},
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_the_first_batch_of_each_step_is_measured(tmp_path: Path, loop: dict[str, Any]) -> None:
    settings = {**loop}
    project = settings.pop("project", Witness)()
    record = fit(tmp_path, project, steps=3, **settings)
    every = settings.get("accumulate_grad_batches", 1)
    assert len(project.seen) == 3 * every
    for step in range(3):
        columns = project.seen[every * step]["net.3"]["X"]
        sigma = torch.cov(columns, correction=0)
        expected = float(sigma.trace() ** 2 / sigma.square().sum())
        assert values(record, "effective_rank", "net.3")[step] == pytest.approx(expected, rel=1e-5)


class Twice(nn.Module):
    """A convolution that runs twice on different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(self.norm(self.conv(x)).relu() ** 2)).mean((2, 3)))


def test_of_a_layer_that_runs_twice_the_first_run_is_measured(tmp_path: Path) -> None:
    record = fit(tmp_path, Project(net=Twice()), steps=1, data=images(4, 4))
    (x,) = (batch[0] for batch in images(4, 4))
    columns = F.unfold(x.double(), 3, padding=1).movedim(1, 0).flatten(1)
    sigma = torch.cov(columns, correction=0)
    expected = float(sigma.trace() ** 2 / sigma.square().sum())
    assert values(record, "effective_rank", "net.conv") == pytest.approx([expected], rel=1e-5)


class Checkpointed(Wide):
    """The same network in activation checkpoints."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_(self.reentrant and self.training)
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if isinstance(layer, nn.Conv2d) else layer(x)
        return x


class Reentrant(Checkpointed):
    reentrant = True


def channels_last() -> nn.Module:
    return Wide().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("net", [Checkpointed, Reentrant, channels_last])
def test_checkpoints_and_memory_formats_change_no_number(tmp_path: Path, net: Callable[[], nn.Module]) -> None:
    plain = fit(tmp_path / "plain", (torch.manual_seed(1), Project(net=Wide()))[1], steps=2)
    other = fit(tmp_path / "other", (torch.manual_seed(1), Project(net=net()))[1], steps=2)
    for key in ("rank", "effective_rank", "kernel_share_mean", "eigenvalue_share_1", "orthogonality_gap"):
        for layer in LAYERS:
            assert values(other, key, layer) == pytest.approx(values(plain, key, layer), rel=1e-4, abs=1e-6), key


def test_mixed_precision_is_measured_in_float32(tmp_path: Path) -> None:
    project = Witness()
    record = fit(tmp_path, project, precision="bf16-mixed", steps=2)
    for step in range(2):
        columns = project.seen[step]["net.3"]["X"]  # of the bfloat16 input
        sigma = torch.cov(columns, correction=0)
        expected = float(sigma.trace() ** 2 / sigma.square().sum())
        assert values(record, "effective_rank", "net.3")[step] == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_has_its_batch_normalizations_only(tmp_path: Path) -> None:
    project = Project(net=Wide())
    project.net.compile(backend="eager")
    with pytest.warns(MeasurementWarning, match="reads no inputs of layers under torch.compile"):
        record = fit(tmp_path, project, steps=2)
    assert len(values(record, "collapsed_channels")) == 2
    assert "batch_geometry/rank" not in record.metrics


def test_a_sharded_model_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_normgeo.callbacks.batch_geometry_monitor.sharding_of", lambda trainer: object())
    with pytest.warns(MeasurementWarning, match="BatchGeometryMonitor measures nothing: in a model sharded"):
        record = fit(tmp_path)
    assert not any(key.startswith("batch_geometry") for key in record.metrics)


def test_a_parametrized_weight_has_no_kernel_share_and_is_not_computed(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(1)
        layers = Wide()
        torch.nn.utils.parametrizations.spectral_norm(layers[3])
        return layers

    record = fit(tmp_path, observed := Project(net=net()), steps=2)
    assert values(record, "rank", "net.3")
    assert "net.3" not in record.layers["batch_geometry/kernel_share_mean"][0][1]
    torch.manual_seed(0)
    plain = Project(net=net())
    trainer(steps=2).fit(plain, images(batch_size=4))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, observed.state_dict()[name]), name


def test_inputs_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    x = torch.rand(12, 3, 8, 8)
    x[4:8] = torch.nan
    data = DataLoader(TensorDataset(x, torch.zeros(12, dtype=torch.long)), batch_size=4)
    monitor = BatchGeometryMonitor()
    with pytest.warns(MeasurementWarning) as said:
        record = fit(tmp_path, data=data, steps=2, monitor=monitor)
    assert any("its input is not finite" in str(one.message) for one in said)
    assert len(values(record, "rank", "net.0")) == 1
    assert monitor.left_out["its input is not finite"] == 2


def test_a_model_without_readable_layers_says_so(tmp_path: Path) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    with pytest.warns(MeasurementWarning, match="reads no inputs: Project has no linear or convolution layer"):
        fit(tmp_path, Project(net=nn.Sequential(nn.Flatten(), Own(192, 4))), steps=1)


def test_a_layer_in_evaluation_mode_is_not_read(tmp_path: Path) -> None:
    class Frozen(Project):
        def on_train_epoch_start(self) -> None:
            self.net.eval()

    with pytest.warns(MeasurementWarning) as said:
        record = fit(tmp_path, Frozen(net=Wide()), steps=2)
    assert any("none of the chosen layers ran in training mode" in str(one.message) for one in said)
    assert not any(key.startswith("batch_geometry") for key in record.metrics)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 1}, "probes=1 must be an integer, at least 2"),
        ({"exact_up_to": 0}, "exact_up_to=0 must be an integer, at least 1"),
        ({"seed": -1}, "seed=-1 must be an integer, at least 0"),
        ({"every_n_steps": 0}, "must be an integer, at least 1"),
        ({"wandb_keys": "some"}, "choose one of"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BatchGeometryMonitor(**settings)


def test_a_glob_that_matches_nothing_is_refused_before_training() -> None:
    with pytest.raises(ConfigurationError, match=r"'\*conv9' matches none of the 5 layers"):
        trainer(BatchGeometryMonitor(layers="*conv9")).fit(Project(), images())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 1), "bn1": nn.BatchNorm2d(4)}))
        self.fc = nn.Linear(4, 4)


def test_default_layers() -> None:
    def chosen(net: nn.Module) -> set[str]:
        monitor, project = BatchGeometryMonitor(), Project(net=net)
        monitor._prepare(trainer(), project)
        return set(monitor.chosen()["batch_geometry"])

    assert chosen(Blocks()) == {"net.layer1.0.conv1", "net.layer1.0.bn1"}
    assert chosen(ConvNet()) == {"net.0", "net.1", "net.3", "net.4"}, "the last layer feeds no batch normalization"
    assert chosen(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))) == {"net.0", "net.1", "net.2"}


def test_inputs_are_read_at_the_cadence_of_this_monitor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    original = InputProbe._measured
    monkeypatch.setattr(
        InputProbe, "_measured", lambda self, name, noted: (reads.append(name), original(self, name, noted))[1]
    )
    rows = Rows()
    trainer(OrthogonalityMonitor(1), BatchGeometryMonitor(3), steps=7, logger=[rows]).fit(Project(), images())
    assert reads == [*LAYERS, *LAYERS]
    measured = [step for step, metrics in rows.rows if "batch_geometry/rank" in metrics]
    assert measured == [2, 5]


def test_no_input_is_kept_after_its_step() -> None:
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watching(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0] + 0
            kept.append(weakref.ref(x.untyped_storage()))
            return F.cross_entropy(self(x), batch[1])

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            alive.append(sum(one() is not None for one in kept))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            hooks.append(sum(len(layer._forward_hooks) for layer in self.net))

    hooks: list[int] = []
    trainer(BatchGeometryMonitor(2), steps=6).fit(Watching(), images())
    assert alive == [0] * 6
    assert hooks == [0, 4, 0, 4, 0, 4], "two convolutions and two batch normalizations, in measured steps"


def test_a_probe_is_shared_and_the_first_monitor_decides(tmp_path: Path) -> None:
    record = fit(tmp_path, None, BatchGeometryMonitor(layers="net.0", exact_up_to=2), steps=2)
    assert values(record, "effective_rank_error", "net.3") == [0, 0]


def test_values_agree_with_the_library_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    project = Project(net=Wide())
    (x, _), *_ = images(batch_size=4)
    found = batch_geometry(project.net.train(), x)
    record = fit(tmp_path, project, steps=1)
    rank = found["3"].inputs.spectrum.effective_rank.item()
    assert values(record, "effective_rank", "net.3") == [pytest.approx(rank, rel=1e-8)]  # nine digits are recorded
    assert values(record, "rank", "net.3") == [found["3"].inputs.rank.item()]


class PerSample(Project):
    """Project that needs the gradients of each sample, or its loss alone."""

    def __init__(self, in_training: bool = False) -> None:
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
        super().__init__(net=nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), *pooled))
        self.in_training = in_training

    def loss(self, parameters: Any, x: Tensor, label: Tensor) -> Tensor:
        scores = torch.func.functional_call(self.net, parameters, (x[None],))
        return F.cross_entropy(scores, label[None])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = dict(self.net.named_parameters())
        mapped = torch.func.vmap(torch.func.grad(self.loss), in_dims=(None, 0, 0))
        mapped({name: weight.detach() for name, weight in weights.items()}, *batch)
        if self.in_training:
            found: Tensor = torch.func.vmap(self.loss, in_dims=(None, 0, 0))(weights, *batch).mean()
            return found
        return super().training_step(batch, batch_idx)


VMAPPED = "it ran under torch.func.vmap, which gives it one sample of a batch"


def test_layers_that_run_under_vmap_alone_are_left_out_with_the_reason(tmp_path: Path) -> None:
    monitor = BatchGeometryMonitor(layers="*")
    with pytest.warns(MeasurementWarning) as said:
        record = fit(tmp_path, PerSample(in_training=True), steps=2, monitor=monitor)
    mine = [str(one.message) for one in said if isinstance(one.message, MeasurementWarning)]
    assert mine == [f"No inputs of layers could be read, so that nothing is known about Σ_X: {VMAPPED}."]
    assert monitor.left_out[VMAPPED] == 2 * 2 * 2, "layers, runs and steps"
    assert not any(key.startswith("batch_geometry") for key in record.metrics)


def test_layers_that_run_under_vmap_first_are_measured_afterwards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    project = PerSample()
    found = batch_geometry(project.net.train(), next(iter(images(batch_size=4)))[0])
    record = fit(tmp_path, project, steps=1, monitor=BatchGeometryMonitor(layers="*"))
    for name in ("0", "5"):
        assert values(record, "rank", f"net.{name}") == [found[name].inputs.rank.item()]


class Adapted(nn.Module):
    """Adapter that computes with the weight of a layer and a part of low rank, without calling the layer."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.added = nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base._conv_forward(x, self.base.weight + self.added, None)


@pytest.mark.parametrize(
    ("evaluates", "reason"),
    [
        (False, "none of the chosen layers was called; another module may compute with their weights, as an adapter"),
        (True, "none of the chosen layers ran in training mode"),
    ],
)
def test_the_reason_why_no_layer_was_read_is_true(evaluates: bool, reason: str, tmp_path: Path) -> None:
    net = Wide()
    for place in (0, 3):
        net[place] = net[place] if evaluates else Adapted(net[place])

    class Kept(Project):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].train(not evaluates)
            self.net[3].train(not evaluates)

    with pytest.warns(MeasurementWarning, match=f"nothing is known about Σ_X: {reason}"):
        fit(tmp_path, Kept(net=net), steps=1)


class Empty(Wide):
    """Network whose convolutions get no samples at first, and then all of them by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        self[0](x[:0])
        for layer in self:
            x = layer(input=x)
        return x


def test_inputs_given_by_keyword_are_read_and_empty_ones_are_not(tmp_path: Path) -> None:
    record, expected = (
        fit(tmp_path / kind.__name__, (torch.manual_seed(1), Project(net=kind()))[1], steps=2) for kind in (Empty, Wide)
    )
    for layer in LAYERS:
        assert values(record, "effective_rank", layer) == values(expected, "effective_rank", layer)
