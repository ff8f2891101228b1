"""ResNetClassifier: architectures, decayed parameters, and refused settings."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import NORMS, DigitsDataModule, ResNetClassifier
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.models.architecture import ARCHITECTURES, build_resnet
from lightning_normgeo.normalization import find_norm
from lightning_normgeo.normalization.parametrizations import WeightStandardization
from lightning_normgeo.symmetries import scale_invariant_units

PARAMETERS = {"resnet18": 11.2, "resnet34": 21.3, "resnet50": 23.5, "resnet101": 42.5, "resnet152": 58.2}


def small(**settings: Any) -> ResNetClassifier:
    return ResNetClassifier(**{"arch": "resnet18", "stem": "imagenet", "num_classes": 4, **settings})


def batch(n: int = 4, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, 32, 32), torch.arange(n) % classes


def trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_steps": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            **settings,
        }
    )


def builds() -> list[Any]:
    """Return every architecture with every normalization; large ones with each parametrization of weights are slow."""
    return [
        pytest.param(arch, norm, marks=pytest.mark.slow if k and find_norm(norm).weight else (), id=f"{arch}-{norm}")
        for (k, arch), norm in itertools.product(enumerate(ARCHITECTURES), NORMS)
    ]


@pytest.mark.parametrize(("arch", "norm"), builds())
def test_every_architecture_builds(arch: str, norm: str) -> None:
    with torch.device("meta"):
        model = build_resnet(arch, norm, "cifar", 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[arch], rel=0.01)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) is (find_norm(norm).data == "bn")
    assert model.fc.out_features == 10


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("imagenet", 8)])
def test_stem_decides_the_size_of_the_first_block(stem: Any, size: int) -> None:
    model, shapes = small(stem=stem), []
    model.model.layer1.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    with torch.no_grad():
        logits = model.eval()(batch(2)[0])
    assert shapes == [(2, 64, size, size)]
    assert logits.shape == (2, 4)


@pytest.mark.parametrize("norm", NORMS)
def test_every_normalization_starts_finite_and_learns(norm: str) -> None:
    torch.manual_seed(0)
    stem = "cifar" if norm == "in" else "imagenet"
    model = small(norm=norm, stem=stem, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.002}})
    images, labels = batch(8)
    optimizer, losses = model.configure_optimizers(), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.loss(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(0 < loss < 5 for loss in losses)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("norm", NORMS)
def test_units_of_every_normalization(norm: str) -> None:
    entry = find_norm(norm)
    units = scale_invariant_units(build_resnet("resnet18", norm, "cifar", 4), torch.rand(2, 3, 16, 16))
    of_weights = {"sn": "matrix", "wn": "filter", "cwn": "filter", "ws": "filter"}
    of_data = {"bn": "filter", "in": "filter", "gn": "group", "ln": "layer", None: "none"}
    expected = of_weights[entry.weight] if entry.weight else of_data[entry.data]
    assert units.kinds == ({"none": 21} if expected == "none" else {expected: 20, "none": 1})
    assert not units["fc"].invariant


@pytest.mark.parametrize("norm", NORMS)
def test_residual_branches_start_at_zero_where_asked(norm: str) -> None:
    """At zero the network consists of its skip connections: scaling a branch's inner weights changes nothing."""
    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    model = build_resnet("resnet18", norm, "cifar", 4, zero_init_residual=True)
    block = model.layer1[0]
    x = torch.rand(2, 64, 16, 16)
    torch.testing.assert_close(block(x), x)
    assert model(images).isfinite().all()


@pytest.mark.parametrize(
    ("stem", "size", "remedy"),
    [("imagenet", 32, "Use stem='cifar', larger images"), ("cifar", 8, "Use larger images")],
)
def test_instance_normalization_of_single_values_is_refused(stem: Any, size: int, remedy: str) -> None:
    model = small(norm="in", stem=stem)
    images = torch.rand(2, 3, size, size)
    with pytest.raises(ConfigurationError, match=f"{size}x{size} images end as 1x1 maps with stem='{stem}'.*{remedy}"):
        model._check_batch(images, torch.tensor([0, 1]))
    images = torch.rand(2, 3, size + 1, size + 1)
    model._check_batch(images, torch.tensor([0, 1]))
    assert model(images).isfinite().all()


