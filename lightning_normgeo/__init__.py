"""The geometry of normalization, measured while you train: orthogonality, norm growth, affine convergence, robustness.

Add the callbacks to any PyTorch Lightning project, or run ``normgeo fit``. Every name is imported on first use, so
``import lightning_normgeo`` itself imports neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_normgeo._version import __version__ as __version__
from lightning_normgeo.utilities.lazy_names import lazily

if TYPE_CHECKING:
    from lightning_normgeo.callbacks import AffineConvergenceMonitor as AffineConvergenceMonitor
    from lightning_normgeo.callbacks import BatchGeometryMonitor as BatchGeometryMonitor
    from lightning_normgeo.callbacks import ChannelEvaluation as ChannelEvaluation
    from lightning_normgeo.callbacks import EffectiveWeightsSummary as EffectiveWeightsSummary
    from lightning_normgeo.callbacks import NormGrowthMonitor as NormGrowthMonitor
    from lightning_normgeo.callbacks import OrthogonalityMonitor as OrthogonalityMonitor
    from lightning_normgeo.callbacks import RobustnessEvaluation as RobustnessEvaluation
    from lightning_normgeo.callbacks import SphereProjection as SphereProjection
    from lightning_normgeo.callbacks import SymmetryMonitor as SymmetryMonitor
    from lightning_normgeo.channels import channel_table as channel_table
    from lightning_normgeo.channels import masking as masking
    from lightning_normgeo.data import CIFARDataModule as CIFARDataModule
    from lightning_normgeo.data import DigitsDataModule as DigitsDataModule
    from lightning_normgeo.data import ImageFolderDataModule as ImageFolderDataModule
    from lightning_normgeo.models import ResNetClassifier as ResNetClassifier
    from lightning_normgeo.normalization import NORMS as NORMS
    from lightning_normgeo.normalization import SwapReport as SwapReport
    from lightning_normgeo.normalization import swap_norm as swap_norm
    from lightning_normgeo.probes import batch_geometry as batch_geometry
    from lightning_normgeo.probes import describe_lion as describe_lion
    from lightning_normgeo.probes import register_optimizer as register_optimizer
    from lightning_normgeo.robustness import EffectiveWeights as EffectiveWeights
    from lightning_normgeo.robustness import effective_weights as effective_weights
    from lightning_normgeo.robustness import evaluate_robustness as evaluate_robustness
    from lightning_normgeo.runs.records.record_logger import RecordLogger as RecordLogger
    from lightning_normgeo.runs.records.record_reader import read_record as read_record
    from lightning_normgeo.runs.summary import summarize as summarize
    from lightning_normgeo.runs.verdicts.run_verdicts import verdicts as verdicts
    from lightning_normgeo.runs.verdicts.thresholds import Thresholds as Thresholds
    from lightning_normgeo.symmetries import Symmetries as Symmetries
    from lightning_normgeo.symmetries import Units as Units
    from lightning_normgeo.symmetries import balance as balance
    from lightning_normgeo.symmetries import scale_invariant_units as scale_invariant_units
    from lightning_normgeo.symmetries import scale_symmetries as scale_symmetries

_HOMES = {
    "AffineConvergenceMonitor": "callbacks",
    "BatchGeometryMonitor": "callbacks",
    "CIFARDataModule": "data",
    "ChannelEvaluation": "callbacks",
    "DigitsDataModule": "data",
    "EffectiveWeights": "robustness",
    "EffectiveWeightsSummary": "callbacks",
    "ImageFolderDataModule": "data",
    "NORMS": "normalization",
    "NormGrowthMonitor": "callbacks",
    "OrthogonalityMonitor": "callbacks",
    "RecordLogger": "runs.records.record_logger",
    "ResNetClassifier": "models",
    "RobustnessEvaluation": "callbacks",
    "SphereProjection": "callbacks",
    "SwapReport": "normalization",
    "Symmetries": "symmetries",
    "SymmetryMonitor": "callbacks",
    "Thresholds": "runs.verdicts.thresholds",
    "Units": "symmetries",
    "balance": "symmetries",
    "batch_geometry": "probes",
    "channel_table": "channels",
    "describe_lion": "probes",
    "effective_weights": "robustness",
    "evaluate_robustness": "robustness",
    "masking": "channels",
    "read_record": "runs.records.record_reader",
    "register_optimizer": "probes",
    "scale_invariant_units": "symmetries",
    "scale_symmetries": "symmetries",
    "summarize": "runs.summary",
    "swap_norm": "normalization",
    "verdicts": "runs.verdicts.run_verdicts",
}
"""The module of each public name, relative to this package."""

__all__ = ["__version__", *sorted(_HOMES)]


__getattr__ = lazily(__name__, _HOMES, globals())


def __dir__() -> list[str]:
    return list(__all__)
