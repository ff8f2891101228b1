"""Models that take pixels in [0, 1] and have their normalization as a choice."""

from lightning_normgeo.utilities.versions import require

require("torch", "torchvision", "pytorch-lightning")

from lightning_normgeo.models.resnet import ResNetClassifier as ResNetClassifier