@pytest.mark.parametrize(("norm", "use_buffers", "warned"), [("sn", True, 1), ("sn", False, 0), ("bn", True, 0)])
def test_averaging_singular_vectors_is_warned_about(norm: str, use_buffers: bool, warned: int) -> None:
    averaging = EMAWeightAveraging(use_buffers=use_buffers)
    data = DataLoader(TensorDataset(*batch()), batch_size=4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", MeasurementWarning)
        trainer(callbacks=[averaging]).fit(small(norm=norm), data)
    assert sum("singular vectors of norm='sn'" in str(entry.message) for entry in seen) == warned


def test_groups_and_the_deviation_are_choices() -> None:
    model = small(norm="gn+ws", groups=4, unbiased=False).model
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {4}
    assert not any(m.unbiased for m in model.modules() if isinstance(m, WeightStandardization))
    with pytest.raises(ConfigurationError, match=r"groups=48 does not divide 64 channels.*such as 32"):
        small(norm="gn", groups=48)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_without_normalization_it_starts_finite_and_trains(arch: str) -> None:
    torch.manual_seed(0)
    model = small(arch=arch, norm="none", optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.005}})
    images, labels = batch(8)
    optimizer = model.configure_optimizers()
    losses = []
    for _ in range(4):
        loss = model.loss(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(0 < loss < 5 for loss in losses)
    assert losses[-1] < losses[0]


def test_deepest_network_without_normalization_is_finite_at_initialization() -> None:
    with torch.no_grad():
        logits = small(arch="resnet101", norm="none")(batch(2)[0])
    assert logits.isfinite().all()
    assert logits.abs().max() < 100


def test_input_normalization_is_part_of_the_model() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    model = small(input_mean=mean, input_std=std).eval()
    images = batch()[0]
    normalized = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model(images), model.model(normalized))
    assert "input_normalization.mean" in model.state_dict()
    assert not any("input_normalization" in name for name, _ in model.named_parameters())


def test_label_smoothing_is_in_the_loss() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    targets = 0.7 * nn.functional.one_hot(labels, 4) + 0.3 / 4
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(small(label_smoothing=0.3).loss(logits, labels), expected)


def test_predict_gives_probabilities() -> None:
    model = small().eval()
    images, labels = batch()
    with torch.no_grad():
        probabilities = model.predict_step((images, labels), 0)
        torch.testing.assert_close(probabilities, model(images).softmax(1))
        torch.testing.assert_close(probabilities, model.predict_step(images, 0))


OPTIMIZERS = {
    "sgd": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.02}},
    "adamw": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.3, "weight_decay": 0.02}},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("decayed", ["all", "weights", "invariant", "none"])
def test_parameter_groups_hold_what_is_decayed(optimizer: str, decayed: Any) -> None:
    model = small(decayed=decayed, optimizer=OPTIMIZERS[optimizer])
    built = model.configure_optimizers()
    assert type(built).__name__.lower() == optimizer
    decays = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in built.param_groups) == len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_weight = "conv" in name or name.endswith(("fc.weight", "downsample.0.weight"))
        has_norm_behind = is_weight and not name.endswith("fc.weight")
        wanted = decayed == "all" or (decayed == "weights" and is_weight)
        wanted = wanted or (decayed == "invariant" and has_norm_behind)
        assert decays[id(parameter)] == (0.02 if wanted else 0), name
    assert all(group["lr"] == 0.3 for group in built.param_groups)


def test_default_optimizer() -> None:
    (group,) = small().configure_optimizers().param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0)


def test_frozen_parameters_are_left_out() -> None:
    model = small()
    model.model.conv1.weight.requires_grad_(False)
    parameters = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    assert id(model.model.conv1.weight) not in parameters
    assert len(parameters) == len(list(model.parameters())) - 1


def test_scheduler_drives_every_group() -> None:
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.1}}
    built = small(decayed="weights", optimizer=OPTIMIZERS["sgd"], lr_scheduler=scheduler).configure_optimizers()
    built["optimizer"].step()
    built["lr_scheduler"].step()
    assert [group["lr"] for group in built["optimizer"].param_groups] == pytest.approx([0.03, 0.03])


