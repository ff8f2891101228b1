"""Trainings of the gallery's transformers: a ViT on digits and a GPT on text, with AdamW and with Muon.

``python docs/transformers.py runs/transformers`` trains four small networks for 500 steps each, on one CPU core in a
few minutes; those that are in the folder already are not trained again. It writes docs/records/transformers.json, the
page of the gallery that is made from it, and its pictures. The digits are those of scikit-learn; the text is the
reference of the Python language, which ships with Python.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import (
    DigitsDataModule,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    SymmetryMonitor,
    read_record,
    scale_symmetries,
)
from lightning_normgeo.report import write_report

DOCS = Path(__file__).resolve().parent
DATA = DOCS / "records" / "transformers.json"
PAGE = DOCS / "reference" / "transformers.md"
STEPS, WIDTH, HEADS, LAYERS, TOKENS = 500, 64, 4, 4, 64
PICTURES = ("charges", "imbalance", "joint-norm")
_KEYS = (
    "symmetry/max_charge",
    "symmetry/max_uncanceled",
    "symmetry/joint_norm",
    "symmetry/joint_angular_update",
    "orthogonality_control/max_abs_cos",
)
KINDS = {
    "γ, β against their readers": ".norm",
    "queries against keys": ".query.weight[i]",
    "values": ".value.weight[i]",
}
"""Kinds of rescalings in the blocks, and what their texts contain."""


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after attention and after the two-layer network."""
        y = self.norm1(x)
        query, key, value = (
            layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        stream: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return stream


class Transformer(nn.Module):
    """Blocks between an embedding and a head: a ViT of 4×4 patches, or a GPT with a vocabulary of bytes."""

    def __init__(self, embedding: nn.Module, tokens: int, outputs: int, causal: bool) -> None:
        super().__init__()
        self.embedding = embedding
        self.position = nn.Parameter(0.02 * torch.randn(tokens, WIDTH))
        self.blocks = nn.Sequential(*(Block(causal) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for each token."""
        y = self.embedding(x)
        y = y.flatten(2).transpose(1, 2) if y.ndim == 4 else y
        logits: Tensor = self.head(self.norm(self.blocks(y + self.position)))
        return logits


class Training(pl.LightningModule):
    """Classification of images, or prediction of the next byte, with one optimizer or two side by side."""

    automatic_optimization = False

    def __init__(self, network: Transformer, name: str, optimizer: str) -> None:
        super().__init__()
        self.network, self.muon = network, optimizer == "muon"
        self.save_hyperparameters({"network": name, "optimizer": optimizer})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take a step of all optimizers, and return the cross entropy."""
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        x, y = batch
        logits = self.network(x)
        logits, y = (logits.mean(1), y) if y.ndim == 1 else (logits.flatten(0, 1), y.flatten())
        loss = F.cross_entropy(logits, y)
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""
        if not self.muon:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        matrices = [p for p in self.network.blocks.parameters() if p.ndim == 2]
        rest = [p for p in self.parameters() if not any(p is other for other in matrices)]
        return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1)]


def vit() -> tuple[Transformer, DataLoader[Any]]:
    """Return a ViT of 4×4 patches, and the digits of scikit-learn as its batches."""
    images, labels = DigitsDataModule().load("train")
    data = TensorDataset(images.float() / 255, labels)
    network = Transformer(nn.Conv2d(3, WIDTH, 4, 4), TOKENS, 10, causal=False)
    return network, DataLoader(data, batch_size=64, shuffle=True)


def gpt() -> tuple[Transformer, DataLoader[Any]]:
    """Return a GPT with a vocabulary of bytes, and Python's reference as its batches."""
    text = torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8)
    chunks = text[: len(text) // (TOKENS + 1) * (TOKENS + 1)].view(-1, TOKENS + 1).long()
    data = TensorDataset(chunks[:, :-1], chunks[:, 1:])
    network = Transformer(nn.Embedding(256, WIDTH), TOKENS, 256, causal=True)
    return network, DataLoader(data, batch_size=32, shuffle=True)


NETWORKS: dict[str, Callable[[], tuple[Transformer, DataLoader[Any]]]] = {"vit": vit, "gpt": gpt}


def train(name: str, optimizer: str, folder: Path) -> None:
    """Train one network."""
    pl.seed_everything(0, verbose=False)
    network, batches = NETWORKS[name]()
    record = RecordLogger(str(folder.parent), name=folder.name, version=f"{name}-{optimizer}")
    monitors: list[pl.Callback] = [OrthogonalityMonitor(), NormGrowthMonitor(), SymmetryMonitor()]
    settings: dict[str, Any] = {"max_steps": STEPS * (2 if optimizer == "muon" else 1), "log_every_n_steps": 10}
    trainer = pl.Trainer(logger=[record], callbacks=monitors, enable_checkpointing=False, accelerator="cpu", **settings)
    trainer.fit(Training(network, name, optimizer), batches)


def numbers(run: Path) -> dict[str, Any]:
    """Return what the gallery says about a run."""
    record = read_record(run)
    pl.seed_everything(0, verbose=False)
    network, batches = NETWORKS[run.name.partition("-")[0]]()
    shares = scale_symmetries(network, next(iter(batches))[0][:2]).shares
    imbalance = [row for _, row in record.layers["symmetry/imbalance"]]
    curves = {key: [value for _, value in record.points(key)] for key in _KEYS}
    return {
        "shares": {role: round(share, 4) for role, share in shares.items()},
        "curves": {
            key: {"first": _short(values[0]), "last": _short(values[-1]), "most": _short(max(values))}
            for key, values in curves.items()
        },
        "imbalance": {
            kind: [_short(_mean(row, part)) for row in (imbalance[0], imbalance[-1])] for kind, part in KINDS.items()
        },
    }


def _mean(row: dict[str, float], part: str) -> float:
    """Return the mean over the families of the blocks whose text contains a part."""
    values = [value for family, value in row.items() if part in family and ".blocks." in family]
    return sum(values) / len(values)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def page() -> str:
    """Return the page of the gallery."""
    runs = json.loads(DATA.read_text(encoding="utf-8"))
    curves = {name: one["curves"] for name, one in runs.items()}
    controls, charges, terms, norms, angles = (
        "orthogonality_control/max_abs_cos",
        "symmetry/max_charge",
        "symmetry/max_uncanceled",
        "symmetry/joint_norm",
        "symmetry/joint_angular_update",
    )
    roles = ("invariant jointly", "rescaling", "without effect", "none")
    tables = {
        "shares": _table(
            ["share of the parameters", *roles],
            {name: [f"{100 * one['shares'][role]:.1f} %" for role in roles] for name, one in runs.items()},
        ),
        "charges": _table(
            ["largest of all measured steps", "charge", "if its terms did not cancel", "\\|cos\\| of single weights"],
            {n: [f"{one[k]['most']:.1e}" for k in (charges, terms, controls)] for n, one in curves.items()},
        ),
        "imbalance": _table(
            ["mean imbalance, first → last step", *KINDS],
            {n: ["{:.2f} → {:.2f}".format(*one["imbalance"][kind]) for kind in KINDS] for n, one in runs.items()},
        ),
        "norms": _table(
            ["first → last step", "‖W‖", "angle per step, radians"],
            {n: [f"{o[k]['first']:.4g} → {o[k]['last']:.4g}" for k in (norms, angles)] for n, o in curves.items()},
        ),
    }
    text = (DATA.parent / "transformers.txt").read_text(encoding="utf-8")
    sizes = {"steps": STEPS, "layers": LAYERS, "width": WIDTH, "heads": HEADS, "tokens": TOKENS}
    return text.format(**sizes, **{f"table_{name}": table for name, table in tables.items()})


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(folder: Path) -> None:
    """Draw the pictures of the page."""
    from pictures import on_paper

    with TemporaryDirectory() as pictures:
        write_report(folder, Path(pictures), form="png")
        for name in PICTURES:
            on_paper(Path(pictures, f"{name}.png"), DOCS / "pictures" / f"transformers-{name}.png")


def main(arguments: Sequence[str]) -> None:
    """Train the networks that are missing, and write record, page and pictures."""
    folder = Path(arguments[0])
    for name in NETWORKS:
        for optimizer in ("adamw", "muon"):
            if not (folder / f"{name}-{optimizer}").exists():
                train(name, optimizer, folder)
    runs = {run.name: numbers(run) for run in sorted(folder.iterdir()) if run.is_dir()}
    DATA.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    draw(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
