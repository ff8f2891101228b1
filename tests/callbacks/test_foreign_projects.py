"""Foreign projects with only the README's lines added: training is unchanged, the numbers are right."""

from __future__ import annotations

import gc
import pickle
import random
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch
import lightning.pytorch.demos.boring_classes
import lightning.pytorch.demos.transformer
import numpy as np
import pytest
import pytorch_lightning as pl
import pytorch_lightning.demos.boring_classes
import pytorch_lightning.demos.lstm
import pytorch_lightning.demos.transformer
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    RobustnessEvaluation,
    read_record,
    scale_invariant_units,
)
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.runs.records.record import Record

# after a few steps networks are extremely confident
pytestmark = [
    pytest.mark.filterwarnings("ignore:The gradient is zero for:lightning_normgeo.errors.MeasurementWarning"),
    pytest.mark.filterwarnings("ignore:bim does not raise the loss:lightning_normgeo.errors.MeasurementWarning"),
]
NO_BATCH_NORM = "AffineConvergenceMonitor observes nothing: .* has no batch normalization"
NO_UNIT = r"None of \d+ weights is scale invariant; all are controls"
NAMESPACES = pytest.mark.parametrize("namespace", [pl, lightning.pytorch], ids=["pytorch_lightning", "lightning"])


def bits(value: Any) -> Any:
    """Return nested state with every tensor as a checksum of its bits."""
    if isinstance(value, Tensor):
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), zlib.crc32(content)
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return value


def everything(trainer: Any, module: Any) -> dict[str, Any]:
    """Return the whole state after a step, by name."""
    return {
        **bits({f"state {name}": tensor for name, tensor in module.state_dict().items()}),
        **bits({f"gradient {name}": parameter.grad for name, parameter in module.named_parameters()}),
        **{f"module {name}": (m.training, len(m._forward_hooks)) for name, m in module.named_modules()},
        **{f"optimizer {i}": bits(optimizer.state_dict()) for i, optimizer in enumerate(trainer.optimizers)},
        "torch": bits(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": pickle.dumps(np.random.get_state()),  # noqa: NPY002 - the global state
    }


class Run(pl.Callback):
    """Result of one fit: the state after each batch, weights before and after it, and their gradients."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.module: Any = None
        self.states: list[dict[str, Any]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.states.append(everything(trainer, pl_module))
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def fit(make: Callable[[], Any], data: Any, callbacks: Sequence[Any], logger: Any, settings: dict[str, Any]) -> Run:
    """Train for a few steps with the Trainer of the module's namespace."""
    pl.seed_everything(3)
    module, run = make(), Run()
    namespace = lightning.pytorch if isinstance(module, lightning.pytorch.LightningModule) else pl
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"max_steps": 3, "limit_val_batches": 0, "accelerator": "cpu", "log_every_n_steps": 1, **settings}
    trainer = namespace.Trainer(callbacks=[*callbacks, run], logger=logger, **quiet, **settings)
    trainer.fit(module, data)
    run.states.append(everything(trainer, module))
    run.trainer, run.module = trainer, module
    return run


def compare(plain: Run, observed: Run) -> None:
    assert len(plain.states) == len(observed.states) > 2
    for step, (a, b) in enumerate(zip(plain.states, observed.states, strict=True)):
        assert a.keys() == b.keys()
        assert [name for name in a if a[name] != b[name]] == [], f"differs after batch {step}"


@dataclass(repr=False)
class Observed:
    """A project trained with and without the callbacks, and the record of the run with them."""

    plain: Run
    run: Run
    record: Record

    @property
    def groups(self) -> set[str]:
        known = {"affine", "orthogonality", "orthogonality_control", "norm_growth", "norm_growth_control"}
        return known & {key.partition("/")[0] for key in self.record.metrics}

    @property
    def invariant(self) -> set[str]:
        return self._layers("orthogonality/max_abs_cos", "norm_growth/increment")

    @property
    def controls(self) -> set[str]:
        return self._layers("orthogonality_control/max_abs_cos", "norm_growth_control/increment")

    def _layers(self, *keys: str) -> set[str]:
        layers = [self.record.layers.get(key, [(0, {})]) for key in keys]
        # in the first step the numbers may refute a joint unit, which is then missing in that row
        found = {frozenset(row) for points in layers for _, row in points[1:] or points}
        assert len(found) == 1, "the monitors saw different weights, or other ones at another step"
        return set(*found)

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.record.metrics[key]]


