"""SphereProjection in real Trainers: radii, exact steps of every mode, resumption, and what it refuses."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm.optim
import torch
from torch import Tensor, nn

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, scale_symmetries
from lightning_normgeo.callbacks import SphereProjection
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.symmetries import Spheres
from support.projects import ConvNet, Fingerprint, Project, Rows, images, same, sgd, trainer

EPS = 1e-60


def exact(**settings: Any) -> Project:
    torch.manual_seed(0)
    return Project(net=ConvNet(eps=EPS), **settings).double()


def adamw(**settings: Any) -> Any:
    return lambda module: torch.optim.AdamW(module.parameters(), **{"lr": 0.01, "eps": EPS, **settings})


def filters(weight: Tensor) -> Tensor:
    return weight.detach().double().flatten(1)


def norms(project: Project) -> list[Tensor]:
    return [filters(layer.weight).norm(dim=1) for layer in (project.net[0], project.net[3])]


def data() -> Any:
    return images(64, dtype=torch.float64)


class Values(Rows):
    """A logger that stores the rows of this callback."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("sphere/") for key in metrics):
            self.rows.append((step or 0, dict(metrics)))


@pytest.mark.parametrize(
    "optimizers",
    [
        sgd(momentum=0.9),
        adamw(),
        lambda m: timm.optim.Lion(m.parameters(), 0.003),
        lambda m: timm.optim.SGDW(m.parameters(), 0.1, 0.9),
    ],
)
def test_retract_is_the_projection_after_every_step_bit_for_bit(optimizers: Any) -> None:
    project, twin = exact(optimizers=optimizers), exact()
    trainer(SphereProjection(), steps=6).fit(project, data())
    optimizer = optimizers(twin)
    batches = list(data())
    spheres = Spheres(scale_symmetries(twin.net.train(), batches[0][0]), twin.net)
    for x, y in batches[:6]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        spheres.project(optimizer)
    assert same(project.state_dict(), twin.state_dict())


