"""Trainings of the gallery's transformers: a ViT on digits and a GPT on text, with AdamW and with Muon.

``python docs/transformers.py runs/transformers`` trains four small networks for 500 steps each, on one CPU core in a
few minutes, and writes their records and docs/records/transformers.json, from which the gallery's table is checked.
The digits are those of scikit-learn; the text is the reference of the Python language, which ships with Python.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
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

DATA = Path(__file__).resolve().parent / "records" / "transformers.json"
STEPS, WIDTH, HEADS, LAYERS, TOKENS = 500, 64, 4, 4, 64
_KEYS = (
    "symmetry/max_charge",
    "symmetry/max_uncanceled",
    "symmetry/imbalance",
    "symmetry/joint_norm",
    "symmetry/joint_angular_update",
    "orthogonality_control/max_abs_cos",
)


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


def train(name: str, optimizer: str, folder: Path) -> dict[str, Any]:
    """Train one network, and return what the gallery says about it."""
    pl.seed_everything(0, verbose=False)
    network, batches = NETWORKS[name]()
    record = RecordLogger(str(folder.parent), name=folder.name, version=f"{name}-{optimizer}")
    monitors: list[pl.Callback] = [OrthogonalityMonitor(), NormGrowthMonitor(), SymmetryMonitor()]
    settings: dict[str, Any] = {
        "max_steps": STEPS * (2 if optimizer == "muon" else 1),
        "log_every_n_steps": 10,
        "accelerator": "cpu",
    }
    trainer = pl.Trainer(logger=[record], callbacks=monitors, enable_checkpointing=False, **settings)
    trainer.fit(Training(network, name, optimizer), batches)
    shares = scale_symmetries(network, next(iter(batches))[0][:2]).shares
    metrics = read_record(record.folder).metrics
    curves = {key: [metrics[key][0][1], metrics[key][-1][1]] for key in _KEYS if key in metrics}
    return {
        "shares": {role: round(share, 4) for role, share in shares.items()},
        "first and last": {key: [float(f"{value:.4g}") for value in values] for key, values in curves.items()},
        "largest charge": float(f"{max(value for _, value in metrics['symmetry/max_charge']):.2g}"),
    }


def main(arguments: Sequence[str]) -> None:
    """Train all four and write the record."""
    folder = Path(arguments[0])
    runs = {f"{n}-{optimizer}": train(n, optimizer, folder) for n in NETWORKS for optimizer in ("adamw", "muon")}
    DATA.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
