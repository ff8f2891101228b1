"""Probes that measure a running training without changing it: optimizer steps and batch statistics."""

from lightning_normgeo.utilities.versions import require

require("torch")

from lightning_normgeo.geometry.update_rules.decoupled_decay import shrink_of as shrink_of
from lightning_normgeo.geometry.update_rules.optimizers.lion import describe_lion as describe_lion
from lightning_normgeo.geometry.update_rules.registry import describe_update as describe_update
from lightning_normgeo.geometry.update_rules.registry import register_optimizer as register_optimizer
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics as BatchStatistics
from lightning_normgeo.probes.batch_norm.probe import BatchNormProbe as BatchNormProbe
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements as CumulativeIncrements
from lightning_normgeo.probes.layer_inputs.probe import LayerGeometry as LayerGeometry
from lightning_normgeo.probes.layer_inputs.table import BatchGeometry as BatchGeometry
from lightning_normgeo.probes.layer_inputs.table import batch_geometry as batch_geometry
from lightning_normgeo.probes.step_probe import StepProbe as StepProbe
from lightning_normgeo.probes.weight_step import MeasuredWeights as MeasuredWeights
from lightning_normgeo.probes.weight_step import Observed as Observed
from lightning_normgeo.probes.weight_step import WeightStep as WeightStep