def observe(
    make: Callable[[], Any],
    data: Any = None,
    warns: Iterable[str] = (),
    joint: Iterable[str] = (),
    streams: Mapping[str, Sequence[str]] | None = None,
    **settings: Any,
) -> Observed:
    """Train without and with the callbacks; check that nothing differs, and the logged numbers against the training.

    Args:
        make: returns the project.
        data: its training data, if it brings none.
        warns: the expected warnings.
        joint: the layers whose weight and bias are one unit, and the weights that are one unit alone.
        streams: the parameters of units of several layers, by their label.
        settings: of the Trainer.
    """
    plain = fit(make, data, [], False, settings)
    logger = RecordLogger()
    callbacks = [OrthogonalityMonitor(), NormGrowthMonitor(), AffineConvergenceMonitor(), RobustnessEvaluation()]
    with ExitStack() as expected:
        for words in warns:
            expected.enter_context(pytest.warns(MeasurementWarning, match=words))
        run = fit(make, data, callbacks, logger, settings)
    compare(plain, run)
    observed = Observed(plain, run, read_record(logger.folder))
    whole = {name.removesuffix(".weight"): parts_of(name) for name in joint} | dict(streams or {})
    for group in ("", "_control"):
        check_increments(observed, f"norm_growth{group}", whole)
        check_cosines(observed, f"orthogonality{group}", whole)
    return observed


def parts_of(name: str) -> list[str]:
    """Return the parameters of a unit: a weight, or the weight and bias of a layer."""
    return [name] if name.endswith(".weight") else [f"{name}.weight", f"{name}.bias"]


def rows(tensors: dict[str, Tensor], layer: str, whole: Mapping[str, Sequence[str]]) -> Tensor:
    """Return a weight with one unit per row; all parameters of a unit that is ``whole`` in one row."""
    if layer in whole:
        return torch.cat([tensors[name].flatten() for name in whole[layer]]).double().unsqueeze(0)
    weight = tensors.get(f"{layer}.weight", tensors.get(layer))
    return weight.double().flatten(1)


def check_increments(observed: Observed, group: str, whole: Mapping[str, Sequence[str]]) -> None:
    """Check that increments are those of the training without callbacks, and explained if there is a formula."""
    for step, layers in observed.record.layers.get(f"{group}/increment", []):
        for layer, increment in layers.items():
            w, after = (rows(weights, layer, whole) for weights in observed.plain.weights[step : step + 2])
            d = after - w
            assert increment == pytest.approx(float(2 * w.ravel().dot(d.ravel()) + d.square().sum()), rel=1e-6), layer
    if group in observed.groups:
        check_residuals(observed.record, group)


def check_residuals(record: Record, group: str) -> None:
    residuals, floors = (record.metrics[f"{group}/{quantity}"] for quantity in ("residual", "storage_floor"))
    assert [r for r, f in zip(residuals, floors, strict=True) if abs(r[1]) > f[1]] == []
    layers = zip(record.layers[f"{group}/residual"], record.layers[f"{group}/storage_floor"], strict=True)
    for (_, by_layer), (_, floor) in layers:
        assert {layer: value for layer, value in by_layer.items() if abs(value) > floor[layer]} == {}


def check_cosines(observed: Observed, group: str, whole: Mapping[str, Sequence[str]]) -> None:
    """Check that cosines are those of the training without callbacks."""
    for step, layers in observed.record.layers.get(f"{group}/max_abs_cos", []):
        for layer, largest in layers.items():
            w, g = (rows(of[step], layer, whole) for of in (observed.plain.weights, observed.plain.gradients))
            cosines = (w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1)).clamp_min(1e-300)
            assert largest == pytest.approx(float(cosines.abs().max()), rel=1e-4, abs=1e-9), layer