def test_logged_rate_is_that_of_free_training_with_the_same_directions() -> None:
    """Free training with the logged rate, which is equal for all blocks if there is one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.LayerNorm(5, eps=EPS, elementwise_affine=False)).double()
    project, logger = Project(sgd(lr=0.01, momentum=0.9), copy.deepcopy(net)).double(), Values()
    trainer(SphereProjection(), steps=8, logger=logger).fit(project, data())
    assert logger.steps == list(range(8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    start = torch.cat([p.detach().flatten() for p in net.parameters()]).norm()
    for (x, y), (_, row) in zip(data(), logger.rows, strict=True):
        whole = torch.cat([p.detach().flatten() for p in net.parameters()])
        optimizer.param_groups[0]["lr"] = 0.01 * float(whole.norm() / start) ** 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in net.parameters()])
        ratio = float(after.norm() / start)
        assert row["sphere/free_norm_ratio"] == pytest.approx(ratio, rel=1e-12)
        assert row["sphere/equivalent_lr"] == pytest.approx(0.01 * ratio**2, rel=1e-12)
        assert row["sphere/step_stretch"] == pytest.approx(float(after.norm() / whole.norm()) - 1, rel=1e-8)
        assert row["sphere/radius_error"] < 1e-15
    direction = torch.cat([p.detach().flatten() for p in project.net.parameters()])
    torch.testing.assert_close(direction * ratio, after, rtol=1e-12, atol=1e-13)


def test_geodesic_is_sgd_on_the_grassmann_manifold() -> None:
    """Algorithm 1 of Cho and Lee 2017 by rows: y cos‖ηh‖ − h/‖h‖ sin‖ηh‖ on the unit sphere, scaled to radius r."""
    project, twin = exact(optimizers=sgd(lr=0.3, weight_decay=0.01)), exact()
    trainer(SphereProjection("geodesic"), steps=8).fit(project, data())
    for x, y in data():
        twin.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name in ("net.0.weight", "net.3.weight"):
                    w, g = p.flatten(1), p.grad.flatten(1)
                    r = w.norm(dim=1, keepdim=True)
                    h = g - (g * w).sum(1, keepdim=True) / r**2 * w
                    angle = 0.3 * h.norm(dim=1, keepdim=True) / r
                    turned = w * angle.cos() - r * h / h.norm(dim=1, keepdim=True) * angle.sin()
                    p.copy_(turned.view_as(p))
                else:
                    p.sub_(0.3 * (p.grad + 0.01 * p))
    for (name, a), b in zip(project.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("optimizers", [sgd(lr=0.1, momentum=0.9), adamw(lr=0.02, weight_decay=0.0)])
def test_hyperball_moves_by_the_rate_times_the_radius(optimizers: Any) -> None:
    project, twin = exact(optimizers=optimizers), exact()
    trainer(SphereProjection("hyperball"), steps=8).fit(project, data())
    optimizer = optimizers(twin)
    rate = optimizer.param_groups[0]["lr"]
    invariant = [twin.net[0].weight, twin.net[3].weight]
    radii = [w.detach().flatten(1).norm(dim=1, keepdim=True) for w in invariant]
    for x, y in data():
        before = [w.detach().clone().flatten(1) for w in invariant]
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for w, old, r in zip(invariant, before, radii, strict=True):
                u = (old - w.flatten(1)) / rate
                moved = old - rate * r * u / u.norm(dim=1, keepdim=True)
                w.copy_((r * moved / moved.norm(dim=1, keepdim=True)).view_as(w))
    for (name, a), b in zip(project.named_parameters(), twin.parameters(), strict=True):
        if name != "net.3.bias":  # without effect, so that Adam moves it by rounding
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=name)


def test_tangent_removes_the_radial_part_of_gradients_and_momentum() -> None:
    project, twin = exact(optimizers=sgd(lr=0.2, momentum=0.9, weight_decay=0.3)), exact()
    trainer(SphereProjection("tangent"), steps=8).fit(project, data())
    invariant = {"net.0.weight", "net.3.weight"}
    radii = {n: p.detach().flatten(1).norm(dim=1, keepdim=True) for n, p in twin.named_parameters() if n in invariant}
    buffers: dict[str, Tensor] = {}
    for x, y in data():
        twin.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                g, w = p.grad.reshape(len(p), -1), p.reshape(len(p), -1)
                if name in invariant:
                    g = g - (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
                    if name in buffers:
                        b = buffers[name]
                        buffers[name] = b - (b * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
                d = g + 0.3 * w
                buffers[name] = 0.9 * buffers[name] + d if name in buffers else d
                moved = w - 0.2 * buffers[name]
                if name in invariant:
                    a = radii[name] / moved.norm(dim=1, keepdim=True)
                    moved, buffers[name] = a * moved, buffers[name] / a
                p.copy_(moved.view_as(p))
    for (name, a), b in zip(project.named_parameters(), twin.parameters(), strict=True):
        if name != "net.3.bias":  # without effect; it follows its weight
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {}])
@pytest.mark.parametrize("mode", ["retract", "tangent", "hyperball"])
def test_radii_are_held_in_float32(mode: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    project = Project(sgd(lr=0.02, momentum=0.9, weight_decay=5e-4))
    start = norms(project)
    trainer(SphereProjection(mode), steps=60, **settings).fit(project, images(640))
    for before, after in zip(start, norms(project), strict=True):
        assert float((after / before - 1).abs().max()) < 2e-7


def test_a_given_radius_leaves_the_function(tmp_path: Path) -> None:
    """Norms are set before the first step, and running statistics follow."""
    project = exact(optimizers=sgd(lr=0.0))
    reference = exact(optimizers=sgd(lr=0.0))
    trainer(SphereProjection(radius=3.0), steps=5).fit(project, data())
    trainer(steps=5).fit(reference, data())
    for values in norms(project):
        torch.testing.assert_close(values, torch.full_like(values, 3.0), rtol=1e-14, atol=0)
    x = next(iter(data()))[0]
    assert not torch.allclose(project.net[0].weight, reference.net[0].weight)
    torch.testing.assert_close(project.eval()(x), reference.eval()(x), rtol=1e-10, atol=1e-11)


def test_a_given_radius_is_as_if_training_had_started_there() -> None:
    def start(radius: float | None) -> Project:
        project = exact(optimizers=sgd(lr=0.05, momentum=0.9))
        if radius is not None:
            with torch.no_grad():
                for layer in (project.net[0], project.net[3]):
                    layer.weight.mul_((radius / filters(layer.weight).norm(dim=1)).view(-1, 1, 1, 1))
        return project

    given, there = start(None), start(0.5)
    trainer(SphereProjection(radius=0.5), steps=6).fit(given, data())
    trainer(SphereProjection(), steps=6).fit(there, data())
    for (name, a), b in zip(given.named_parameters(), there.parameters(), strict=True):
        if name != "net.3.bias":  # without effect; it follows its weight
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("mode", ["retract", "geodesic"])
def test_a_resumed_training_is_the_same_bit_for_bit(mode: Any, tmp_path: Path) -> None:
    optimizers = sgd(lr=0.1) if mode == "geodesic" else sgd(lr=0.1, momentum=0.9)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    whole, part = exact(optimizers=optimizers), exact(optimizers=optimizers)
    settings = {"steps": -1, "max_epochs": 2}
    first, second = Values(), Values()
    trainer(SphereProjection(mode, radius=2.0), Save(), logger=first, **settings).fit(whole, data())
    trainer(SphereProjection(mode, radius=2.0), logger=second, **settings).fit(
        part, data(), ckpt_path=tmp_path / "first.ckpt"
    )
    assert same(whole.state_dict(), part.state_dict())
    assert first.rows[8:] == second.rows


def test_a_checkpoint_before_the_first_step_keeps_the_radii(tmp_path: Path) -> None:
    first = trainer(SphereProjection(radius=2.0), steps=8)
    first.fit(exact(), data())
    first.save_checkpoint(tmp_path / "first.ckpt")

    class Save(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "second.ckpt")

    trainer(SphereProjection(radius=2.0), Save(), steps=9).fit(exact(), data(), ckpt_path=tmp_path / "first.ckpt")
    one, other = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=False)["callbacks"]["SphereProjection"]
        for name in ("first", "second")
    )
    assert same(one, other)


def test_radii_of_another_network_are_not_taken_over(tmp_path: Path) -> None:
    project = exact()
    run = trainer(SphereProjection(), steps=2)
    run.fit(project, data())
    run.save_checkpoint(tmp_path / "own.ckpt")
    other = SphereProjection()
    saved = torch.load(tmp_path / "own.ckpt", weights_only=False)["callbacks"]["SphereProjection"]
    saved["radii"] = {key: value[:-1] for key, value in saved["radii"].items()}
    other.load_state_dict(saved)
    with pytest.warns(
        MeasurementWarning, match="radii of other blocks than those of net.0.weight. They are fixed anew"
    ):
        trainer(other, steps=2).fit(exact(), data())


def test_a_network_without_invariance_is_trained_unchanged_with_one_warning() -> None:
    def train(*callbacks: Any) -> Any:
        torch.manual_seed(0)
        project = Project(sgd(momentum=0.9), nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.GELU(), nn.Linear(6, 4)))
        states = Fingerprint()
        trainer(*callbacks, states, steps=4).fit(project, images())
        return states.states

    with pytest.warns(MeasurementWarning, match="projects nothing: no weight that an optimizer moves is scale") as said:
        observed = train(SphereProjection())
    assert len([one for one in said if one.category is MeasurementWarning]) == 1
    assert same(train(), observed)


@pytest.mark.parametrize("first", [True, False])
def test_monitors_measure_the_step_before_the_projection(first: bool) -> None:
    torch.manual_seed(0)
    logger, project = Rows(), Project(sgd(lr=0.05, momentum=0.9, weight_decay=0.01))
    callbacks = [NormGrowthMonitor(1), OrthogonalityMonitor(1)]
    callbacks.insert(0 if first else 2, SphereProjection())
    trainer(*callbacks, steps=8, logger=logger).fit(project, images())
    assert logger.steps == list(range(8))
    for _, row in logger.rows:
        assert abs(row["norm_growth/residual"]) <= row["norm_growth/storage_floor"]
        assert abs(row["norm_growth/increment"]) > 10 * row["norm_growth/storage_floor"]
        assert row["norm_growth/weight_norm"] == pytest.approx(logger.rows[0][1]["norm_growth/weight_norm"], rel=1e-6)


class TwoOptimizers(pl.LightningModule):
    """A residual stream whose matrices Muon moves, and whose embedding AdamW moves."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.stem, self.branch = nn.Linear(192, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(8, eps=EPS) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = self.stem(batch[0].flatten(1))
        x = x + self.branch(self.norms[0](x).sigmoid())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.head(self.norms[1](x)), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        own = {id(self.branch.weight)}
        others = [p for p in self.parameters() if id(p) not in own]
        return [
            torch.optim.SGD([self.branch.weight], lr=0.1, momentum=0.9),
            torch.optim.SGD(others, lr=0.05, momentum=0.9),
        ]


