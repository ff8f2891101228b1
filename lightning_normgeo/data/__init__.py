"""Data modules that yield pixels in [0, 1] and know their number of classes."""

from lightning_normgeo.utilities.versions import require

require("torch", "torchvision", "pytorch-lightning")

from lightning_normgeo.data.cifar import CIFARDataModule as CIFARDataModule
from lightning_normgeo.data.digits import DigitsDataModule as DigitsDataModule
from lightning_normgeo.data.folder import ImageFolderDataModule as ImageFolderDataModule
