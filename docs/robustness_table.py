"""Trainings and evaluations of the gallery's robustness table: four normalizations, with and without weight decay.

``python docs/robustness_table.py runs/robustness DATA`` trains a small residual network on CIFAR-10 for each condition,
and evaluates it under attacks and corruptions, in about ten minutes per run on one CPU core; what is in the folder
already is not done again. DATA is the folder of an image folder or of torchvision's CIFAR-10. It writes
docs/records/robustness.json and the table of the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_normgeo import NormGrowthMonitor, RecordLogger, RobustnessEvaluation, read_record, swap_norm
from lightning_normgeo.robustness import compare, holm, load_decisions
from lightning_normgeo.utilities.attack_names import attack_title, is_detail

DOCS = Path(__file__).resolve().parent
RECORD, PAGE = DOCS / "records" / "robustness.json", DOCS / "reference" / "robustness_table.md"
TITLES = {"bn": "batch", "gn": "group", "ln": "layer", "wn": "weight"}
SHOWN = (
    *("clean", "gaussian", "bim_eps0.003922", "apgd_eps0.003922", "worst_eps0.003922"),
    *("bim_eps0.007843", "apgd_eps0.007843", "worst_eps0.007843"),
)
PAIRED = ("clean", "gaussian", "bim_eps0.003922", "worst_eps0.003922")
NORMS, DECAYS = ("bn", "gn", "ln", "wn"), (0.0, 0.001)
SAMPLES, RADII = 300, (1 / 255, 2 / 255)
ATTACKS: list[Any] = [
    *("gaussian", "bim", "apgd"),
    {"name": "apgd-t", "attack": "apgd", "loss": "dlr", "targets": 9},
    {"name": "square", "queries": 1000},
    *("corruptions", "sanity"),
]
STEPS, BATCH, LR, MOMENTUM, EVERY = 2000, 128, 0.02, 0.9, 50


class Training(pl.LightningModule):
    """Classification with SGD and a cosine schedule.

    Args:
        norm: normalization, as ``swap_norm`` takes it.
        weight_decay: weight decay of all parameters.
    """

    def __init__(self, norm: str, weight_decay: float) -> None:
        from spheres import Network

        super().__init__()
        self.save_hyperparameters()
        self.network = Network()
        if norm != "bn":
            swap_norm(self.network, norm, groups=8 if norm == "gn" else None)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy, of images that are flipped at random."""
        images, labels = batch
        flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        loss = F.cross_entropy(self(torch.where(flipped, images.flip(3), images)), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy, on_epoch=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy of the evaluated images."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Return SGD with a cosine schedule."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=self.hparams["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(norm: str, decay: float, folder: Path, data: Mapping[str, TensorDataset]) -> None:
    """Train one network, and keep its weights beside its record."""
    pl.seed_everything(0, verbose=False)
    record = RecordLogger(str(folder.parent), name=folder.name, version=name_of(norm, decay))
    trainer = pl.Trainer(
        logger=[record], callbacks=[NormGrowthMonitor(EVERY)], enable_checkpointing=False, accelerator="cpu",
        max_steps=STEPS, log_every_n_steps=EVERY, val_check_interval=STEPS // 3, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Training(norm, decay)
    batches = DataLoader(data["train"], BATCH, shuffle=True, drop_last=True)
    trainer.fit(module, batches, DataLoader(data["test"], 500))
    torch.save(module.state_dict(), folder / name_of(norm, decay) / "weights.pt")


def name_of(norm: str, decay: float) -> str:
    """Return the name of a run."""
    return f"{norm}-{'decay' if decay else 'free'}"


def evaluate(norm: str, decay: float, folder: Path, data: Mapping[str, TensorDataset]) -> None:
    """Evaluate one network, and add the results to its record."""
    module = Training(norm, decay)
    module.load_state_dict(torch.load(folder / name_of(norm, decay) / "weights.pt", weights_only=True))
    order = torch.randperm(len(data["test"]), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    record = RecordLogger(str(folder.parent), name=folder.name, version=name_of(norm, decay))
    callback = RobustnessEvaluation(attacks=ATTACKS, eps=list(RADII), mean=0.47, std=0.25, num_images=4)
    trainer = pl.Trainer(
        logger=[record], callbacks=[callback], accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.test(module, DataLoader(Subset(data["test"], order.tolist()), 100), verbose=False)


def numbers(folder: Path) -> dict[str, Any]:
    """Return what the page shows of each run, and the paired differences that weight decay makes."""
    runs: dict[str, Any] = {}
    for norm, decay in ((n, d) for d in DECAYS for n in NORMS):
        found = json.loads((folder / name_of(norm, decay) / "robustness.json").read_text())
        growth = [value for _, value in read_record(folder / name_of(norm, decay)).points("norm_growth/weight_norm")]
        keys = ("correct", "n", "accuracy", "ci_low", "ci_high")
        runs[name_of(norm, decay)] = {
            "rows": {row["attack"]: {key: row[key] for key in keys} for row in found["results"] if not is_detail(row)},
            "corruptions": found["corruptions"],
            "sanity": [check["outcome"] for check in found["sanity"]],
            "worst": found["worst"],
            "norms": [growth[0], growth[-1]] if growth else [],
        }
    paired = {}
    for norm in NORMS:
        free, decayed = (load_decisions(folder / name_of(norm, decay)) for decay in DECAYS)
        paired[norm] = {row: compare(free, decayed, row) for row in PAIRED}
    flat = [(norm, row) for norm in NORMS for row in PAIRED]
    adjusted = holm([paired[norm][row]["p_value"] for norm, row in flat])
    for (norm, row), p_value in zip(flat, adjusted, strict=True):
        paired[norm][row]["p_holm"] = p_value
    return {"runs": runs, "paired": paired}


def accuracy_table(found: Mapping[str, Any]) -> str:
    """Return the table of accuracies with their intervals."""
    columns = ["network", *(title(row) for row in SHOWN), "corruptions, mean"]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name, run in found["runs"].items():
        cells = [cell(run["rows"][row]) for row in SHOWN]
        lines.append([network(name), *cells, cell(run["corruptions"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paired_table(found: Mapping[str, Any]) -> str:
    """Return the table of the differences between the networks with and without weight decay, on the same images."""
    columns = ["normalization", *(title(row) for row in PAIRED)]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for norm, rows in found["paired"].items():
        cells = [
            f"{100 * one['difference']:+.1f} [{100 * one['ci_low']:+.1f}, {100 * one['ci_high']:+.1f}], "
            f"p = {one['p_holm']:.2g}"
            for one in rows.values()
        ]
        lines.append([TITLES[norm], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(row: str) -> str:
    """Return the title of a row of results."""
    return {"gaussian": "noise, σ = 0.05"}.get(row, attack_title(row))


def network(name: str) -> str:
    """Return the title of a network."""
    norm, _, kind = name.partition("-")
    return f"{TITLES[norm]}, {'weight decay' if kind == 'decay' else 'no decay'}"


def cell(row: Mapping[str, float]) -> str:
    """Return an accuracy with its interval, in percent."""
    return f"{100 * row['accuracy']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"


def with_tables(text: str) -> str:
    """Return the page with its tables between their marks."""
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    for name, make in (("accuracies", accuracy_table), ("paired", paired_table)):
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        after = rest.partition(f"<!-- /{name} -->")[2]
        text = f"{before}<!-- {name} -->\n{make(found)}\n<!-- /{name} -->{after}"
    return text


def main(arguments: Sequence[str]) -> None:
    """Train and evaluate the networks that are missing."""
    from spheres import loaded

    folder = Path(arguments[0])
    torch.set_num_threads(1)
    missing = [(n, d) for d in DECAYS for n in NORMS if not (folder / name_of(n, d) / "weights.pt").exists()]
    data = loaded(arguments[1])
    for norm, decay in missing:
        train(norm, decay, folder, data)
    for norm, decay in ((n, d) for d in DECAYS for n in NORMS):
        if not (folder / name_of(norm, decay) / "robustness.json").exists():
            evaluate(norm, decay, folder, data)
    RECORD.write_text(json.dumps(numbers(folder), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
