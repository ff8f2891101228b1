"""Example images: a few samples under every attack, for pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows


class ExampleImages:
    """Keeps the images, predictions and labels of the first samples that are evaluated.

    Args:
        count: number of samples to keep.
        without: names of attacks that have no pictures.

    Attributes:
        pixels: the images as pixels, on the host, by attack and sample.
        predictions: the predicted classes, by attack and sample.
        labels: the labels, by sample.
    """

    def __init__(self, count: int = 0, without: Iterable[str] = ()) -> None:
        self.count, self._without = count, frozenset(without)
        self.pixels: dict[str, dict[int, Tensor]] = {}
        self.predictions: dict[str, dict[int, int]] = {}
        self.labels: dict[int, int] = {}

    def lacks(self, attack: str, samples: Sequence[int]) -> bool:
        """Whether pictures of samples are missing: after a kill the journal has only the per-sample results."""
        if attack in self._without:
            return False
        if len(self.labels) < self.count:
            return True
        seen = self.pixels.get(attack, {})
        return any(sample in self.labels and sample not in seen for sample in samples)

    def add(self, attack: str, images: Tensor, rows: SampleRows, to_pixels: Callable[[Tensor], Tensor]) -> None:
        """Keep the samples of a batch that are example images.

        Args:
            attack: name of the attack; ``clean``, which comes first, chooses the samples.
            images: attacked images, in the threat model's space.
            rows: per-sample results of the same samples.
            to_pixels: converts images to pixels.
        """
        if attack in self._without:
            return
        samples = rows.sample.tolist()
        if attack == "clean":
            room = self.count - len(self.labels)
            self.labels.update(zip(samples[:room], rows.label[:room].tolist(), strict=True))
        for k, sample in enumerate(samples):
            if sample in self.labels:
                self.pixels.setdefault(attack, {})[sample] = to_pixels(images[k : k + 1])[0].detach().cpu()
                self.predictions.setdefault(attack, {})[sample] = int(rows.prediction[k])
