"""Monitors in real Trainers: what they log, where and when, and the settings they refuse."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    read_record,
)
from lightning_normgeo._lightning import BATCH_HOOKS
from lightning_normgeo.callbacks._monitors.session import Session
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.geometry import batch_norm_epsilon_inner, cosine
from support.projects import ConvNet, Project, Rows, images, sgd, trainer

MONITORS = [OrthogonalityMonitor, NormGrowthMonitor, AffineConvergenceMonitor]


def fit(tmp_path: Path, *callbacks: Any, project: Any = None, steps: int = 4, **settings: Any) -> Any:
    logger = RecordLogger(str(tmp_path))
    trainer(*callbacks, steps=steps, logger=logger, **settings).fit(project or Project(), images(160))
    return read_record(logger.folder)


def independent_cosines(project: Project, batch: Any) -> dict[str, torch.Tensor]:
    """Return |cos| per filter from a plain autograd computation, and the same without the ε part."""
    statistics: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(
            lambda m, a, o, name=name: statistics.update({name: a[0].var((0, 2, 3), unbiased=False)})
        )
        for name, layer in project.net.named_children()
        if isinstance(layer, nn.BatchNorm2d)
    ]
    project.zero_grad()
    nn.functional.cross_entropy(project(batch[0]), batch[1]).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for conv, norm in ((0, 1), (3, 4)):
        w, g = project.net[conv].weight.detach().flatten(1), project.net[conv].weight.grad.flatten(1)
        gamma = project.net[norm].weight
        part = batch_norm_epsilon_inner(
            gamma.detach(), gamma.grad, statistics[str(norm)].detach(), project.net[norm].eps
        )
        squares = (w * w).sum(1), (g * g).sum(1)
        inner = (w * g).sum(1)
        found[f"net.{conv}"] = cosine(inner, *squares).abs().max()
        found[f"net.{conv}/corrected"] = cosine(inner - part, *squares).abs().max()
    return found


def test_orthogonality_equals_an_independent_computation(tmp_path: Path) -> None:
    project = Project(net=ConvNet(eps=1e-3)).double()
    data = images(8, dtype=torch.float64)
    truth = independent_cosines(copy.deepcopy(project), next(iter(data)))
    logger = RecordLogger(str(tmp_path))
    fit = trainer(OrthogonalityMonitor(layers="*"), logger=logger, steps=1, precision="64-true")
    fit.fit(project, data)
    metrics = read_record(logger.folder).metrics
    for layer in ("net.0", "net.3"):
        assert metrics[f"orthogonality/max_abs_cos/{layer}"][0][1] == pytest.approx(float(truth[layer]), rel=1e-9)
        assert metrics[f"orthogonality/max_abs_cos_corrected/{layer}"][0][1] < 1e-12
    assert 1e-6 < metrics["orthogonality/max_abs_cos"][0][1] < 0.1, "the epsilon part is really there"
    assert metrics["orthogonality_control/max_abs_cos"][0][1] > 1e-3


def test_norm_growth_sums_over_units_and_steps(tmp_path: Path) -> None:
    project = Project(sgd(momentum=0.9, weight_decay=0.01)).double()
    start = sum(float(project.net[i].weight.detach().square().sum()) for i in (0, 3))
    logger = RecordLogger(str(tmp_path))
    data = images(160, dtype=torch.float64)
    trainer(NormGrowthMonitor(), logger=logger, steps=20, precision="64-true").fit(project, data)
    end = sum(float(project.net[i].weight.detach().square().sum()) for i in (0, 3))
    metrics = {key: [value for _, value in points] for key, points in read_record(logger.folder).metrics.items()}
    assert len(metrics["norm_growth/increment"]) == 20
    assert sum(metrics["norm_growth/increment"]) == pytest.approx(end - start, rel=1e-10)
    assert sum(metrics["norm_growth/explained"]) == pytest.approx(end - start, rel=1e-9)
    assert metrics["norm_growth/weight_norm"][0] == pytest.approx(start**0.5, rel=1e-12)
    terms = [sum(metrics[f"norm_growth/term_{t}"]) for t in ("gradient", "momentum", "weight_decay", "quadratic")]
    assert sum(terms) == pytest.approx(sum(metrics["norm_growth/explained"]), rel=1e-12)
    for step in range(20):
        assert abs(metrics["norm_growth/residual"][step]) <= metrics["norm_growth/storage_floor"][step]


def test_plain_sgd_follows_equation_16(tmp_path: Path) -> None:
    project = Project(sgd(lr=0.5), net=ConvNet(eps=1e-40)).double()
    logger = RecordLogger(str(tmp_path))
    data = images(160, dtype=torch.float64)
    trainer(NormGrowthMonitor(), logger=logger, precision="64-true").fit(project, data)
    metrics = read_record(logger.folder).metrics
    for (_, predicted), (_, measured) in zip(
        metrics["norm_growth/predicted"], metrics["norm_growth/increment"], strict=True
    ):
        assert measured == pytest.approx(predicted, rel=1e-9)
        assert measured > 0


def test_affine_convergence_equals_an_independent_computation(tmp_path: Path) -> None:
    project = Project()
    nn.init.uniform_(project.net[1].weight)
    nn.init.uniform_(project.net[1].bias)
    data = images(8)
    y = project.net[0](next(iter(data))[0])
    gap = (project.net[1].weight.square() - y.var((0, 2, 3), unbiased=False)).abs().detach()
    shift = (project.net[1].bias - y.mean((0, 2, 3))).abs().detach()
    monitor = AffineConvergenceMonitor(layers=["net.1"])
    metrics = fit_once(tmp_path, monitor, project, data)
    assert metrics["affine/abs_gamma2_minus_sigma2_mean/net.1"] == pytest.approx(gap.mean().item(), rel=1e-5)
    assert metrics["affine/abs_beta_minus_mu_mean/net.1"] == pytest.approx(shift.mean().item(), rel=1e-5)
    channel = monitor.channel("net.1", 6)
    assert metrics["affine/abs_gamma2_minus_sigma2_channel/net.1"] == pytest.approx(gap[channel].item(), rel=1e-4)


def fit_once(tmp_path: Path, monitor: Any, project: Any, data: Any) -> dict[str, float]:
    logger = RecordLogger(str(tmp_path))
    trainer(monitor, logger=logger, steps=1).fit(project, data)
    return {key: points[0][1] for key, points in read_record(logger.folder).metrics.items()}


@pytest.mark.parametrize("every", [1, 2, 3, None])
def test_steps_are_those_of_lightning(every: int | None, tmp_path: Path) -> None:
    record = fit(tmp_path, NormGrowthMonitor(every), AffineConvergenceMonitor(every), steps=7, log_every_n_steps=2)
    n = every or 2
    expected = [step for step in range(7) if (step + 1) % n == 0]
    assert [step for step, _ in record.metrics["norm_growth/increment"]] == expected
    assert [step for step, _ in record.metrics["affine/abs_beta_minus_mu_mean"]] == expected
    assert [step for step, _ in record.metrics["loss"]] == [1, 3, 5], "Lightning's own"


def test_monitors_with_their_own_cadence_share_one_probe(tmp_path: Path) -> None:
    record = fit(tmp_path, OrthogonalityMonitor(2), NormGrowthMonitor(3), steps=6)
    assert [step for step, _ in record.metrics["orthogonality/rms_cos"]] == [1, 3, 5]
    assert [step for step, _ in record.metrics["norm_growth/increment"]] == [2, 5]


def test_accumulation_logs_once_per_step(tmp_path: Path) -> None:
    monitors = [monitor() for monitor in MONITORS]
    record = fit(tmp_path, *monitors, steps=3, accumulate_grad_batches=2)
    assert [step for step, _ in record.metrics["norm_growth/increment"]] == [0, 1, 2]
    assert [step for step, _ in record.metrics["affine/abs_beta_minus_mu_mean"]] == [0, 1, 2]
    corrected = record.metrics["orthogonality/max_abs_cos_corrected"]
    assert len(corrected) == 3
    assert max(value for _, value in corrected) < 2e-6, "ε's part adds up over micro-batches"


def test_layers_choose_keys_and_the_record_keeps_all(tmp_path: Path) -> None:
    record = fit(tmp_path, NormGrowthMonitor(layers=["net.3", "net.8"]))
    assert "norm_growth/weight_norm/net.3" in record.metrics
    assert "norm_growth/weight_norm/net.0" not in record.metrics
    assert "norm_growth_control/weight_norm/net.8" in record.metrics
    assert set(record.layers["norm_growth/weight_norm"][0][1]) == {"net.0", "net.3"}


def test_two_instances_of_one_monitor_add_up(tmp_path: Path) -> None:
    record = fit(tmp_path, NormGrowthMonitor(layers="net.0"), NormGrowthMonitor(layers="net.3"))
    assert {"norm_growth/increment/net.0", "norm_growth/increment/net.3"} <= record.metrics.keys()


def test_structure_is_read_anew_at_every_measured_step(tmp_path: Path) -> None:
    class Freezing(Project):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[1].train(batch_idx < 2)

    record = fit(tmp_path, OrthogonalityMonitor(layers="net.0"), project=Freezing())
    assert [step for step, _ in record.metrics["orthogonality/max_abs_cos/net.0"]] == [0, 1]
    assert [step for step, _ in record.metrics["orthogonality_control/max_abs_cos/net.0"]] == [2, 3]
    assert max(value for _, value in record.metrics["orthogonality/max_abs_cos_corrected"]) < 1e-3


def test_layers_thawed_later_are_measured_from_then_on(tmp_path: Path) -> None:
    class Thawing(Project):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].weight.requires_grad_(batch_idx >= 2)

    record = fit(tmp_path, NormGrowthMonitor(layers="*"), project=Thawing())
    assert [step for step, _ in record.metrics["norm_growth/increment/net.0"]] == [2, 3]
    assert [step for step, _ in record.metrics["norm_growth/increment/net.3"]] == [0, 1, 2, 3]


def test_hooks_of_subclasses_are_called_and_may_call_super() -> None:
    calls: list[str] = []

    class Own(NormGrowthMonitor):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            calls.append("start")

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            calls.append("end")

    trainer(Own(every_n_steps=3), steps=6).fit(Project(), images())
    assert calls == ["start", "end"] * 6


@pytest.mark.parametrize("loggers", [0, 1, 2])
def test_any_number_of_loggers(loggers: int, tmp_path: Path) -> None:
    made = [CSVLogger(tmp_path, name=str(i)) for i in range(loggers)]
    fit = trainer(*(monitor() for monitor in MONITORS), logger=made or False)
    fit.fit(Project(), images())
    for logger in made:
        logger.save()
        assert "norm_growth/increment" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert float(fit.callback_metrics["norm_growth/weight_norm"]) > 0


def test_other_callbacks_can_watch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="norm_growth/weight_norm", mode="max", every_n_train_steps=2)
    stopping = EarlyStopping("norm_growth/weight_norm", patience=0, mode="min", check_on_train_epoch_end=True)
    run = trainer(NormGrowthMonitor(), checkpoint, stopping, steps=-1, max_epochs=5, enable_checkpointing=True)
    run.fit(Project(), images(32))
    assert Path(checkpoint.best_model_path).is_file()
    assert run.current_epoch == 2, "the norm grows, so the second epoch is worse"


class Offloaded(ConvNet):
    """Project whose saved tensors go through hooks, so that autograd nodes cannot be read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu():
            found: torch.Tensor = super().forward(x)
        return found


