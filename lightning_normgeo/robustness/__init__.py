"""Robustness of trained classifiers: threat models, attacks, counts with intervals. Needs torch alone."""

from lightning_normgeo.robustness.attacks import bim_linf as bim_linf
from lightning_normgeo.robustness.attacks import gaussian_noise as gaussian_noise
from lightning_normgeo.robustness.evaluation import ATTACKS as ATTACKS
from lightning_normgeo.robustness.evaluation import AttackResult as AttackResult
from lightning_normgeo.robustness.evaluation import RobustnessEvaluator as RobustnessEvaluator
from lightning_normgeo.robustness.intervals import wilson_interval as wilson_interval
from lightning_normgeo.robustness.threat import PRESETS as PRESETS
from lightning_normgeo.robustness.threat import InputSpace as InputSpace
from lightning_normgeo.robustness.threat import ThreatModel as ThreatModel
from lightning_normgeo.robustness.threat import threat_model as threat_model
