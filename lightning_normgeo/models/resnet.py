"""ResNetClassifier: a ResNet with a normalization of choice, for pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_normgeo.errors import ConfigurationError, warn_once
from lightning_normgeo.models.architecture import ARCHITECTURES, Stem, build_resnet, smallest_map
from lightning_normgeo.models.optimizers import built, certain_epochs, check_block, rehearse
from lightning_normgeo.normalization.registry import NORMS, find_norm
from lightning_normgeo.symmetries import scale_symmetries
from lightning_normgeo.utilities.checked_values import entry_of, is_number, numbers_of, short_repr, whole

Decayed = Literal["all", "weights", "invariant", "none"]
# a Literal, so that --help lists the names; "| str", so that other names get this package's error with similar names
NormName = Literal[tuple(NORMS)] | str  # type: ignore[valid-type]
_SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}


class InputNormalization(nn.Module):
    """Normalization (x - mean) / std per channel inside the model, so that data, attacks and pictures stay in pixels.

    Args:
        mean: one number per channel, in units of pixels.
        std: one number > 0 per channel, in units of pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalized images, ``(batch, channels, height, width)`` as given."""
        return (images.to(self.mean.dtype) - self.mean) / self.std


class ResNetClassifier(pl.LightningModule):
    """Image classification with torchvision's ResNets and a normalization of choice.

    Takes batches ``(images, labels)`` with images ``(batch, 3, height, width)`` in [0, 1]. Logs ``train/loss``,
    ``train/accuracy`` and the same under ``val/`` and ``test/``.

    Convolutions are initialized as in He et al. 2015 (fan-out). Normalizations without a layer over the data (``wn cwn
    ws sn none`` and ``wn+mbn``) do not limit the scale of the residual branches, of which ResNet-101 has 33. Each
    branch therefore starts at zero by its last gain or weight, and the network starts as its skip connections. Measured
    for ``none`` with ResNet-50, CIFAR-10 images and SGD with momentum over 12 steps: with branches that start at zero
    the loss stays below 2.4; without, it rises from 5 to 41 at learning rate 0.01 and overflows at 0.05; with fan-in
    instead of fan-out it rises to 10, for ``wn`` likewise. The data-dependent initialization of Salimans & Kingma 2016
    does not help: on 1×1 maps some channels hardly vary, their gains explode, and training starts at a loss of 3e5.

    Args:
        num_classes: number of classes.
        arch: ``resnet18`` to ``resnet152``.
        norm: normalization, a name from ``lightning_normgeo.NORMS``; a pair such as ``gn+ws`` is a layer over the data
            after normalized weights.
        stem: ``cifar``, a 3×3 convolution without pooling, which preserves the resolution of 32×32 images (He et al.
            2016, section 4.2); ``imagenet``, 7×7 with stride 2 and pooling, ten times cheaper for such images.
        groups: number of groups of ``gn`` and its pairs; ignored by others. Default: 32.
        unbiased: whether the variance in weight standardization divides by n - 1 (code of Qiao et al.) or n (paper).
        zero_init_residual: whether every residual branch starts at zero by its last factor: γ, the gain of a normalized
            weight, or the weight. Default: only if there is no layer over the data, which would limit the scale.
        label_smoothing: label smoothing of the cross entropy, in [0, 1).
        input_mean: mean of the pixels per channel, subtracted inside the model.
        input_std: standard deviation of the pixels per channel, by which the model divides.
        decayed: parameters to which the optimizer's weight decay applies: ``all`` (torch's default), ``weights`` (only
            those with two or more dimensions: no γ, β or bias), ``invariant`` (only those whose scale has no effect on
            the loss, alone or together with others, as :func:`.scale_symmetries` finds them), or ``none``.
        optimizer: ``class_path`` and ``init_args``, as in the command line's ``optimizer`` block. Default: SGD with
            learning rate 0.1 and momentum 0.9.
        lr_scheduler: the same for a scheduler, stepped once per epoch. Default: none.

    Raises:
        ConfigurationError: for an unknown architecture or normalization, and for settings out of range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        arch: str = "resnet101",
        norm: NormName = "bn",  # type: ignore[valid-type]
        stem: Stem = "cifar",
        groups: int | None = None,
        unbiased: bool = True,
        zero_init_residual: bool | None = None,
        label_smoothing: float = 0.0,
        input_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        input_std: tuple[float, float, float] = (0.25, 0.25, 0.25),
        decayed: Decayed = "all",
        optimizer: dict[str, Any] | None = None,
        lr_scheduler: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check(num_classes, arch, stem, label_smoothing, input_mean, input_std, decayed, norm)
        check_block("optimizer", optimizer)
        check_block("lr_scheduler", lr_scheduler)
        self.save_hyperparameters()
        self._checked = False
        self.input_normalization = InputNormalization(input_mean, input_std)
        self.model = build_resnet(arch, norm, stem, num_classes, groups, unbiased, zero_init_residual)
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.accuracy = nn.ModuleDict(
            {
                f"{stage}_accuracy": MulticlassAccuracy(num_classes, average="micro")
                for stage in ("train", "val", "test")
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, num_classes)`` for pixels in [0, 1]."""
        return self.model(self.input_normalization(images))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a validation batch."""
        return self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a test batch."""
        return self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return class probabilities."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return F.softmax(self(images), dim=1)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with parameters grouped by whether they are decayed, and the scheduler.

        Raises:
            ConfigurationError: If one of them refuses its arguments, or the schedule fails after some epoch.
        """
        settings = self.hparams["optimizer"] or _SGD
        optimizer = built("optimizer", settings, self._parameter_groups())
        schedule = self.hparams["lr_scheduler"]
        if schedule is None:
            return optimizer
        rehearse(schedule, optimizer, settings, certain_epochs(self._trainer))
        return {"optimizer": optimizer, "lr_scheduler": built("lr_scheduler", schedule, optimizer)}

    def on_fit_start(self) -> None:
        """Refuse data with another number of classes, and warn of callbacks that average the buffers of ``sn``."""
        averaging = [callback for callback in self.trainer.callbacks if getattr(callback, "_use_buffers", False)]  # type: ignore[attr-defined]
        if averaging and find_norm(self.hparams["norm"]).weight == "sn":
            warn_once(
                f"{type(averaging[0]).__name__} averages buffers, among them the singular vectors of norm='sn', whose "
                "averages are none: σ comes out wrong. Give it use_buffers=False."
            )
        classes = getattr(self.trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
        if classes is not None and classes != self.hparams["num_classes"]:
            raise ConfigurationError(
                f"ResNetClassifier(num_classes={self.hparams['num_classes']}) does not fit the data, which has "
                f"{classes} classes. Set num_classes={classes}."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, and in ``fit`` one without optimizer states.

        Raises:
            ConfigurationError: If its architecture, normalization, stem or number of classes is another one, or
                training is to resume from weights alone.
        """
        saved = checkpoint.get("hyper_parameters", {})
        for name in ("arch", "norm", "stem", "num_classes"):
            if name in saved and saved[name] != self.hparams[name]:
                raise ConfigurationError(
                    f"The checkpoint was trained with {name}={saved[name]!r}, the model has "
                    f"{name}={self.hparams[name]!r}. Set model.{name}={saved[name]} or choose another checkpoint."
                )
        resumes = self._trainer is not None and self._trainer.state.fn == "fit"
        if resumes and "optimizer_states" not in checkpoint:
            raise ConfigurationError(
                "The checkpoint holds no optimizer states, so training cannot resume from it; it can be tested and "
                "evaluated. A study drops them when a run has finished: keep_optimizer_states: true in its file keeps "
                "those of later runs. Elsewhere, save with save_weights_only=False."
            )

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        if not self._checked:
            self._check_batch(images, labels)
        logits = self(images)
        loss: Tensor = self.loss(logits, labels)
        accuracy = cast("MulticlassAccuracy", self.accuracy[f"{stage}_accuracy"])
        accuracy(logits, labels)
        training = stage == "train"
        self.log(f"{stage}/loss", loss, on_step=training, on_epoch=not training, prog_bar=True, batch_size=len(labels))
        self.log(f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=not training)
        return loss

    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        """Check the range of the first batch's pixels and labels, and the size of its images, before its first step."""
        self._checked = True
        self._check_size(images)
        low, high = images.min().item(), images.max().item()
        if low < -1e-6 or high > 1 + 1e-6:
            raise ConfigurationError(
                "ResNetClassifier expects pixels in [0, 1] and normalizes them itself (input_mean, input_std), but the "
                f"images span [{low:.3g}, {high:.3g}]. Divide by 255, or take the normalization out of the data "
                "pipeline."
            )
        classes = self.hparams["num_classes"]
        if labels.min() < 0 or labels.max() >= classes:
            raise ConfigurationError(
                f"Labels span {labels.min().item()}…{labels.max().item()}, but ResNetClassifier(num_classes={classes}) "
                f"knows 0…{classes - 1}. Set num_classes to the number of classes in the data."
            )

    def _check_size(self, images: Tensor) -> None:
        """Refuse images so small that instance normalization would normalize single values, to zeros."""
        stem, (height, width) = self.hparams["stem"], images.shape[-2:]
        if find_norm(self.hparams["norm"]).data == "in" and smallest_map(stem, height, width) == (1, 1):
            other, least = ("", 9) if stem == "cifar" else ("stem='cifar', ", 33)
            raise ConfigurationError(
                f"norm='in' normalizes every channel of every image over its positions, and {height}x{width} images "
                f"end as 1x1 maps with stem={stem!r}: nothing would be left. Use {other}larger images (from {least} "
                "pixels on), or another norm, such as 'gn'."
            )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        if self.hparams["decayed"] == "invariant":
            return self._groups_by_role()
        least_dimensions = {"all": 0, "weights": 2, "none": 99}[self.hparams["decayed"]]
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= least_dimensions]},
            {"params": [p for p in trained if p.ndim < least_dimensions], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _groups_by_role(self) -> list[dict[str, Any]]:
        """Return the parameters by their roles in the scale symmetries of training, decayed only if invariant."""
        was, images = self.training, torch.rand(2, 3, 64, 64).to(next(self.parameters()))
        try:
            symmetries = scale_symmetries(self.train(), images)
        finally:
            self.train(was)
        return symmetries.parameter_groups(self, weight_decay=dict.fromkeys(("rescaling", "without effect", "none"), 0))


def _check(
    num_classes: int,
    arch: str,
    stem: str,
    label_smoothing: float,
    mean: Sequence[float],
    std: Sequence[float],
    decayed: str,
    norm: str,
) -> None:
    whole("num_classes", num_classes, 2)
    entry_of("arch", arch, dict.fromkeys(ARCHITECTURES))
    find_norm(norm)
    if stem not in ("cifar", "imagenet"):
        raise ConfigurationError(f"stem={stem!r} is unknown; choose 'cifar' or 'imagenet'.")
    if not (is_number(label_smoothing) and 0 <= label_smoothing < 1):
        raise ConfigurationError(f"label_smoothing={short_repr(label_smoothing)} must be in [0, 1).")
    means, stds = (
        numbers_of(f"input_{name}", values, "three numbers") for name, values in (("mean", mean), ("std", std))
    )
    if means is None or stds is None or len(means) != 3 or len(stds) != 3:
        raise ConfigurationError(f"input_mean={means} and input_std={stds} must have three values each.")
    if min(std) <= 0:
        raise ConfigurationError(f"input_std={tuple(std)} must be positive.")
    if decayed not in ("all", "weights", "invariant", "none"):
        raise ConfigurationError(f"decayed={decayed!r} is unknown; choose 'all', 'weights', 'invariant' or 'none'.")
