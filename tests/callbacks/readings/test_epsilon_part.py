"""The ε part of ⟨W, g⟩ over several passes, against sums that hooks of the test take in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_normgeo import OrthogonalityMonitor
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.probes.step_in_progress import ELSEWHERE
from support.isolation import SUPPORT
from support.processes import reports_of
from support.projects import ConvNet, Project, Rows, images, trainer

SCRIPT = SUPPORT / "ddp_epsilon.py"
PAIRS = {"net.0.weight": "net.1", "net.3.weight": "net.4"}
EPS = 1e-3
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}


class Watching(OrthogonalityMonitor):
    """Callback that records the monitors' ε part at each step."""

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__(every_n_steps, layers="*")
        self.parts: list[dict[str, Tensor]] = []
        self.steps: list[dict[str, Any]] = []
        self._last: Any = None

    def measure(self, measured: MeasuredStep) -> Any:
        if measured.epsilon is self._last:  # a step that is read again, without the weights that were edited
            del self.parts[-1], self.steps[-1]
        self._last = measured.epsilon
        self.parts.append({name: part.clone() for name, part in measured.epsilon.items()})
        self.steps.append({step.units.name: step for step in measured.steps})
        return super().measure(measured)


class Passes(pl.Callback):
    """Sums ε/(σ² + ε) γ Σ ĝ x̂ over the passes of each batch normalization, from inputs and outputs alone."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for name, layer in pl_module.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def note(layer: Any, args: Any, output: Tensor) -> None:
            if not output.requires_grad or not layer.training:
                return
            x = args[0].detach().double()
            axes = [0, *range(2, x.ndim)]
            variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
            standard = (x - mean) / (variance + layer.eps).sqrt()
            gamma = layer.weight.detach().double().clone()
            share = (layer.eps / (variance + layer.eps)).flatten()

            def add(gradient: Tensor) -> None:
                part = share * gamma * (gradient.double() * standard).sum(axes)
                self.sums[name] = self.sums.get(name, 0) + part
                self.counts[name] = self.counts.get(name, 0) + 1

            output.register_hook(add)

        return note

    def clear(self) -> None:
        self.sums, self.counts = {}, {}


def observe(project: Project, dtype: torch.dtype = torch.float32, steps: int = 3, **settings: Any) -> tuple[Any, Any]:
    """Train with the test's own sums beside the monitor; return the rows and the monitor."""
    torch.manual_seed(4)
    rows, monitor, passes = Rows(), Watching(), Passes()
    project.to(dtype)

    class Compare(pl.Callback):
        """Callback that compares right after each measured step, while the sums are of exactly that step."""

        def on_train_batch_end(self, *args: Any) -> None:
            if len(monitor.parts) > len(truths):
                truths.append((dict(passes.sums), dict(passes.counts)))
                passes.clear()

    truths: list[Any] = []
    run = trainer(passes, monitor, Compare(), steps=steps, logger=rows, **settings)
    run.fit(project, images(160, dtype=dtype))
    monitor.truths = truths  # type: ignore[attr-defined]
    return rows, monitor


def check(rows: Any, monitor: Any, dtype: torch.dtype, pairs: dict[str, str] = PAIRS, factor: float | None = 1) -> None:
    """Compare the ε part per channel, and check that it explains the cosine; with ``factor`` None only the latter."""
    assert rows.rows
    assert len(monitor.parts) == len(monitor.truths) == len(rows.rows)
    for parts, (sums, _), steps, (_, metrics) in zip(
        monitor.parts, monitor.truths, monitor.steps, rows.rows, strict=True
    ):
        assert parts.keys() == pairs.keys()
        for weight, norm in pairs.items():
            size = (steps[weight].weight_sq * steps[weight].gradient_sq).sqrt()
            if factor is not None:
                assert ((parts[weight] - factor * sums[norm]).abs() <= LIMITS[dtype] * size).all()
            rest = (steps[weight].inner - parts[weight]).abs()
            assert (rest <= LIMITS[dtype] * size).all()
        assert metrics["orthogonality/max_abs_cos_corrected"] <= LIMITS[dtype]
        assert metrics["orthogonality/max_abs_cos"] > 100 * LIMITS[dtype], "there is something to take off"


DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "float64"])


def net() -> nn.Module:
    return ConvNet(eps=EPS)


@DTYPES
@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_accumulation(batches: int, dtype: torch.dtype) -> None:
    rows, monitor = observe(Project(net=net()), dtype, accumulate_grad_batches=batches)
    assert all(set(counts.values()) == {batches} for _, counts in monitor.truths)
    check(rows, monitor, dtype)


@DTYPES
def test_clipping_by_norm_scales_it(dtype: torch.dtype) -> None:
    rows, monitor = observe(Project(net=net()), dtype, gradient_clip_val=0.05, accumulate_grad_batches=2)
    check(rows, monitor, dtype, factor=None)
    raw = monitor.truths[0][0]["net.1"].norm()
    assert monitor.parts[0]["net.0.weight"].norm() < 0.9 * raw, "it was clipped"


class Views(Project):
    """Two augmented views through one network with one joint loss, as in SimCLR."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        first, second = (nn.functional.normalize(self(x + 0.3 * torch.randn_like(x))) for _ in range(2))
        return nn.functional.cross_entropy(first @ second.T / 0.2, torch.arange(len(x)))


@DTYPES
@pytest.mark.parametrize("batches", [1, 2])
def test_two_views_in_one_backward_pass(batches: int, dtype: torch.dtype) -> None:
    rows, monitor = observe(Views(net=net()), dtype, accumulate_grad_batches=batches)
    assert all(set(counts.values()) == {2 * batches} for _, counts in monitor.truths)
    check(rows, monitor, dtype)


class ByHand(Project):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.passes(batch, optimizer)
        optimizer.step()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))


class TwoBackwards(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        self.manual_backward(0.3 * self.loss([batch[0].flip(-1), batch[1]]))


class BothForwardsFirst(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        first, second = self.loss(batch), self.loss([batch[0].square(), batch[1]])
        self.manual_backward(first)
        self.manual_backward(second)


class Retained(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(0.5 * loss)


class Discarded(ByHand):
    """Project that discards a backward pass, which must not count."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss([batch[0].square(), batch[1]]))
        optimizer.zero_grad()
        self.trainer.callbacks[[isinstance(c, Passes) for c in self.trainer.callbacks].index(True)].clear()
        self.manual_backward(self.loss(batch))


class NeverUsed(ByHand):
    """Project with a forward pass whose loss gets no backward pass."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.log("other", self.loss([batch[0].square(), batch[1]]))
        self.manual_backward(self.loss(batch))


class MomentumEncoder(ByHand):
    """A copy of the network that runs without gradients and follows the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net=net)
        self.follower = copy.deepcopy(net).requires_grad_(False)

    def passes(self, batch: Any, optimizer: Any) -> None:
        with torch.no_grad():
            target = self.follower(batch[0]).softmax(1)
            own = self(batch[0].square()).softmax(1)  # without gradients too
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), (target + own) / 2))
        with torch.no_grad():
            for mine, theirs in zip(self.follower.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)


@DTYPES
@pytest.mark.parametrize(
    "kind", [ByHand, TwoBackwards, BothForwardsFirst, Retained, Discarded, NeverUsed, MomentumEncoder]
)
def test_steps_taken_by_hand(kind: type[ByHand], dtype: torch.dtype) -> None:
    check(*observe(kind(net=net()), dtype, steps=-1, limit_train_batches=4, max_epochs=1), dtype)


class ScaleState(ByHand):
    """A user-defined gradient scaler with one of torch's optimizers."""

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.scaler.scale(self.loss(batch)))
        self.scaler.step(optimizer)
        self.scaler.update()


