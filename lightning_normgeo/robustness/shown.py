"""A few samples under every attack, for showing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_normgeo.robustness.decisions import Rows


class Shown:
    """Keeps the first samples that are evaluated.

    Args:
        count: how many.

    Attributes:
        pixels: for each attack the images by index, as pixels.
        predictions: likewise.
        labels: by index.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.pixels: dict[str, dict[int, Tensor]] = {}
        self.predictions: dict[str, dict[int, int]] = {}
        self.labels: dict[int, int] = {}

    def add(self, attack: str, images: Tensor, rows: Rows, to_pixels: Callable[[Tensor], Tensor]) -> None:
        """Keep those of a batch that are to be shown, as pixels."""
        indices = rows.index.tolist()
        if attack == "clean":
            room = self.count - len(self.labels)
            self.labels.update(zip(indices[:room], rows.label[:room].tolist(), strict=True))
        for k, index in enumerate(indices):
            if index in self.labels:
                self.pixels.setdefault(attack, {})[index] = to_pixels(images[k : k + 1])[0].detach().cpu()
                self.predictions.setdefault(attack, {})[index] = int(rows.prediction[k])