def test_a_stream_that_two_optimizers_move_is_one_block() -> None:
    torch.manual_seed(0)
    module = TwoOptimizers().double()

    def length() -> float:
        return float(torch.cat([module.stem.weight.flatten(), module.branch.weight.flatten()]).detach().norm())

    before, parts = length(), float(module.stem.weight.detach().norm())
    trainer(SphereProjection(), steps=12).fit(module, data())  # steps of both optimizers count
    assert length() == pytest.approx(before, rel=1e-14)
    assert abs(float(module.stem.weight.detach().norm()) / parts - 1) > 1e-4


class Adversaries(pl.LightningModule):
    """A generator and a discriminator, each with its own optimizer and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, eps=EPS), nn.ReLU(), nn.Linear(8, 192))
        self.discriminator = nn.Sequential(nn.Linear(192, 8), nn.BatchNorm1d(8, eps=EPS), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0].flatten(1)
        noise = torch.randn(len(real), 4, dtype=real.dtype)
        first, second = self.optimizers()
        loss = self.discriminator(self.generator(noise).detach()).mean() - self.discriminator(real).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        if batch_idx % 2:
            first.zero_grad()
            self.manual_backward(-self.discriminator(self.generator(noise)).mean())
            first.step()

    def configure_optimizers(self) -> Any:
        own = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.generator, self.discriminator)]
        return own, []


def test_each_optimizer_gets_its_blocks_at_its_first_step() -> None:
    torch.manual_seed(0)
    module = Adversaries().double()
    weights = [module.generator[0].weight, module.discriminator[0].weight]
    before = [w.detach().norm(dim=1) for w in weights]
    trainer(SphereProjection(), steps=9).fit(module, data())
    for w, norm in zip(weights, before, strict=True):
        torch.testing.assert_close(w.detach().norm(dim=1), norm, rtol=1e-14, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_found_in_their_first_batch(whole: bool) -> None:
    torch.manual_seed(0)
    project = Project(sgd(lr=0.05, momentum=0.9))
    start = norms(project)
    compiled: Any = project
    if whole:
        compiled = torch.compile(project, backend="aot_eager")
    else:
        project.net.compile(backend="aot_eager")
    trainer(SphereProjection(), steps=6).fit(compiled, images())
    for before, after in zip(start, norms(project), strict=True):
        assert float((after / before - 1).abs().max()) < 2e-7


class Own(torch.optim.Adam):
    """An optimizer whose step nobody knows."""


class Unknown(torch.optim.Optimizer):
    """An optimizer of which nothing is known."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "project"}, r"mode='project'\): choose one of .*retract"),
        ({"radius": 0.0}, r"radius=0.0\): must be a number above 0\. Leave it out"),
        ({"radius": float("nan")}, "must be a number above 0"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"mode": "hyperball", "every_n_steps": 2}, "this mode replaces every step of the optimizer"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        SphereProjection(**settings)


