"""The handwritten digits that scikit-learn ships: real images without a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.data.images import ImageDataModule, stratified_split

_TEST_FRACTION = 0.2
_TEST_SEED = 2020


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits (UCI, via scikit-learn), enlarged from 8×8 to 32×32 and repeated in three channels.

    One fifth of each class is the test set, the same for every ``split_seed``. Digits are not symmetric, so they are
    not flipped.

    Args:
        batch_size: images per batch and device.
        val_fraction: part of the training images kept for validation.
        crop_padding: training images are padded by so many zero pixels and cropped at random; 0 for none.
        num_workers: worker processes per loader.
        split_seed: of the validation split.
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
        """Return uint8 images and labels of ``train`` or ``test``."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        labels = torch.as_tensor(digits.target).long()
        small = torch.as_tensor(digits.images).float()[:, None] / 16
        images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
        images = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        parts = dict(zip(("train", "test"), stratified_split(labels, _TEST_FRACTION, _TEST_SEED), strict=True))
        return images[parts[split]], labels[parts[split]]
