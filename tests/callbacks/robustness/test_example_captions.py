"""Captions of example images: labels, predicted classes, and logits that are not finite."""

from __future__ import annotations

import torch

from lightning_normgeo.callbacks._robustness.example_pictures import example_strips
from lightning_normgeo.robustness.results.example_images import ExampleImages


def test_a_prediction_without_finite_logits_is_no_class() -> None:
    shown = ExampleImages(1)
    shown.labels[7] = 3
    shown.pixels = {name: {7: torch.rand(1, 4, 4)} for name in ("clean", "bim")}
    shown.predictions = {"clean": {7: 3}, "bim": {7: -1}}
    assert example_strips(shown, 1)[1] == ["label 3: clean → 3, bim → not finite"]