@pytest.mark.filterwarnings("ignore:No batch statistics could be read")  # in the first step
def test_statistics_are_those_of_running_ones_where_nodes_cannot_be_read() -> None:
    found = []
    for kind in (ConvNet, Offloaded):
        torch.manual_seed(0)
        project, rows = Project(sgd(), net=kind()).double(), Rows()
        run = trainer(AffineConvergenceMonitor(), steps=3, logger=rows)
        run.fit(project, images(32, dtype=torch.float64))
        found.append({key: value for key, value in rows.rows[-1][1].items() if key.startswith("affine/")})
    assert found[0]
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.filterwarnings("ignore:No batch statistics could be read", "ignore:Values that are not finite")
@pytest.mark.parametrize("momentum", [0.1, 1e-2, 1e-4])
def test_running_statistics_that_are_too_coarse_are_left_out(momentum: float) -> None:
    """A running statistic in float32 has errors of 1e-7, which are divided by the momentum."""
    found = []
    for kind in (ConvNet, Offloaded):
        torch.manual_seed(0)
        project, rows = Project(sgd(), net=kind()), Rows()
        for layer in (project.net[1], project.net[4]):
            layer.momentum = momentum
        trainer(AffineConvergenceMonitor(), steps=3, logger=rows).fit(project, images(32))
        found.append({k: value for _, row in rows.rows[-1:] for k, value in row.items() if k.startswith("affine/")})
    assert {key: found[0][key] for key in found[1]} == pytest.approx(found[1], rel=1e-3)
    assert bool(found[1]) == (momentum > 1e-3)


