"""Images from any folder of the form ``data_dir/{train,test}/<class>/<image>``."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from lightning_normgeo.data.images import ImageDataModule
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities.checked_values import whole
from lightning_normgeo.utilities.files import user_path

_ORDER_SEED = 2020


class ImageFolderDataModule(ImageDataModule):
    """Images in ``data_dir/train/<class>/`` and ``data_dir/test/<class>/``, decoded once and kept in memory as uint8.

    Their order is random but fixed, not sorted by class as on disk, so that the first part of the test set, which
    ``limit_test_batches`` and ``max_samples`` select, represents all classes.

    Args:
        data_dir: the folder that contains ``train`` and ``test``.
        image_size: side of the square images in pixels; images of another size are resized to it by their shorter side
            and center-cropped.
        batch_size: images per batch and device.
        val_fraction: fraction of the training images kept for validation, in (0, 1).
        flip: whether training images are flipped left to right with probability one half.
        crop_padding: zero pixels on each side of training images before a random crop to their size; 0 for no crop.
        num_workers: worker processes per loader.
        split_seed: seed of the validation split.
        max_memory_gb: largest allowed size of the images of a split in memory, in GiB.

    Raises:
        ConfigurationError: before training starts, for a missing folder, a class without images, classes that differ
            between train and test, an unreadable image, or more data than ``max_memory_gb``.
    """

    def __init__(
        self,
        data_dir: str = "data/images",
        image_size: int = 32,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        flip: bool = True,
        crop_padding: int = 0,
        num_workers: int = 0,
        split_seed: int = 0,
        max_memory_gb: float = 8.0,
    ) -> None:
        super().__init__(batch_size, val_fraction, flip, crop_padding, num_workers, split_seed)
        whole("ImageFolderDataModule: image_size", image_size, 1)
        self.save_hyperparameters()
        self.root, self.image_size, self.max_memory_gb = user_path(data_dir), image_size, max_memory_gb
        self.classes = _classes(self.root / "train")
        self.num_classes = len(self.classes)
        if _classes(self.root / "test") != self.classes:
            differing = sorted(set(self.classes) ^ set(_classes(self.root / "test")))
            raise ConfigurationError(
                f"Classes of {self.root}/train and {self.root}/test differ: {', '.join(differing)}."
            )

    def training_images(self) -> int:
        """Return the number of image files in the training folders."""
        return sum(len(_images(self.root / "train" / name)) for name in self.classes)

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return images, uint8 ``(n, 3, image_size, image_size)``, and labels ``(n,)`` of ``train`` or ``test``."""
        files = [(file, label) for label, name in enumerate(self.classes) for file in _images(self.root / split / name)]
        random.Random(_ORDER_SEED).shuffle(files)  # noqa: S311 - an order, not a secret
        size = len(files) * 3 * self.image_size**2 / 2**30
        if size > self.max_memory_gb:
            raise ConfigurationError(
                f"{len(files)} images of {self.image_size}×{self.image_size} take {size:.1f} GiB, more than "
                f"max_memory_gb={self.max_memory_gb:g}. Raise it, or choose a smaller image_size."
            )
        images = torch.empty(len(files), 3, self.image_size, self.image_size, dtype=torch.uint8)
        progress = track(files, f"reading {split} images", transient=True, disable=len(files) < 2000)
        for i, (file, _) in enumerate(progress):
            images[i] = self._decode(file)
        return images, torch.tensor([label for _, label in files])

    def _decode(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                pixels: Tensor = pil_to_tensor(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ConfigurationError(f"{file} cannot be read as an image ({error}). Repair or remove it.") from error
        if pixels.shape[1:] == (self.image_size, self.image_size):
            return pixels
        return center_crop(resize(pixels, [self.image_size], antialias=True), [self.image_size])  # type: ignore[no-any-return]


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ConfigurationError(
            f"{folder} does not exist. ImageFolderDataModule expects data_dir/train/<class>/<image> and the same "
            "under data_dir/test."
        )
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise ConfigurationError(f"{folder} has {len(classes)} class folder(s); at least 2 are needed.")
    empty = [name for name in classes if not _images(folder / name)]
    if empty:
        raise ConfigurationError(
            f"{folder} has class folders without images: {', '.join(empty)}. Add images ({', '.join(IMG_EXTENSIONS)}) "
            "or remove the folders."
        )
    return classes


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
