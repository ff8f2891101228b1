"""Data modules of images in memory: batches are uint8 until the device converts them to floats and augments them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities.checked_values import flag, is_number, short_repr, whole


class Batch(NamedTuple):
    """Images and labels; the images are uint8 until they are on the device, and floats in [0, 1] from then on."""

    images: Tensor
    labels: Tensor


class TrainBatch(NamedTuple):
    """A batch whose images are augmented once they are on the device."""

    images: Tensor
    labels: Tensor


class ImageTensors(Dataset[Batch]):
    """Images and labels in memory.

    Args:
        images: ``(n, channels, height, width)``, uint8.
        labels: ``(n,)``.
        train: whether batches are marked for augmentation.
    """

    def __init__(self, images: Tensor, labels: Tensor, train: bool = False) -> None:
        self.images, self.labels, self.train = images, labels, train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return a whole batch at once, so that no single images have to be collated."""
        chosen = torch.as_tensor(indices)
        kind = TrainBatch if self.train else Batch
        return kind(self.images[chosen], self.labels[chosen])


class ImageDataModule(pl.LightningDataModule):
    """Base class of the data modules, with splits, loaders and augmentation; subclasses implement :meth:`load`.

    Args:
        batch_size: images per batch and device.
        val_fraction: fraction of the *training* images kept for validation, in (0, 1); the test set is not split.
        flip: whether training images are flipped left to right with probability one half.
        crop_padding: zero pixels on each side of training images before a random crop to their size; 0 for no crop.
        num_workers: worker processes per loader; images are in memory, so 0 is fastest.
        split_seed: seed of the validation split.
    """

    num_classes: int

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        flip: bool = True,
        crop_padding: int = 0,
        num_workers: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        whole(f"{name}: batch_size", batch_size, 1)
        if not (is_number(val_fraction) and 0 < val_fraction < 1):
            raise ConfigurationError(f"{name}: val_fraction={short_repr(val_fraction)} must be between 0 and 1.")
        whole(f"{name}: crop_padding", crop_padding, 0)
        whole(f"{name}: num_workers", num_workers, 0)
        flag(f"{name}: flip", flip)
        self.batch_size, self.val_fraction, self.split_seed = batch_size, val_fraction, split_seed
        self.flip, self.crop_padding, self.num_workers = flip, crop_padding, num_workers
        self._sets: dict[str, ImageTensors] = {}

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return images, uint8 ``(n, channels, height, width)``, and labels ``(n,)`` of ``train`` or ``test``."""
        raise NotImplementedError

    def training_images(self) -> int:
        """Return the number of training images before the split, found as quickly as the data allows."""
        return len(self.load("train")[1])

    def training_batches(self) -> int:
        """Return the number of training batches of an epoch on one device, to one per class and batch size."""
        images = round(self.training_images() * (1 - self.val_fraction))
        return max(images // self.batch_size, 1)

    def setup(self, stage: str | None = None) -> None:
        """Load the images that a stage needs, unless they are loaded already."""
        if stage in (None, "fit", "validate") and "train" not in self._sets:
            images, labels = self.load("train")
            train, val = stratified_split(labels, self.val_fraction, self.split_seed)
            self._sets["train"] = ImageTensors(images[train], labels[train], train=True)
            self._sets["val"] = ImageTensors(images[val], labels[val])
        if stage in (None, "test", "predict") and "test" not in self._sets:
            self._sets["test"] = ImageTensors(*self.load("test"))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of shuffled training batches, which are marked for augmentation."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of test batches, which are also those to predict."""
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert images on the device to floats in [0, 1], and augment those of training batches."""
        if not isinstance(batch, (Batch, TrainBatch)):
            return batch
        images = batch.images.float() / 255
        if isinstance(batch, TrainBatch):
            images = random_crop(images, self.crop_padding)
            images = random_flip(images) if self.flip else images
        return Batch(images, batch.labels)

    def _loader(self, name: str, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self._sets[name],
            batch_size=self.batch_size,
            shuffle=shuffle,
            # a last batch of a single image would have no batch statistics
            drop_last=shuffle and len(self._sets[name]) > self.batch_size,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of both parts of a random split in which every class has the same fraction.

    Args:
        labels: class labels, ``(n,)``.
        fraction: fraction of each class in the second part, at least one sample.
        seed: seed of the split; the global random state is neither read nor advanced.

    Returns:
        Sorted indices of the first and of the second part.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for label in torch.unique(labels):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = max(1, round(fraction * len(members)))
        second.append(members[:held_out])
        first.append(members[held_out:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def random_flip(images: Tensor) -> Tensor:
    """Flip each image left to right with probability one half."""
    flipped = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Pad images with zeros and crop each at a random position to its old size."""
    if padding == 0:
        return images
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, n, 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device)).view(n, 1, height, 1)
    columns = (left + torch.arange(width, device=images.device)).view(n, 1, 1, width)
    samples = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channels = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return padded[samples, channels, rows, columns]


def _unchanged(batch: Any) -> Any:
    return batch
