"""Robustness of trained classifiers: threat models, attacks, counts with intervals. Needs torch alone."""

from lightning_normgeo.versions import require

require("torch", "numpy")

from lightning_normgeo.robustness.attacks import Ball as Ball
from lightning_normgeo.robustness.attacks import bim_linf as bim_linf
from lightning_normgeo.robustness.attacks import gaussian_noise as gaussian_noise
from lightning_normgeo.robustness.attacks import projected_gradient as projected_gradient
from lightning_normgeo.robustness.catalogue import ATTACKS as ATTACKS
from lightning_normgeo.robustness.decisions import Decisions as Decisions
from lightning_normgeo.robustness.decisions import load_decisions as load_decisions
from lightning_normgeo.robustness.evaluation import RobustnessEvaluator as RobustnessEvaluator
from lightning_normgeo.robustness.folding import FoldedModel as FoldedModel
from lightning_normgeo.robustness.folding import folded_model as folded_model
from lightning_normgeo.robustness.intervals import holm as holm
from lightning_normgeo.robustness.intervals import mcnemar as mcnemar
from lightning_normgeo.robustness.intervals import mean_interval as mean_interval
from lightning_normgeo.robustness.intervals import paired_interval as paired_interval
from lightning_normgeo.robustness.intervals import wilson_interval as wilson_interval
from lightning_normgeo.robustness.report import RobustnessReport as RobustnessReport
from lightning_normgeo.robustness.rescale import RescaledModel as RescaledModel
from lightning_normgeo.robustness.rescale import effective_norms as effective_norms
from lightning_normgeo.robustness.results import AttackResult as AttackResult
from lightning_normgeo.robustness.results import compare as compare
from lightning_normgeo.robustness.results import results_of as results_of
from lightning_normgeo.robustness.results import suspicions as suspicions
from lightning_normgeo.robustness.settings import RobustnessSettings as RobustnessSettings
from lightning_normgeo.robustness.standalone import evaluate_robustness as evaluate_robustness
from lightning_normgeo.robustness.threat import PRESETS as PRESETS
from lightning_normgeo.robustness.threat import InputSpace as InputSpace
from lightning_normgeo.robustness.threat import ThreatModel as ThreatModel
from lightning_normgeo.robustness.threat import threat_model as threat_model