def write_text(words: int = 3000) -> None:
    """Write a text file to the place where Lightning's language models look before they download it."""
    vocabulary, draw = [f"word{i}" for i in range(60)], random.Random(1)
    lines = [" ".join(draw.choices(vocabulary, k=20)) for _ in range(words // 20)]
    Path("data").mkdir()
    Path("data/wikitext-2.txt").write_text("\n".join(lines))


@NAMESPACES
def test_transformer_of_lightning(namespace: Any) -> None:
    write_text()
    observed = observe(lambda: namespace.demos.transformer.LightningTransformer(61), None, [NO_BATCH_NORM, NO_UNIT])
    check_all_controls(observed, 22)


def test_lstm_of_lightning() -> None:
    write_text()
    make = pytorch_lightning.demos.lstm.LightningLSTM
    observed = observe(lambda: make(61), None, [NO_BATCH_NORM, NO_UNIT], max_steps=2)
    check_all_controls(observed, 10)


def check_all_controls(observed: Observed, count: int) -> None:
    matrices = {n.removesuffix(".weight") for n, p in observed.run.module.named_parameters() if p.ndim == 2}
    assert observed.controls == matrices
    assert len(matrices) == count
    assert observed.groups == {"orthogonality_control", "norm_growth_control"}


@NAMESPACES
@pytest.mark.parametrize("name", ["BoringModel", "ManualOptimBoringModel"])
def test_boring_models_of_lightning(namespace: Any, name: str) -> None:
    make = getattr(namespace.demos.boring_classes, name)
    observed = observe(make, None, [NO_BATCH_NORM, NO_UNIT])
    assert observed.controls == {"layer"}
    assert len(observed.values("norm_growth_control/increment")) == 3
    trainer, module = observed.run.trainer, observed.run.module
    with pytest.warns(
        MeasurementWarning, match=r"not evaluated.*expects batches \(images, labels\), got float32"
    ) as said:
        tested = trainer.test(module, verbose=False)
    assert len([one for one in said if one.category is MeasurementWarning]) == 1
    assert tested == namespace.Trainer(logger=False, enable_model_summary=False).test(module, verbose=False)


@NAMESPACES
def test_demo_model_of_lightning(namespace: Any) -> None:
    boring = namespace.demos.boring_classes
    data = DataLoader(boring.RandomDataset(32, 12), batch_size=4)
    observed = observe(boring.DemoModel, data, [NO_BATCH_NORM, NO_UNIT])
    assert observed.controls == {"l1"}


class Classifier(pl.LightningModule):
    """A common form of LightningModule around a network."""

    def __init__(self, network: nn.Module, optimizer: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(batch[0])
        logits = outputs if isinstance(outputs, tuple) else (outputs,)  # GoogLeNet: with those of its side branches
        return sum(F.cross_entropy(y, batch[1]) * (1.0 if i == 0 else 0.3) for i, y in enumerate(logits))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def images(size: int, n: int = 24, batch_size: int = 8, classes: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(n, 3, size, size, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(classes, (n,), generator=generator)), batch_size=batch_size)


def momentum(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3)


CONVOLUTIONAL: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    # network, image size, weights with units, controls
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), 32, 20, 1),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(num_classes=4), 64, 49, 33),
    "googlenet": (lambda: torchvision.models.googlenet(num_classes=4, init_weights=False), 64, 59, 5),
}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", pytest.param("googlenet", marks=pytest.mark.slow)])
def test_convolutional_networks_of_torchvision(name: str) -> None:
    make, size, invariant, controls = CONVOLUTIONAL[name]
    observed = observe(lambda: Classifier(make(), momentum), images(size))
    layers = {name: layer for name, layer in observed.run.module.named_modules() if hasattr(layer, "weight")}
    before_batch_norm = {n for n, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.bias is None}
    assert observed.invariant == before_batch_norm
    assert (len(before_batch_norm), len(observed.controls)) == (invariant, controls)
    units = scale_invariant_units(observed.run.module.network, torch.rand(4, 3, size, size))
    assert sum(u.count for u in units if u.invariant) == sum(layers[n].out_channels for n in before_batch_norm)
    assert {"affine", "norm_growth", "orthogonality"} <= observed.groups
    assert max(observed.values("orthogonality/max_abs_cos_corrected")) < 1e-5
    assert min(observed.values("orthogonality_control/max_abs_cos")) > 1e-2
    check_robustness(observed, images(size, n=6))


def check_robustness(observed: Observed, data: DataLoader[Any]) -> None:
    (logged,) = observed.run.trainer.test(observed.run.module, data, verbose=False)
    samples = float(len(data.dataset))
    assert [logged[f"robustness/{attack}/n"] for attack in ("clean", "gaussian", "bim")] == [samples] * 3
    assert logged["robustness/bim/accuracy"] <= logged["robustness/clean/accuracy"]
    assert "test_loss" in logged


def small_vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    )


def stream_of_blocks(depth: int) -> dict[str, list[str]]:
    """Return the parameters that write into the residual stream of torchvision's vision transformer, by their label."""
    blocks = [f"network.encoder.layers.encoder_layer_{i}" for i in range(depth)]
    writers = [f"{block}.{layer}" for block in blocks for layer in ("self_attention.out_proj", "mlp.3")]
    tokens = ["network.class_token", "network.encoder.pos_embedding"]
    stream = [*tokens, *(name for layer in ("network.conv_proj", *writers) for name in parts_of(layer))]
    return {f"network.conv_proj+{len(stream) - 1}": stream}


