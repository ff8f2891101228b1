"""Trainings of the gallery's transformers: a ViT on digits and a GPT on text, with AdamW and with Muon.

``python docs/transformers.py runs/transformers`` trains four small networks for 500 steps each, on one CPU core in a
few minutes, and writes their records and docs/records/transformers.json, from which the gallery's table is checked.
The digits are those of scikit-learn; the text is the reference of the Python language, which ships with Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        heads = [layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


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
        return self.head(self.norm(self.blocks(y + self.position)))


class Training(pl.LightningModule):
    """Classification of images, or prediction of the next byte."""

    def __init__(self, network: nn.Module, muon: bool) -> None:
        super().__init__()
        self.network, self.muon = network, muon

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        x, y = batch
        logits = self.network(x)
        loss = F.cross_entropy(logits.mean(1), y) if y.ndim == 1 else F.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""
        if not self.muon:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        matrices = [p for p in self.network.blocks.parameters() if p.ndim == 2]  # type: ignore[union-attr]
        rest = [p for p in self.parameters() if not any(p is other for other in matrices)]
        return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1)]


class ByHand(Training):
    """The same with Muon and AdamW side by side, which Lightning leaves to manual optimization."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take a step of both optimizers."""
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss
