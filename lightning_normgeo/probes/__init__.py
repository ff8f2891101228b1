"""Instruments that read a running training without changing it."""

from lightning_normgeo.versions import require

require("torch")

from lightning_normgeo.probes.account import NormAccount as NormAccount
from lightning_normgeo.probes.batchnorm import BatchNormProbe as BatchNormProbe
from lightning_normgeo.probes.forward_pass import BatchStatistics as BatchStatistics
from lightning_normgeo.probes.measurement import Observed as Observed
from lightning_normgeo.probes.measurement import StepMeasurement as StepMeasurement
from lightning_normgeo.probes.measurement import WeightStep as WeightStep
from lightning_normgeo.probes.optimizers.decay import shrink_of as shrink_of
from lightning_normgeo.probes.rules import describe_lion as describe_lion
from lightning_normgeo.probes.rules import describe_update as describe_update
from lightning_normgeo.probes.rules import register_optimizer as register_optimizer
from lightning_normgeo.probes.step import StepProbe as StepProbe
