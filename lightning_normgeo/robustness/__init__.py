"""Robustness of trained classifiers: threat models, attacks, and accuracies with intervals. Needs no Lightning.

Every name is imported on first use: reports need the statistics alone, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_normgeo.utilities.lazy_names import lazily
from lightning_normgeo.utilities.versions import require

require("torch", "numpy")

if TYPE_CHECKING:
    from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import gaussian_noise as gaussian_noise
    from lightning_normgeo.robustness.attacks.requests import ATTACKS as ATTACKS
    from lightning_normgeo.robustness.attacks.search.ball import Ball as Ball
    from lightning_normgeo.robustness.attacks.search.projected_gradient import bim_linf as bim_linf
    from lightning_normgeo.robustness.attacks.search.projected_gradient import projected_gradient as projected_gradient
    from lightning_normgeo.robustness.effective.layer_weights import LayerWeight as LayerWeight
    from lightning_normgeo.robustness.effective.measure import effective_weights as effective_weights
    from lightning_normgeo.robustness.effective.result import EffectiveWeights as EffectiveWeights
    from lightning_normgeo.robustness.evaluate import evaluate_robustness as evaluate_robustness
    from lightning_normgeo.robustness.evaluator import RobustnessEvaluator as RobustnessEvaluator
    from lightning_normgeo.robustness.model.folded_model import FoldedModel as FoldedModel
    from lightning_normgeo.robustness.model.folded_model import folded_model as folded_model
    from lightning_normgeo.robustness.model.rescaled_model import RescaledModel as RescaledModel
    from lightning_normgeo.robustness.model.rescaled_model import effective_norms as effective_norms
    from lightning_normgeo.robustness.results.attack_results import AttackResult as AttackResult
    from lightning_normgeo.robustness.results.attack_results import compare as compare
    from lightning_normgeo.robustness.results.attack_results import results_of as results_of
    from lightning_normgeo.robustness.results.robustness_report import RobustnessReport as RobustnessReport
    from lightning_normgeo.robustness.results.samples.sample_results import SampleResults as SampleResults
    from lightning_normgeo.robustness.results.samples.sample_results import load_decisions as load_decisions
    from lightning_normgeo.robustness.results.sanity_warnings import sanity_warnings as sanity_warnings
    from lightning_normgeo.robustness.results.statistics.rank_correlation import RankCorrelation as RankCorrelation
    from lightning_normgeo.robustness.results.statistics.rank_correlation import rank_correlation as rank_correlation
    from lightning_normgeo.robustness.results.statistics.statistics import holm as holm
    from lightning_normgeo.robustness.results.statistics.statistics import mcnemar as mcnemar
    from lightning_normgeo.robustness.results.statistics.statistics import mean_interval as mean_interval
    from lightning_normgeo.robustness.results.statistics.statistics import paired_interval as paired_interval
    from lightning_normgeo.robustness.results.statistics.statistics import wilson_interval as wilson_interval
    from lightning_normgeo.robustness.settings import RobustnessSettings as RobustnessSettings
    from lightning_normgeo.robustness.threat_models import PRESETS as PRESETS
    from lightning_normgeo.robustness.threat_models import InputSpace as InputSpace
    from lightning_normgeo.robustness.threat_models import ThreatModel as ThreatModel
    from lightning_normgeo.robustness.threat_models import threat_model as threat_model

_HOMES = {
    "ATTACKS": "attacks.requests",
    "AttackResult": "results.attack_results",
    "Ball": "attacks.search.ball",
    "EffectiveWeights": "effective.result",
    "FoldedModel": "model.folded_model",
    "InputSpace": "threat_models",
    "LayerWeight": "effective.layer_weights",
    "PRESETS": "threat_models",
    "RankCorrelation": "results.statistics.rank_correlation",
    "RescaledModel": "model.rescaled_model",
    "RobustnessEvaluator": "evaluator",
    "RobustnessReport": "results.robustness_report",
    "RobustnessSettings": "settings",
    "SampleResults": "results.samples.sample_results",
    "ThreatModel": "threat_models",
    "bim_linf": "attacks.search.projected_gradient",
    "compare": "results.attack_results",
    "effective_norms": "model.rescaled_model",
    "effective_weights": "effective.measure",
    "evaluate_robustness": "evaluate",
    "folded_model": "model.folded_model",
    "gaussian_noise": "attacks.random_numbers.sample_randoms",
    "holm": "results.statistics.statistics",
    "load_decisions": "results.samples.sample_results",
    "mcnemar": "results.statistics.statistics",
    "mean_interval": "results.statistics.statistics",
    "paired_interval": "results.statistics.statistics",
    "projected_gradient": "attacks.search.projected_gradient",
    "rank_correlation": "results.statistics.rank_correlation",
    "results_of": "results.attack_results",
    "sanity_warnings": "results.sanity_warnings",
    "threat_model": "threat_models",
    "wilson_interval": "results.statistics.statistics",
}
"""The module of each public name, relative to this package."""

__all__ = sorted(_HOMES)


__getattr__ = lazily(__name__, _HOMES, globals())


def __dir__() -> list[str]:
    return list(__all__)