class Clipped(ByHand):
    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class Reentrant(ConvNet):
    """Reentrant checkpoint: a backward pass inside the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)
        return found


def test_what_runs_inside_a_backward_pass_is_read_before_gamma_moves() -> None:
    rows, monitor = observe(Project(net=Reentrant(eps=EPS)), torch.float64)
    check(rows, monitor, torch.float64)


@DTYPES
@pytest.mark.parametrize(("kind", "factor"), [(ScaleState, 1 / 1024), (Clipped, None)])
def test_what_is_done_to_all_gradients_is_done_to_it(kind: type[ByHand], factor: float, dtype: torch.dtype) -> None:
    rows, monitor = observe(kind(net=net()), dtype, steps=-1, limit_train_batches=4, max_epochs=1)
    check(rows, monitor, dtype, factor=factor)


# Steps in which the ε part is unknown


def claims(rows: Any, monitor: Any, dtype: torch.dtype = torch.float64) -> set[str]:
    """Return the weights with a logged ε part, after checking that it is right."""
    found = set()
    for parts, steps, (_, metrics) in zip(monitor.parts, monitor.steps, rows.rows, strict=True):
        for name, part in parts.items():
            if part.isfinite().any():
                found.add(name)
                size = (steps[name].weight_sq * steps[name].gradient_sq).sqrt()
                wrong = (steps[name].inner - part).abs() > LIMITS[dtype] * size
                assert not (wrong & part.isfinite()).any(), name
        assert metrics.get("orthogonality/max_abs_cos_corrected", 0.0) <= LIMITS[dtype]
    return found


class Shared(nn.Module):
    """Two successive convolutions that share one batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3, bias=False)
        self.norm, self.last = nn.BatchNorm2d(6, eps=1e-5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)).relu()
        return self.last(self.norm(self.second(y)).relu().mean((2, 3)))


class ScalesApart(Project):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for parameter in self.net.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5 if parameter.ndim > 1 else 0.25)


@DTYPES
def test_a_clipping_of_ones_own_that_scales_each_gradient(dtype: torch.dtype) -> None:
    assert claims(*observe(ScalesApart(net=ConvNet(eps=1e-5)), dtype), dtype) == set(PAIRS)


def test_a_normalization_behind_two_weights_claims_nothing() -> None:
    rows, monitor = observe(Project(net=Shared()), torch.float64)
    assert not claims(rows, monitor)
    assert "orthogonality/max_abs_cos/net.first" in rows.curves


class InTurns(Shared):
    """Network that uses one of its two weights in each micro-batch."""

    turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        y = self.first(x) if self.turn % 2 else self.second(torch.cat([x, x], 1))
        return self.last(self.norm(y).relu().mean((2, 3)))


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_normalization_behind_two_weights_in_turn(batches: int) -> None:
    rows, monitor = observe(Project(net=InTurns()), torch.float64, steps=4, accumulate_grad_batches=batches)
    found = claims(rows, monitor)
    assert found == ({"net.first.weight", "net.second.weight"} if batches == 1 else set())


@pytest.mark.parametrize("by_gradient", [True, False], ids=["no-gradient", "no-optimizer"])
def test_a_gamma_that_does_not_move(by_gradient: bool) -> None:
    network = net()
    network[1].weight.requires_grad_(not by_gradient)
    project = Project(
        lambda module: torch.optim.SGD([p for n, p in module.named_parameters() if n != "net.1.weight"], lr=0.1),
        network,
    )
    rows, monitor = observe(project, torch.float64)
    assert "net.3.weight" in claims(rows, monitor)


def test_channels_that_are_dead() -> None:
    network = net()
    with torch.no_grad():
        network[0].weight[0] = 0  # a constant: σ² = 0
        network[1].bias[1] = -100  # always negative, so the ReLU outputs zero
        network[1].weight[2] = 0
        network[4].weight.zero_()
        network[4].weight[:4] = 1
    rows, monitor = observe(Project(net=network), torch.float64, accumulate_grad_batches=2)
    assert claims(rows, monitor) == set(PAIRS)
    check(rows, monitor, torch.float64)


class Apart(ByHand):
    """Weights in one optimizer, all other parameters in another; gradients of either may be clipped."""

    clips: tuple[int, ...] = ()
    way = "lightning"

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim == 1]
        return torch.optim.SGD(weights, lr=0.05, momentum=0.9), torch.optim.AdamW(others, lr=1e-3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for k in self.clips:
            if self.way == "lightning":
                self.clip_gradients(optimizers[k], gradient_clip_val=1e-3, gradient_clip_algorithm="norm")
            else:
                held = [p for group in optimizers[k].param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(held, 1e-3)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("way", ["lightning", "torch"])
@pytest.mark.parametrize("clips", [(), (0,), (1,), (0, 1)], ids=["none", "weights", "others", "both"])
def test_weights_and_gamma_under_different_optimizers(clips: tuple[int, ...], way: str) -> None:
    project = Apart(net=ConvNet(eps=1e-4))
    project.clips, project.way = clips, way
    rows, monitor = observe(project, torch.float64, steps=-1, limit_train_batches=4, max_epochs=1)
    assert claims(rows, monitor) == set(PAIRS), "each gradient keeps its direction"


class OneClipped(ByHand):
    """Project that clips the gradient of one weight by hand."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        torch.nn.utils.clip_grad_norm_([self.net[0].weight], 1e-3)


def test_a_weight_that_is_clipped_alone() -> None:
    rows, monitor = observe(OneClipped(net=net()), torch.float64, steps=-1, limit_train_batches=4, max_epochs=1)
    assert claims(rows, monitor) == set(PAIRS)


def each_clipped(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        torch.nn.utils.clip_grad_norm_([parameter], 1e-3)


def decay_clipped_apart(parameters: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_([p for p in parameters if p.ndim > 1], 1e-3)
    torch.nn.utils.clip_grad_norm_([p for p in parameters if p.ndim == 1], 1e-2)


def scaled_through_data(parameters: list[nn.Parameter]) -> None:
    parameters[0].grad.data.mul_(0.3)
    parameters[1].grad.data.zero_()


def scaled_through_numpy(parameters: list[nn.Parameter]) -> None:
    gradient = parameters[0].grad.numpy()
    gradient *= -0.3


def replaced_twice(parameters: list[nn.Parameter]) -> None:
    for _ in range(2):
        parameters[0].grad = parameters[0].grad * 0.5


def shrunk_weights(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data.mul_(0.9)


def clipped_by_value(parameters: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_value_(parameters[:1], 0.9 * float(parameters[0].grad.abs().max()))


def clamped_through_data(parameters: list[nn.Parameter]) -> None:
    largest = float(parameters[0].grad.abs().max())
    parameters[0].grad.data.clamp_(-0.99 * largest, 0.99 * largest)


def noise_added(parameters: list[nn.Parameter]) -> None:
    parameters[0].grad.add_(torch.randn_like(parameters[0]), alpha=1e-3 * float(parameters[0].grad.std()))


def moved_weights(parameters: list[nn.Parameter]) -> None:
    parameters[0].data.add_(torch.randn_like(parameters[0]), alpha=1e-3)


class Edited(Project):
    """Project that edits gradients or weights before the optimizer's step, in one of Lightning's hooks."""

    edit: Callable[[list[nn.Parameter]], None]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.edit(list(self.net.parameters()))


SCALED = [each_clipped, decay_clipped_apart, scaled_through_data, scaled_through_numpy, replaced_twice]
TURNED = [clipped_by_value, clamped_through_data, noise_added]


@DTYPES
@pytest.mark.parametrize("edit", [*SCALED, *TURNED])
def test_edits_before_the_step(edit: Callable[[list[nn.Parameter]], None], dtype: torch.dtype) -> None:
    project = Edited(net=net())
    project.edit = edit
    rows, monitor = observe(project, dtype)
    found = claims(rows, monitor, dtype)
    assert "net.3.weight" in found
    if edit in SCALED:
        assert "net.0.weight" in found, "its direction is what it was"
    else:
        assert not all(part["net.0.weight"].isfinite().all() for part in monitor.parts)


@DTYPES
@pytest.mark.parametrize(("edit", "kept"), [(shrunk_weights, set()), (moved_weights, {"net.3"})])
def test_weights_that_are_edited_before_the_step_have_no_cosines(
    edit: Callable[[list[nn.Parameter]], None], kept: set[str], dtype: torch.dtype
) -> None:
    """Shorter weights have the direction that they had, but nothing tells them from others."""
    project = Edited(net=net())
    project.edit = edit
    with pytest.warns(MeasurementWarning, match="weights were changed between the backward pass"):
        rows, monitor = observe(project, dtype)
    prefix = "orthogonality/rms_cos/"
    assert {key.removeprefix(prefix) for _, row in rows.rows for key in row if key.startswith(prefix)} == kept
    assert monitor.left_out == {ELSEWHERE: 3}


def read_only(gradient: Tensor) -> None:
    assert gradient.isfinite().all()


def test_hooks_that_only_read_refute_nothing() -> None:
    """Their part is not known, since nobody can tell them from hooks that change gradients."""
    network = ConvNet(eps=1e-2)
    for parameter in network.parameters():
        parameter.register_hook(read_only)  # type: ignore[no-untyped-call]
    rows, monitor = observe(Project(net=network), torch.float64)
    assert not claims(rows, monitor)
    assert max(value for _, value in rows.curves["orthogonality/rms_cos"]) > 1e-2, "it would refute a smaller ε"


def test_hooks_of_wandb_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_only, "__module__", "wandb.integration.torch.wandb_torch")
    network = net()
    for parameter in network.parameters():
        parameter.register_hook(read_only)  # type: ignore[no-untyped-call]
    assert claims(*observe(Project(net=network), torch.float64)) == set(PAIRS)


def scaled_inputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(None if gradient is None else gradient / 2 for gradient in inputs)


def scaled_outputs(module: nn.Module, outputs: Any) -> Any:
    return tuple(gradient / 2 for gradient in outputs)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("layer", [0, 1], ids=["convolution", "normalization"])
def test_full_backward_hooks_of_modules(layer: int) -> None:
    """Units stay what they are in the forward pass, but nobody knows what such a hook does to gradients."""
    network = net()
    network[layer].register_full_backward_hook(scaled_inputs)
    network[layer].register_full_backward_pre_hook(scaled_outputs)
    rows, monitor = observe(Project(net=network), torch.float64)
    assert claims(rows, monitor) == {"net.3.weight"}
    assert "orthogonality/max_abs_cos/net.0" in rows.curves


class EditsInStep(Project):
    """Project that edits what the last micro-batch has left, where no hook of Lightning's is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        gradient = self.net[0].weight.grad
        if batch_idx % 2 and gradient is not None:
            gradient.mul_(0.5)
        return super().training_step(batch, batch_idx)


def test_edits_of_gradients_in_a_training_step() -> None:
    rows, monitor = observe(EditsInStep(net=net()), torch.float64, accumulate_grad_batches=2)
    assert claims(rows, monitor) == {"net.3.weight"}


class Clamping(Precision):
    """Precision plugin that clamps the first gradient."""

    def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        gradient = optimizer.param_groups[0]["params"][0].grad
        gradient.clamp_(max=0.9 * float(gradient.max()))


def test_a_plugin_that_changes_gradients() -> None:
    rows, monitor = observe(Project(net=net()), torch.float64, plugins=[Clamping()])
    assert "net.3.weight" in claims(rows, monitor)
    assert not all(part["net.0.weight"].isfinite().all() for part in monitor.parts)


class Pooled(nn.Sequential):
    """Network with two poolings between a convolution and its normalization, the first of them with a hook."""

    def __init__(self) -> None:
        pool = nn.AvgPool2d(2)
        pool.register_full_backward_hook(scaled_inputs)
        first = nn.Conv2d(3, 6, 3, padding=1, bias=False), pool, nn.AvgPool2d(2), nn.BatchNorm2d(6, eps=EPS), nn.ReLU()
        super().__init__(*first, nn.Flatten(), nn.Linear(24, 4))


def test_a_hook_further_in_front_of_a_normalization() -> None:
    assert not claims(*observe(Project(net=Pooled()), torch.float64))


class PartlyReset(ByHand):
    """Project that drops the gradients of the larger of its layers between two backward passes."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        for parameter in (*self.net[3].parameters(), *self.net[4].parameters()):
            parameter.grad = None
        self.manual_backward(self.loss([batch[0].flip(-1), batch[1]]))


def test_gradients_that_are_read_with_other_weights_the_second_time() -> None:
    """Few weights are read by torch, and many by compiled loops, which sum in another order."""
    network = net()
    network[0], network[1] = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64, eps=EPS)
    network[3], network[4] = nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128, eps=EPS)
    network[8] = nn.Linear(128, 4)
    rows, monitor = observe(PartlyReset(net=network), steps=-1, limit_train_batches=3, max_epochs=1)
    assert claims(rows, monitor, torch.float32) == set(PAIRS)
    assert all(part["net.0.weight"].isfinite().all() for part in monitor.parts)


class GraphOfGradient(ByHand):
    """Project whose gradients have graphs of their own, as optimizers need them that use the Hessian."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        loss = self.loss(batch)
        self.losses.append(weakref.ref(loss))
        self.manual_backward(loss, create_graph=True)
        for parameter in self.net.parameters():
            parameter.grad = parameter.grad.detach()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_graphs_of_gradients_are_not_kept() -> None:
    project = GraphOfGradient(net=net())
    project.losses = []
    rows, monitor = observe(project, torch.float64, steps=-1, limit_train_batches=4, max_epochs=1)
    check(rows, monitor, torch.float64)
    gc.collect()
    assert [loss() for loss in project.losses] == [None] * 4


class EditedBetween(ByHand):
    """Project that edits a gradient between two backward passes of one step."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        self.net[0].weight.grad.data.mul_(0.5)
        self.manual_backward(self.loss([batch[0].flip(-1), batch[1]]))


class ResetBetween(ByHand):
    """Project that drops the gradient of one γ, but not of the weight before it, between two backward passes."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        self.net[1].weight.grad = None
        self.manual_backward(self.loss([batch[0].flip(-1), batch[1]]))


@pytest.mark.parametrize("kind", [EditedBetween, ResetBetween])
def test_edits_between_two_backward_passes(kind: type[ByHand]) -> None:
    rows, monitor = observe(kind(net=net()), torch.float64, steps=-1, limit_train_batches=4, max_epochs=1)
    assert claims(rows, monitor) == {"net.3.weight"}


class HookedBetween(ConvNet):
    """Network whose gradient is halved between a normalization and the convolution before it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        if y.requires_grad:
            y.register_hook(halved)
        for layer in list(self)[1:]:
            y = layer(y)
        return y


class HookRemoved(Project):
    """Project with a hook on a weight that is gone when the optimizer takes its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.handle = self.net[0].weight.register_hook(halved)
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        self.handle.remove()


class EditsBeforeBackward(Project):
    """Project that edits what the last micro-batch has left, right before the next backward pass."""

    def on_before_backward(self, loss: Tensor) -> None:
        gradient = self.net[0].weight.grad
        if gradient is not None:
            gradient.mul_(0.5)


@pytest.mark.parametrize("batches", [1, 2])
def test_edits_right_before_a_backward_pass(batches: int) -> None:
    """The monitors' own hook comes first, so nothing is known if there are gradients already."""
    rows, monitor = observe(EditsBeforeBackward(net=net()), torch.float64, accumulate_grad_batches=batches)
    assert claims(rows, monitor) == (set(PAIRS) if batches == 1 else set())


class ZeroedInPlace(Project):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


@DTYPES
@pytest.mark.parametrize("batches", [1, 2])
def test_gradients_that_are_zeroed_in_place(batches: int, dtype: torch.dtype) -> None:
    check(*observe(ZeroedInPlace(net=net()), dtype, steps=4, accumulate_grad_batches=batches), dtype)


class ZeroedInPart(Project):
    """Project that keeps the gradient of one parameter from step to step."""

    kept = ""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for name, parameter in self.net.named_parameters():
            if parameter.grad is not None and name != self.kept:
                parameter.grad.zero_()


@pytest.mark.parametrize("kept", ["0.weight", "1.weight"], ids=["weight", "gamma"])
def test_gradients_of_earlier_steps(kept: str) -> None:
    project = ZeroedInPart(net=net())
    project.kept = kept
    rows, monitor = observe(project, torch.float64, steps=4)
    assert "net.3.weight" in claims(rows, monitor)
    assert not any(part["net.0.weight"].isfinite().any() for part in monitor.parts[1:])
    assert "orthogonality/max_abs_cos/net.0" in rows.curves, "an unknown part refutes nothing"


@pytest.mark.parametrize("project", [lambda: Project(net=HookedBetween(eps=EPS)), lambda: HookRemoved(net=net())])
def test_hooks_that_change_what_reaches_the_weight(project: Callable[[], Project]) -> None:
    assert claims(*observe(project(), torch.float64)) == {"net.3.weight"}


def halved(gradient: Tensor) -> Tensor:
    return gradient / 2


def halved_in_place(gradient: Tensor) -> Tensor:
    return gradient.div_(2)


def halved_after(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.div_(2)


@pytest.mark.parametrize("hook", [halved, halved_in_place])
@pytest.mark.parametrize("name", ["0.weight", "1.weight"], ids=["weight", "gamma"])
def test_a_hook_on_the_gradient_of_one_parameter(name: str, hook: Callable[[Tensor], Tensor]) -> None:
    network = net()
    network.get_parameter(name).register_hook(hook)  # type: ignore[no-untyped-call]
    assert claims(*observe(Project(net=network), torch.float64)) == {"net.3.weight"}


@pytest.mark.parametrize("name", ["0.weight", "1.weight"], ids=["weight", "gamma"])
def test_a_hook_that_changes_an_accumulated_gradient(name: str) -> None:
    network = net()
    network.get_parameter(name).register_post_accumulate_grad_hook(halved_after)  # type: ignore[no-untyped-call]
    assert claims(*observe(Project(net=network), torch.float64)) == {"net.3.weight"}


class OneReplaced(ByHand):
    """Project that replaces one gradient by another with the same direction."""

    def passes(self, batch: Any, optimizer: Any) -> None:
        self.manual_backward(self.loss(batch))
        self.net[0].weight.grad = 0.5 * self.net[0].weight.grad


def test_a_gradient_that_is_replaced() -> None:
    rows, monitor = observe(OneReplaced(net=net()), torch.float64, steps=-1, limit_train_batches=4, max_epochs=1)
    assert claims(rows, monitor) == set(PAIRS)


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_two_processes(batches: int, tmp_path: Path) -> None:
    """SyncBatchNorm needs GPUs."""
    reports = reports_of(SCRIPT, tmp_path, str(batches), timeout=300)
    for report in reports:
        assert len(report["corrected"]) == 4
        assert max(report["corrected"]) < LIMITS[torch.float64]
        assert max(report["raw"]) > 1e-6
    assert reports[0] == reports[1]
