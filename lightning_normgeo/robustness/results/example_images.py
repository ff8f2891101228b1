"""A few samples under every attack, for showing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_normgeo.robustness.results.sample_results import SampleRows


class ExampleImages:
    """Keeps the first samples that are evaluated.

    Args:
        count: how many.

    Attributes:
        pixels: for each attack the images by sample, as pixels.
        predictions: likewise.
        labels: by sample.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.pixels: dict[str, dict[int, Tensor]] = {}
        self.predictions: dict[str, dict[int, int]] = {}
        self.labels: dict[int, int] = {}

    def lacks(self, attack: str, samples: Sequence[int]) -> bool:
        """Whether samples have to be attacked for their pictures, as after a kill, which leaves only decisions."""
        if len(self.labels) < self.count:
            return True
        seen = self.pixels.get(attack, {})
        return any(sample in self.labels and sample not in seen for sample in samples)

    def add(self, attack: str, images: Tensor, rows: SampleRows, to_pixels: Callable[[Tensor], Tensor]) -> None:
        """Keep those of a batch that are to be shown, as pixels."""
        samples = rows.sample.tolist()
        if attack == "clean":
            room = self.count - len(self.labels)
            self.labels.update(zip(samples[:room], rows.label[:room].tolist(), strict=True))
        for k, sample in enumerate(samples):
            if sample in self.labels:
                self.pixels.setdefault(attack, {})[sample] = to_pixels(images[k : k + 1])[0].detach().cpu()
                self.predictions.setdefault(attack, {})[sample] = int(rows.prediction[k])