@pytest.mark.parametrize(
    ("mode", "optimizers", "match"),
    [
        ("geodesic", sgd(momentum=0.9), "is SGD with momentum. Choose retract, tangent or hyperball"),
        ("geodesic", adamw(), "the optimizer is AdamW"),
        ("tangent", adamw(), "steps are proportional to gradients, as SGD, and the optimizer is AdamW"),
        (
            "retract",
            lambda m: Unknown(m.parameters()),
            "does not know how the state of Unknown scales.*transport=False",
        ),
    ],
)
def test_optimizers_that_cannot_work_are_refused_before_training(mode: Any, optimizers: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        trainer(SphereProjection(mode)).fit(Project(optimizers), images())


def test_weights_stored_in_half_precision_are_refused_before_training() -> None:
    with pytest.raises(ConfigurationError, match=r"stored in torch\.bfloat16, whose rounding is as large as a step"):
        trainer(SphereProjection(), precision="bf16-true").fit(Project(), images())


def test_steps_that_are_too_long_are_reported() -> None:
    torch.manual_seed(0)
    with pytest.warns(MeasurementWarning, match="times as long before SphereProjection brought it back.*Lower the"):
        trainer(SphereProjection(), steps=2).fit(Project(sgd(lr=30.0)), images())


@pytest.mark.parametrize(
    ("optimizers", "mode", "text"),
    [
        (sgd(weight_decay=0.01, momentum=0.9), "retract", "SGD's weight decay 0.01 does not vanish.*momentum keeps"),
        (
            adamw(weight_decay=0.1),
            "retract",
            r"AdamW's weight decay 0.1 does not vanish.*η/\(1 - ηλ\), and averages of gradients",
        ),
        (
            lambda module: torch.optim.Adam(module.parameters(), weight_decay=0.1),
            "retract",
            "Adam's weight decay 0.1 is added to gradients.*changes the direction of the steps",
        ),
        (sgd(weight_decay=0.01), "geodesic", "has no effect on them: it is radial"),
        (adamw(weight_decay=0.1), "hyperball", "changes the direction of their steps; set it to 0"),
        (sgd(), "retract", r"14 scale-invariant blocks of 2 parameters are rescaled after the step\.$"),
    ],
)
def test_the_opening_line_says_what_weight_decay_does(
    optimizers: Any, mode: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trainer(SphereProjection(mode), steps=1).fit(Project(optimizers), images())

    assert any(re.search(text, message) for message in caplog.messages), caplog.messages


def test_a_callback_that_has_trained_can_be_copied_and_trains_again() -> None:
    projection = SphereProjection(radius=2.0)
    trainer(projection, steps=3).fit(exact(), data())
    project = exact()
    trainer(copy.deepcopy(projection), steps=3).fit(project, data())
    assert all(torch.allclose(norm, torch.full_like(norm, 2.0), rtol=1e-12) for norm in norms(project))
