"""Models with a normalization of choice that take pixels in [0, 1]."""

from lightning_normgeo.utilities.versions import require

require("torch", "torchvision", "pytorch-lightning")

from lightning_normgeo.models.resnet import ResNetClassifier as ResNetClassifier
