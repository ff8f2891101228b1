"""Callbacks for any LightningModule: they schedule and log measurements, whose mathematics is in ``geometry``."""

from lightning_normgeo.utilities.versions import require

require("torch", "pytorch-lightning")

from lightning_normgeo.callbacks.affine_convergence_monitor import AffineConvergenceMonitor as AffineConvergenceMonitor
from lightning_normgeo.callbacks.batch_geometry_monitor import BatchGeometryMonitor as BatchGeometryMonitor
from lightning_normgeo.callbacks.channel_evaluation import ChannelEvaluation as ChannelEvaluation
from lightning_normgeo.callbacks.effective_weights_summary import EffectiveWeightsSummary as EffectiveWeightsSummary
from lightning_normgeo.callbacks.norm_growth_monitor import NormGrowthMonitor as NormGrowthMonitor
from lightning_normgeo.callbacks.orthogonality_monitor import OrthogonalityMonitor as OrthogonalityMonitor
from lightning_normgeo.callbacks.robustness_evaluation import RobustnessEvaluation as RobustnessEvaluation
from lightning_normgeo.callbacks.sphere_projection import SphereProjection as SphereProjection
from lightning_normgeo.callbacks.symmetry_monitor import SymmetryMonitor as SymmetryMonitor
