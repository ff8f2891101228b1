"""Trainings of the page on spheres: free, with weight decay, and on spheres at the same angular speeds.

``python docs/spheres.py runs/spheres DATA`` trains a small residual network with batch normalization on CIFAR-10 for
each condition and three seeds, in a few minutes per run on one CPU core; runs that are in the folder already are not
trained again. DATA is the folder of an image folder or of torchvision's CIFAR-10. It writes docs/records/spheres.json
and the picture of the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import altair
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_normgeo import (
    CIFARDataModule,
    ImageFolderDataModule,
    NormGrowthMonitor,
    RecordLogger,
    SphereProjection,
    read_record,
)

DOCS = Path(__file__).resolve().parent
DATA = DOCS / "records" / "spheres.json"
PAGE = DOCS / "callbacks" / "sphere_projection.md"
SEEDS, STEPS, BATCH, EVERY, TESTED_EVERY = 3, 800, 64, 10, 100
LR, MOMENTUM, DECAY = 0.02, 0.9, 0.005
CONDITIONS = {
    "free": "free, no decay",
    "decayed": "free, weight decay",
    "sphere": "sphere, constant rate",
    "sphere-as-free": "sphere, angular speed of free",
    "sphere-as-decayed": "sphere, angular speed of decayed",
}
_KEYS = {
    "norm_growth/weight_norm": "‖W‖ of scale-invariant weights",
    "norm_growth/angular_update": "angle per step, radians",
    "test_accuracy": "test accuracy",
}


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation behind the sum."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Network(nn.Sequential):
    """A residual network of eight layers, with batch normalization behind every convolution."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            *(Block(i, o, s) for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2))),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


class Training(pl.LightningModule):
    """Classification with SGD.

    Args:
        condition: one of ``CONDITIONS``.
        rates: learning rate of each convolution at each step, over ``LR``. Default: 1.
    """

    def __init__(self, condition: str, seed: int, rates: Sequence[Sequence[float]] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters({"condition": condition, "seed": seed})
        self.network, self.rates = Network(), rates
        self.decay = DECAY if condition == "decayed" else 0.0
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy."""
        self.accuracy(self.network(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Return SGD; the learning rate of the convolutions follows ``rates``."""
        convolutions = [p for p in self.parameters() if p.ndim == 4]
        rest = [p for p in self.parameters() if p.ndim != 4]
        groups = [{"params": [p], "weight_decay": self.decay} for p in convolutions]
        optimizer = torch.optim.SGD([*groups, {"params": rest, "weight_decay": 0.0}], lr=LR, momentum=MOMENTUM)
        factors: list[Callable[[int], float]] = [partial(self._factor, k) for k in range(len(convolutions))]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [*factors, lambda step: 1.0])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, convolution: int, step: int) -> float:
        return 1.0 if self.rates is None else self.rates[min(step, len(self.rates) - 1)][convolution]