def test_a_failing_logger_does_not_stop_training(tmp_path: Path) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(key.startswith("norm_growth") for key in metrics):
                raise OSError("disk full")

    with pytest.warns(UserWarning, match="Broken failed to log a measured step.*disk full.*Training goes on") as warned:
        trainer(NormGrowthMonitor(), logger=Broken(tmp_path), steps=3).fit(Project(), images())
    assert sum("failed to log" in str(warning.message) for warning in warned) == 1


def test_hooks_are_gone_after_fit_and_after_an_exception() -> None:
    class Failing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise KeyError("stop")
            return super().training_step(batch, batch_idx)

    for project in (Project(), Failing()):
        monitors = [monitor() for monitor in MONITORS]
        run = trainer(*monitors)
        if isinstance(project, Failing):
            with pytest.raises(KeyError, match="stop"):
                run.fit(project, images())
        else:
            run.fit(project, images())
        assert all(vars(monitor)[hook] is None for monitor in monitors for hook in BATCH_HOOKS)
        assert [type(callback).__name__ for callback in run.callbacks] == [monitor.__name__ for monitor in MONITORS]
        assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in run.optimizers)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in project.modules())
        assert run not in Session._sessions


def test_the_same_callbacks_serve_a_second_fit(tmp_path: Path) -> None:
    monitors = [monitor() for monitor in MONITORS]
    first = fit(tmp_path / "a", *monitors)
    second = fit(tmp_path / "b", *monitors)
    assert first.metrics.keys() == second.metrics.keys()