def readers_of_blocks(depth: int) -> set[str]:
    """Return the layers that read the normalized stream."""
    blocks = [f"network.encoder.layers.encoder_layer_{i}" for i in range(depth)]
    readers = {f"{block}.{layer}" for block in blocks for layer in ("self_attention.in_proj_weight", "mlp.0")}
    return {*readers, "network.heads.head"}


def test_the_stream_of_a_vision_transformer_is_one_unit() -> None:
    streams = stream_of_blocks(2)
    observed = observe(
        lambda: Classifier(small_vision_transformer(), adamw), images(32), [NO_BATCH_NORM], streams=streams
    )
    assert observed.invariant == set(streams)
    assert observed.controls == readers_of_blocks(2)
    assert max(observed.values("orthogonality/max_abs_cos")) < 1e-4
    check_robustness(observed, images(32, n=6))


def test_convnext_is_invariant_jointly_with_its_biases() -> None:
    stage = torchvision.models.convnext.CNBlockConfig
    joint = {f"network.features.{layer}" for layer in ("0.0", "1.0.block.0", "3.0.block.0", "3.1.block.0")}

    def make() -> Any:
        return Classifier(torchvision.models.ConvNeXt([stage(8, 16, 1), stage(16, None, 2)], num_classes=4), adamw)

    # a layer normalization is behind each of these, and two are behind the stream of the second stage
    scales = [f"network.features.3.{i}.{name}" for i in range(2) for name in ("layer_scale", "block.0.bias")]
    stream = {"network.features.2.1+5": ["network.features.2.1.weight", "network.features.2.1.bias", *scales]}
    observed = observe(make, images(32), [NO_BATCH_NORM], joint, stream)
    assert observed.invariant == {*joint, *stream}
    pointwise = {f"network.features.{block}.block.{i}" for block in ("1.0", "3.0", "3.1") for i in (3, 5)}
    assert observed.controls == {*pointwise, "network.classifier.2"}


@pytest.mark.slow
def test_vit_b_16() -> None:
    def make() -> Any:
        return Classifier(torchvision.models.vit_b_16(num_classes=4), lambda p: torch.optim.SGD(p, lr=0.1))

    data = images(224, n=2, batch_size=1)
    streams = stream_of_blocks(12)
    observed = observe(make, data, [NO_BATCH_NORM], streams=streams, max_steps=2)
    assert observed.invariant == set(streams)
    assert observed.controls == readers_of_blocks(12)