class Norms(pl.Callback):
    """Keeps (r/‖W‖)² at each step, mean over the filters of each convolution, with r = ‖W‖ at the start."""

    def __init__(self) -> None:
        self.ratios: list[list[float]] = []
        self._start: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Add the learning rates on spheres, over that of this training."""
        squares = [p.detach().double().flatten(1).square().sum(1) for p in pl_module.parameters() if p.ndim == 4]
        self._start = self._start or squares
        self.ratios.append([float((a / b).mean()) for a, b in zip(self._start, squares, strict=True)])


def loaded(folder: str) -> dict[str, TensorDataset]:
    """Return the training and test images with their labels, normalized to mean 0 and deviation 1."""
    module = ImageFolderDataModule(folder) if Path(folder, "train").is_dir() else CIFARDataModule(data_dir=folder)
    found = {}
    for split in ("train", "test"):
        images, labels = module.load(split)
        found[split] = TensorDataset((images.float() / 255 - 0.47) / 0.25, labels)
    return found


def train(condition: str, seed: int, folder: Path, data: Mapping[str, TensorDataset]) -> None:
    """Train one network."""
    pl.seed_everything(seed, verbose=False)
    source = {"sphere-as-free": "free", "sphere-as-decayed": "decayed"}.get(condition)
    rates = json.loads((folder / f"{source}-{seed}" / "rates.json").read_text()) if source else None
    record = RecordLogger(str(folder.parent), name=folder.name, version=f"{condition}-{seed}")
    norms = Norms()
    callbacks: list[pl.Callback] = [NormGrowthMonitor(EVERY), norms]
    if condition.startswith("sphere"):
        callbacks.append(SphereProjection())
    trainer = pl.Trainer(
        logger=[record], callbacks=callbacks, enable_checkpointing=False, accelerator="cpu", max_steps=STEPS,
        log_every_n_steps=EVERY, val_check_interval=TESTED_EVERY, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches = DataLoader(data["train"], BATCH, shuffle=True, drop_last=True)
    trainer.fit(Training(condition, seed, rates), batches, DataLoader(data["test"], 500))
    (folder / f"{condition}-{seed}" / "rates.json").write_text(json.dumps(norms.ratios))


def numbers(folder: Path) -> dict[str, Any]:
    """Return the curves of each condition: for each measured step mean, smallest and largest over the seeds."""
    found: dict[str, Any] = {}
    for condition in CONDITIONS:
        records = [read_record(folder / f"{condition}-{seed}") for seed in range(SEEDS)]
        curves = {}
        for key in _KEYS:
            points = [dict(record.points(key)) for record in records]
            steps = sorted(set.intersection(*(set(one) for one in points)))
            steps = steps[:: max(1, len(steps) // 30)]
            curves[key] = [[step, *_spread([one[step] for one in points])] for step in steps]
        losses = [[value for _, value in record.points("train_loss")] for record in records]
        found[condition] = {
            "curves": curves,
            "final": _spread([fmean(v for _, v in record.points("test_accuracy")[-3:]) for record in records]),
            "best": _spread([max(v for _, v in record.points("test_accuracy")) for record in records]),
            # how much the loss jumps between batches, after the first third of the training
            "jumps": _spread([float(np.abs(np.diff(one[len(one) // 3 :])).mean()) for one in losses]),
            # how much the test accuracy varies between evaluations around its course
            "swings": _spread([_swings([v for _, v in record.points("test_accuracy")]) for record in records]),
        }
    return found


def _swings(values: Sequence[float]) -> float:
    """Return the mean distance of a curve from the mean of its neighbors, after its first third."""
    late = np.array(values[len(values) // 3 :])
    return float(np.abs(late[1:-1] - (late[:-2] + late[2:]) / 2).mean())


def _spread(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in (fmean(values), min(values), max(values))]


def table(found: Mapping[str, Any]) -> str:
    """Return the table of the page: means over the seeds, with the smallest and the largest."""
    columns = ["training", "accuracy, last three", "best", "swings of the accuracy", "jumps of the loss", "last angle"]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for condition, name in CONDITIONS.items():
        one = found[condition]
        angle = one["curves"]["norm_growth/angular_update"][-1][1:]
        percent = (_range([100 * value for value in one[key]], ".1f", " %") for key in ("final", "best", "swings"))
        lines.append([name, *percent, _range(one["jumps"], ".3f"), _range(angle, ".4f")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _range(values: Sequence[float], form: str, unit: str = "") -> str:
    mean, low, high = (f"{value:{form}}" for value in values)
    return f"{mean}{unit} ({low} … {high})"


def with_table(text: str, found: Mapping[str, Any]) -> str:
    """Return the page with the table between its marks."""
    before, _, rest = text.partition("<!-- spheres -->\n")
    after = rest.partition("<!-- /spheres -->")[2]
    return f"{before}<!-- spheres -->\n{table(found)}\n<!-- /spheres -->{after}"


def draw(found: Mapping[str, Any]) -> None:
    """Draw the picture of the page."""
    from pictures import on_paper

    panels = []
    for key, title in _KEYS.items():
        rows = [
            {"condition": name, "step": step, "mean": mean, "low": low, "high": high}
            for condition, name in CONDITIONS.items()
            for step, mean, low, high in found[condition]["curves"][key]
        ]
        kind = "log" if key == "norm_growth/angular_update" else "linear"
        base = altair.Chart(altair.Data(values=rows), width=300, height=220, title=title)
        color = altair.Color("condition:N", sort=list(CONDITIONS.values()), title=None)
        x = altair.X("step:Q", title="step")
        scale = altair.Scale(type=kind, zero=False)
        band = base.mark_area(opacity=0.15).encode(
            x, altair.Y("low:Q", scale=scale, title=None), altair.Y2("high"), color
        )
        panels.append(band + base.mark_line().encode(x, altair.Y("mean:Q", scale=scale, title=None), color))
    chart = altair.hconcat(*panels).configure_legend(orient="bottom", columns=3, labelLimit=300)
    with TemporaryDirectory() as pictures:
        chart.save(Path(pictures, "spheres.png"), scale_factor=1.5)
        on_paper(Path(pictures, "spheres.png"), DOCS / "pictures" / "spheres.png")


def main(arguments: Sequence[str]) -> None:
    """Train the networks that are missing, and write the record and the picture."""
    folder = Path(arguments[0])
    missing = [
        (condition, seed)
        for seed in range(SEEDS)
        for condition in CONDITIONS
        if not (folder / f"{condition}-{seed}" / "rates.json").exists()
    ]
    data = loaded(arguments[1]) if missing else {}
    for condition, seed in missing:
        train(condition, seed, folder, data)
    found = numbers(folder)
    DATA.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    draw(found)


if __name__ == "__main__":
    main(sys.argv[1:])