@pytest.mark.parametrize("monitor", MONITORS)
def test_callbacks_can_be_copied(monitor: Any) -> None:
    class During(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            copy.deepcopy(observed)

    observed = monitor(every_n_steps=3, layers="net.*")
    assert pickle.loads(pickle.dumps(observed)).layers == "net.*"
    trainer(During(), observed, steps=3).fit(Project(), images())


def test_fast_dev_run() -> None:
    trainer(*(monitor() for monitor in MONITORS), fast_dev_run=True).fit(Project(), images())


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("value", [0, -1, True, 2.5])
def test_cadence_must_be_positive(monitor: Any, value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{monitor.__name__}\(every_n_steps={value}\).*an integer, at least 1"
    ):
        monitor(every_n_steps=value)


@pytest.mark.parametrize("monitor", MONITORS)
def test_unknown_layers_are_refused_before_training(monitor: Any) -> None:
    run = trainer(monitor(layers=["net.l*"]))
    with pytest.raises(ConfigurationError, match=r"'net\.l\*' matches none of the \d layers.*'net\."):
        run.fit(Project(), images())
    assert run.global_step == 0


@pytest.mark.filterwarnings("ignore:None of 1 weights is scale invariant")
def test_a_model_without_batch_normalization_is_trained_with_a_warning() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.warns(MeasurementWarning, match="observes nothing: Project has no batch normalization with γ and β"):
        trainer(AffineConvergenceMonitor()).fit(Project(net=net), images())
    with pytest.warns(MeasurementWarning, match="observes nothing"):  # one list of callbacks serves all models
        trainer(AffineConvergenceMonitor(layers="*")).fit(Project(net=net), images())


def test_a_model_without_invariance_has_controls_only(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.warns(
        UserWarning, match="None of 1 weights is scale invariant; all are controls: softmax is in its way"
    ):
        record = fit(tmp_path, OrthogonalityMonitor(), NormGrowthMonitor(), project=Project(net=net))
    assert "norm_growth_control/explained" in record.metrics
    assert not [key for key in record.metrics if key.startswith("norm_growth/")]


class Dead(Project):
    """Project with filters that get no gradient; it keeps the weight and the gradient of its first layer."""

    def __init__(self, norm: int, filters: slice) -> None:
        super().__init__()
        with torch.no_grad():
            self.net[norm].weight[filters] = 0
            self.net[norm].bias[filters] = -1  # behind which the ReLU lets no gradient through

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        weight = self.net[0].weight
        self.kept = [tensor.detach().double().flatten(1).clone() for tensor in (weight, weight.grad)]


def test_filters_without_a_gradient_have_no_cosine() -> None:
    rows, project = Rows(), Dead(1, slice(3))
    trainer(OrthogonalityMonitor(1, layers="*"), steps=1, logger=rows).fit(project, images())
    weight, gradient = project.kept
    assert not gradient[:3].any(), "dead"
    expected = torch.cosine_similarity(weight, gradient)[3:].square().mean().sqrt()
    assert rows.rows[0][1]["orthogonality/rms_cos/net.0"] == pytest.approx(float(expected), rel=1e-3)


def test_layers_without_a_gradient_have_no_cosine() -> None:
    rows, project = Rows(), Dead(4, slice(None))
    trainer(OrthogonalityMonitor(1, layers="*"), steps=1, logger=rows).fit(project, images())
    assert not project.kept[1].any(), "dead"
    assert not {key for key in rows.rows[0][1] if "cos" in key and key.startswith("orthogonality/")}


def test_controls_without_a_gradient_have_no_cosine() -> None:
    class Idle(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0 * super().training_step(batch, batch_idx)

    rows = Rows()
    trainer(OrthogonalityMonitor(1, layers="*"), steps=1, logger=rows).fit(Idle(), images())
    metrics = rows.rows[0][1]
    assert metrics["orthogonality_control/rows_without_gradient"] == 4
    assert not {key for key in metrics if "cos" in key}


def test_optimizers_that_are_none_of_torch_are_refused_before_training() -> None:
    class Foreign:
        param_groups: list[Any] = []  # noqa: RUF012
        state: dict[Any, Any] = {}  # noqa: RUF012

    class Foreigner(NormGrowthMonitor):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy._optimizers = [Foreign()]
            super().on_fit_start(trainer, pl_module)

    with pytest.raises(ConfigurationError, match=r"cannot observe Foreign, which is not a torch\.optim\.Optimizer"):
        trainer(Foreigner()).fit(Project(), images())


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"stored in torch\.bfloat16.*bf16-mixed"):
        trainer(NormGrowthMonitor(), precision="bf16-true").fit(Project(), images())


def test_values_that_are_not_finite_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    class Overflowing(AffineConvergenceMonitor):
        def measure(self, measured: Any) -> Any:
            for reading in super().measure(measured):
                yield type(reading)(reading.key, torch.tensor(torch.nan).double(), reading.by_layer, reading.layers)

    with pytest.warns(
        UserWarning, match=r"Values that are not finite are left out of the logs \(affine/.*, affine/.*, affine/\S* …\)"
    ):
        record = fit(tmp_path, Overflowing(), steps=1)
    assert "affine/abs_beta_minus_mu_mean" not in record.metrics
    assert "affine/abs_beta_minus_mu_channel/net.1" in record.metrics


def test_layers_called_with_keywords_are_read(tmp_path: Path) -> None:
    class Keywords(Project):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.net:
                x = layer(input=x)
            return x

    record = fit(tmp_path, *[monitor() for monitor in MONITORS], project=Keywords())
    assert record.metrics["affine/abs_beta_minus_mu_mean"]
    assert record.metrics["orthogonality/max_abs_cos_corrected"]
