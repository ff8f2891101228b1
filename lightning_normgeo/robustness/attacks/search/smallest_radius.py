"""The smallest radius at which an attack succeeds, found by bisection for each sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.search.ball import per_image
from lightning_normgeo.robustness.attacks.search.losses import predicted
from lightning_normgeo.robustness.attacks.search.rules import ActiveSamples


class SmallestRadius:
    """Bisection of the radius over attacks from anew.

    A sample is first attacked at the whole radius. If it is broken there, the interval [0, ε] that holds its smallest
    radius is halved, by an attack at the radius in its middle, as often as there are bisections. The smallest radius
    that succeeded is an upper bound; it is less than ε/2^bisections above the smallest at which *this attack* succeeds,
    if that succeeds at all larger radii too.

    Args:
        bisections: number of halvings.
    """

    def __init__(self, bisections: int) -> None:
        self.bisections = bisections

    def begun(self, samples: ActiveSamples) -> ActiveSamples:
        """Return samples at the whole radius."""
        ones = torch.ones(samples.labels.shape, dtype=samples.images.dtype, device=samples.images.device)
        bounds = {
            "scale": ones,
            "low": torch.zeros_like(ones),
            "high": ones,
            "level": torch.zeros_like(samples.labels),
            "best": samples.images,
            "scores": samples.clean,
        }
        return replace(samples, bounds=bounds)

    def narrowed(self, samples: ActiveSamples, scores: Tensor) -> tuple[ActiveSamples, Tensor, ActiveSamples]:
        """Return the samples that are finished, at their best points, with the logits there; and those to be attacked.

        Args:
            samples: samples whose attack at their radius has ended.
            scores: logits of their points.
        """
        bounds, broken = samples.bounds, predicted(scores) != samples.labels
        first = bounds["level"] == 0
        kept = broken | first  # of samples that are not broken even at the whole radius, the last points are kept
        best = torch.where(per_image(kept, samples.images), samples.adversarial, bounds["best"])
        best_scores = torch.where(kept[:, None], scores, bounds["scores"])
        low = torch.where(broken, bounds["low"], bounds["scale"])
        high = torch.where(broken, bounds["scale"], bounds["high"])
        done = (bounds["level"] >= self.bisections) | (first & ~broken)
        narrower = {
            **bounds,
            "scale": (low + high) / 2,
            "low": low,
            "high": high,
            "level": bounds["level"] + 1,
            "best": best,
            "scores": best_scores,
        }
        samples = replace(samples, bounds=narrower)
        finished = replace(samples, adversarial=best)[done]
        again = replace(samples, restart=torch.zeros_like(samples.restart))[~done]
        return finished, best_scores[done], again
