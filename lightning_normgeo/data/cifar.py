"""CIFAR-10 and CIFAR-100 through torchvision."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import Tensor

from lightning_normgeo.data.images import ImageDataModule
from lightning_normgeo.errors import ConfigurationError

_SETS = {"cifar10": (torchvision.datasets.CIFAR10, 10), "cifar100": (torchvision.datasets.CIFAR100, 100)}
_TRAINING_IMAGES = 50_000


class CIFARDataModule(ImageDataModule):
    """CIFAR-10 or CIFAR-100, downloaded by torchvision.

    Args:
        name: ``cifar10`` or ``cifar100``.
        data_dir: folder of the downloaded data.
        download: whether to download missing data.
        batch_size: images per batch and device.
        val_fraction: fraction of the training images kept for validation, in (0, 1).
        flip: whether training images are flipped at random (the paper's only augmentation).
        crop_padding: zero pixels on each side of training images before a random crop to their size; 0 for no crop.
        num_workers: worker processes per loader.
        split_seed: seed of the validation split.

    Raises:
        ConfigurationError: before training starts, if data is missing and cannot be downloaded.
    """

    def __init__(
        self,
        name: Literal["cifar10", "cifar100"] = "cifar10",
        data_dir: str = "data",
        download: bool = True,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        flip: bool = True,
        crop_padding: int = 0,
        num_workers: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, flip, crop_padding, num_workers, split_seed)
        if name not in _SETS:
            raise ConfigurationError(f"CIFARDataModule(name={name!r}) is unknown; choose 'cifar10' or 'cifar100'.")
        self.save_hyperparameters()
        self.dataset_name, self.data_dir, self.download = name, data_dir, download
        self.num_classes = _SETS[name][1]

    def training_images(self) -> int:
        """Return 50,000, the size of both training sets."""
        return _TRAINING_IMAGES

    def prepare_data(self) -> None:
        """Download the data; Lightning calls this on one process only."""
        for train in (True, False):
            self._open(train, self.download)

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return images, uint8 ``(n, 3, 32, 32)``, and labels ``(n,)`` of ``train`` or ``test``."""
        dataset = self._open(split == "train", download=False)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(dataset.targets)

    def _open(self, train: bool, download: bool) -> torchvision.datasets.CIFAR10:
        folder = Path(self.data_dir)
        was_there = folder.exists()
        try:
            return _SETS[self.dataset_name][0](self.data_dir, train=train, download=download)
        except (OSError, RuntimeError) as error:
            if not was_there:
                with suppress(OSError):  # holds what was downloaded, or could not be made
                    folder.rmdir()
            raise ConfigurationError(
                f"{self.dataset_name} is not complete in data_dir={self.data_dir!r} and could not be downloaded "
                f"({error}). Without a network: put the extracted archive there from another machine; or use "
                "ImageFolderDataModule for a folder of images; or DigitsDataModule, which needs no download."
            ) from error
