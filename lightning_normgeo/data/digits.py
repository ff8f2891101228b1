"""The handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.data.images import ImageDataModule, stratified_split

_TEST_FRACTION = 0.2
_TEST_SEED = 2020


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits (UCI, via scikit-learn), enlarged from 8×8 to 32×32 and repeated in three channels.

    The test set is one fifth of each class, the same for every ``split_seed``. Digits are not symmetric, so training
    images are not flipped.

    Args:
        batch_size: images per batch and device.
        val_fraction: fraction of the training images kept for validation, in (0, 1).
        crop_padding: zero pixels on each side of training images before a random crop to their size; 0 for no crop.
        num_workers: worker processes per loader.
        split_seed: seed of the validation split.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        crop_padding: int = 0,
        num_workers: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, False, crop_padding, num_workers, split_seed)
        self.save_hyperparameters()

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return images, uint8 ``(n, 3, 32, 32)``, and labels ``(n,)`` of ``train`` or ``test``."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        labels = torch.as_tensor(digits.target).long()
        small = torch.as_tensor(digits.images).float()[:, None] / 16
        images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
        images = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        parts = dict(zip(("train", "test"), stratified_split(labels, _TEST_FRACTION, _TEST_SEED), strict=True))
        return images[parts[split]], labels[parts[split]]