@pytest.mark.parametrize(
    ("name", "arguments", "epoch"),
    [
        ("CosineAnnealingLR", {"T_max": 0}, 0),
        ("StepLR", {"step_size": 0}, 0),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 3}, 3),
        ("MultiplicativeLR", {"lr_lambda": lambda epoch: 1 / (epoch - 4)}, 3),
    ],
)
def test_a_schedule_that_fails_after_some_epoch_is_refused_before_training(
    name: str, arguments: dict[str, Any], epoch: int
) -> None:
    schedule = {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": arguments}
    model = small(optimizer=OPTIMIZERS["sgd"], lr_scheduler=schedule, decayed="weights")
    trainer = pl.Trainer(max_epochs=epoch, logger=False, enable_checkpointing=False, accelerator="cpu")
    if epoch:  # so many epochs are no problem
        model._trainer = trainer
        assert set(model.configure_optimizers()) == {"optimizer", "lr_scheduler"}
    trainer.fit_loop.max_epochs = epoch + 1
    model._trainer = trainer
    with pytest.raises(ConfigurationError, match=rf"lr_scheduler torch\S+{name}\(.*\) fails after epoch {epoch}: \w+"):
        model.configure_optimizers()


@pytest.mark.parametrize(
    "settings", [{"max_epochs": 9, "max_steps": 5}, {"max_epochs": -1}, {"max_time": "00:00:01:00"}]
)
def test_a_schedule_is_not_refused_for_epochs_that_may_never_come(settings: dict[str, Any]) -> None:
    arguments = {"max_lr": 0.1, "total_steps": 3}
    schedule = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": arguments}
    model = small(optimizer=OPTIMIZERS["sgd"], lr_scheduler=schedule)
    model._trainer = pl.Trainer(**settings, logger=False, enable_checkpointing=False, accelerator="cpu")
    random = torch.get_rng_state()
    found = model.configure_optimizers()
    assert found["lr_scheduler"].last_epoch == 0, "the real one has not been stepped"
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "resnet51"}, r"arch='resnet51' is unknown; did you mean 'resnet50'"),
        ({"norm": "bm"}, r"norm='bm' is unknown; did you mean 'bn' \(batch normalization\)"),
        ({"stem": "imagnet"}, r"stem='imagnet' is unknown; choose 'cifar' or 'imagenet'"),
        ({"decayed": "weight"}, r"decayed='weight' is unknown; choose 'all', 'weights', 'invariant' or 'none'"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 must be in \[0, 1\)"),
        ({"num_classes": 1}, r"num_classes=1 must be an integer, at least 2"),
        ({"input_std": (0.5, 0.0, 0.5)}, r"input_std=\(0.5, 0.0, 0.5\) must be positive"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        small(**settings)


def test_data_with_another_number_of_classes_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResNetClassifier, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ConfigurationError, match=r"num_classes=4\).*which has 10 classes. Set num_classes=10"):
        trainer().fit(small(), datamodule=DigitsDataModule(batch_size=4))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_fitted_model_is_evaluated_with_its_metrics(stage: str) -> None:
    loader = DataLoader(TensorDataset(*batch(8)), batch_size=4)
    model = small()
    (metrics,) = getattr(trainer(limit_val_batches=1.0), stage)(model, loader, verbose=False)
    name = {"validate": "val"}.get(stage, stage)
    assert set(metrics) == {f"{name}/loss", f"{name}/accuracy"}
    with torch.no_grad():
        right = (model.eval()(loader.dataset.tensors[0]).argmax(1) == loader.dataset.tensors[1]).float().mean()
    assert metrics[f"{name}/accuracy"] == pytest.approx(right.item())


@pytest.fixture(scope="module")
def checkpoint(workplace: Path) -> Path:
    """Save a checkpoint of the small model."""
    writer = trainer(enable_checkpointing=True, max_steps=0)
    writer.fit(small(), DataLoader(TensorDataset(*batch()), batch_size=4))
    writer.save_checkpoint(workplace / "small.ckpt")
    return workplace / "small.ckpt"


def test_checkpoint_brings_the_model_back(checkpoint: Path) -> None:
    model = ResNetClassifier.load_from_checkpoint(checkpoint)
    assert (model.hparams["arch"], model.hparams["stem"], model.hparams["num_classes"]) == ("resnet18", "imagenet", 4)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.model.conv1.weight, small().model.conv1.weight)


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"arch": "resnet34"}, "arch='resnet18'"),
        ({"norm": "none"}, "norm='bn'"),
        ({"stem": "cifar"}, "stem='imagenet'"),
        ({"num_classes": 5}, "num_classes=4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_checkpoint_of_another_model_is_refused(checkpoint: Path, settings: dict[str, Any], saved: str) -> None:
    name, value = next(iter(settings.items()))
    match = rf"trained with {saved}, the model has {name}={value!r}\. Set model\.{name}="
    with pytest.raises(ConfigurationError, match=match):
        trainer().fit(small(**settings), DataLoader(TensorDataset(*batch()), batch_size=4), ckpt_path=str(checkpoint))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(4, 3, 32, 32) * 255, [0, 1, 2, 3], r"expects pixels in \[0, 1\].*span \[.*, 25\d\].*Divide by 255"),
        (torch.randn(4, 3, 32, 32), [0, 1, 2, 3], r"expects pixels in \[0, 1\].*normalization out of the data"),
        (torch.rand(4, 3, 32, 32), [0, 1, 2, 4], r"Labels span 0…4.*num_classes=4\) knows 0…3"),
        (torch.rand(4, 3, 32, 32), [-1, 1, 2, 3], r"Labels span -1…3"),
    ],
    ids=["bytes", "normalized", "label-too-large", "label-negative"],
)
def test_data_that_does_not_fit_is_refused_before_anything_is_learned(
    images: torch.Tensor, labels: list[int], message: str
) -> None:
    model = ResNetClassifier(num_classes=4, arch="resnet18", stem="imagenet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.tensor(labels)), batch_size=4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", **quiet)
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(model, loader)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
