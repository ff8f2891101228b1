"""Callbacks for any LightningModule: when to measure and whom to tell. The arithmetic is in ``geometry``."""

from lightning_normgeo.versions import require

require("torch", "pytorch-lightning")

from lightning_normgeo.callbacks.affine_convergence import AffineConvergenceMonitor as AffineConvergenceMonitor
from lightning_normgeo.callbacks.norm_growth import NormGrowthMonitor as NormGrowthMonitor
from lightning_normgeo.callbacks.orthogonality import OrthogonalityMonitor as OrthogonalityMonitor
from lightning_normgeo.callbacks.robustness import RobustnessEvaluation as RobustnessEvaluation
