"""Instruments that read a running training without changing it."""

from lightning_normgeo.probes.batchnorm import BatchNormProbe as BatchNormProbe
from lightning_normgeo.probes.batchnorm import BatchStatistics as BatchStatistics
from lightning_normgeo.probes.measurement import Observed as Observed
from lightning_normgeo.probes.measurement import StepMeasurement as StepMeasurement
from lightning_normgeo.probes.measurement import WeightStep as WeightStep
from lightning_normgeo.probes.step import StepProbe as StepProbe