class GAN(pl.LightningModule):
    """A generator and a discriminator, optimized by hand as in Lightning's examples."""

    def __init__(self, toggle: bool = True, one_backward: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle, self.one_backward = toggle, one_backward
        self.generator = nn.Sequential(
            nn.Linear(8, 32),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(32, 64),
            nn.BatchNorm1d(64, 0.8),  # a large ε, common in such models
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(64, 3 * 8 * 8),
            nn.Sigmoid(),
            nn.Unflatten(1, (3, 8, 8)),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Flatten(),
            nn.Linear(64, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def judge(self, x: Tensor, real: bool) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.discriminator(x), torch.full((len(x), 1), float(real)))

    def step(self, optimizer: Any, losses: Callable[[], Sequence[Tensor]]) -> None:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        values = losses()
        optimizer.zero_grad()
        for loss in [sum(values)] if self.one_backward else values:
            self.manual_backward(loss)
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        z = torch.randn(len(batch[0]), 8)
        self.step(generator, lambda: [self.judge(self(z), True)])
        self.step(discriminator, lambda: [self.judge(batch[0], True), self.judge(self(z).detach(), False)])

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in (self.generator, self.discriminator)]


@pytest.mark.parametrize(("toggle", "one_backward"), [(True, True), (True, False), (False, True), (False, False)])
def test_gan(toggle: bool, one_backward: bool) -> None:
    joint = ["discriminator.0"]  # all operations up to the normalization are homogeneous
    # ε = 0.8 as in Lightning's example; its effect on a layer further in front is unknown
    large = [
        r"The ε of the normalization behind (generator|discriminator)\.2",
        r"generator\.0\.weight: controls.*the ε of",
    ]
    observed = observe(lambda: GAN(toggle, one_backward), images(8), large, joint=joint, max_steps=6)
    assert observed.invariant == {"generator.2", "discriminator.0", "discriminator.2"}
    assert observed.controls == {"generator.0", "generator.5", "discriminator.6"}
    assert [step for step, _ in observed.record.metrics["norm_growth/increment"]] == [0, 1, 2]
    assert max(observed.values("orthogonality/max_abs_cos")) > 0.1
    assert max(observed.values("orthogonality/max_abs_cos_corrected")) < 1e-5


def test_gan_with_images_between_minus_one_and_one_trains() -> None:
    x = 2 * torch.rand(8, 3, 8, 8) - 1
    data = DataLoader(TensorDataset(x, torch.zeros(8)), batch_size=4)
    trained = fit(GAN, data, [RobustnessEvaluation(on_unsuitable="raise")], False, {})
    assert len(trained.gradients) == 2


class SimSiam(pl.LightningModule):
    """SimSiam: two views of each image, one of them without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torchvision.models.resnet18(num_classes=16)
        self.predictor = nn.Sequential(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        z1, z2 = self.encoder(x), self.encoder(x.flip(-1) + 0.05 * torch.randn_like(x))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_siamese_network() -> None:
    observed = observe(SimSiam, images(32), joint=["encoder.fc.weight", "predictor.3"])
    convolutions = {name for name, m in observed.run.module.named_modules() if isinstance(m, nn.Conv2d)}
    assert observed.invariant == {*convolutions, "encoder.fc", "predictor.0", "predictor.3"}  # the last by the cosine
    assert max(observed.values("orthogonality/max_abs_cos")) < 1e-3
    assert max(observed.values("orthogonality/max_abs_cos_corrected")) < 1e-5
    assert {f"affine/abs_beta_minus_mu_{kind}" for kind in ("mean", "pooled_mean", "mean_view1", "mean_view2")} <= set(
        observed.record.metrics
    )


class ZeroHead(pl.LightningModule):
    """Network whose last layer starts at zero, as in vision transformers: at first only weight decay moves weights."""

    def __init__(self, weight_decay: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(192, 4096, bias=False)
        self.norm = nn.BatchNorm1d(4096)
        self.head = nn.Linear(4096, 4)
        nn.init.zeros_(self.head.weight)
        self.weight_decay = weight_decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.norm(self.hidden(batch[0].flatten(1)))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=self.weight_decay)


@pytest.mark.parametrize("weight_decay", [1e-5, 1e-4])
def test_residual_is_within_the_floor_where_weight_decay_is_all_that_moves(weight_decay: float) -> None:
    logger = RecordLogger()
    fit(lambda: ZeroHead(weight_decay), images(8), [NormGrowthMonitor()], logger, {"max_steps": 1})
    check_residuals(read_record(logger.folder), "norm_growth")


def test_a_warning_is_shown_once_whatever_the_project_does_with_warnings() -> None:
    class Twice(pytorch_lightning.demos.boring_classes.BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with warnings.catch_warnings():
                return self.loss(self(batch)) + self.loss(self(-batch))

    data = DataLoader(torch.rand(12, 32), batch_size=4)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        fit(Twice, data, [OrthogonalityMonitor()], False, {})
    assert sum("None of 2 weights is scale invariant" in str(warning.message) for warning in shown) == 1


class Annealed(pl.LightningModule):
    """Network with a threshold that rises during training: first a ReLU, which is homogeneous, later not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(16)])
        self.last = nn.Linear(16, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.first(batch[0].flatten(1)).clamp(min=0.0 if batch_idx == 0 else 0.3)
        hidden = self.norms[1](self.second(self.norms[0](hidden)))
        return F.cross_entropy(self.last(hidden), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_units_follow_a_constant_that_changes_while_it_trains() -> None:
    logger = RecordLogger()
    fit(Annealed, images(8), [OrthogonalityMonitor()], logger, {})
    record = read_record(logger.folder)
    invariant = {step: set(layers) for step, layers in record.layers["orthogonality/max_abs_cos"]}
    assert invariant == {0: {"first", "second"}, 1: {"second"}, 2: {"second"}}


def test_batches_whose_gradient_is_asked_for_are_let_go() -> None:
    batches: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Adversarial(pytorch_lightning.demos.boring_classes.BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            gc.collect()
            alive.append(sum(x() is not None for x in batches))
            x = batch.clone().requires_grad_()
            batches.append(weakref.ref(x))
            return self.loss(self.layer(x))

    with pytest.warns(MeasurementWarning, match=NO_UNIT):
        fit(Adversarial, None, [OrthogonalityMonitor()], False, {"max_steps": 8})
    assert max(alive) <= 1
