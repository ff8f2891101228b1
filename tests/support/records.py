"""Runs as the callbacks record them, written in milliseconds, for tests that read many runs.

Weights change by their increments, so that measured, explained and predicted values are consistent.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_normgeo import RecordLogger, __version__
from lightning_normgeo.robustness.results.attack_results import results_of
from lightning_normgeo.robustness.results.robustness_report import RobustnessReport
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows
from lightning_normgeo.robustness.settings import RobustnessSettings
from lightning_normgeo.robustness.threat_models import InputSpace
from lightning_normgeo.runs.records.record import STUDY_NAME

CONVOLUTIONS = [
    f"model.{place}" for place in ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
]
BATCH_NORMS = [layer.replace("conv", "bn") for layer in CONVOLUTIONS]
CONTROL = ["model.fc"]
KEYED = ("model.layer1.0.",)
"""Prefixes of the layers that get keys of their own."""
STEPS = range(4, 60, 5)
LR, SAMPLES, CLASSES = 0.1, 120, 10
ATTACKS = RobustnessSettings(eps=[0.01, 0.02, 0.04])

Readings = dict[str, dict[str, float]]
"""Values by layer, for each quantity."""


def write_run(
    folder: str | Path,
    *,
    norm: str = "bn",
    weight_decay: float = 0.0,
    seed: int = 0,
    steps: Sequence[int] = STEPS,
    settings: Mapping[str, Any] | None = None,
    geometry: bool = True,
    robustness: bool = True,
    ended: bool = True,
) -> Path:
    """Write the record of a run and return its folder.

    Args:
        folder: of the run, at least two levels below the root.
        norm: the normalization; only ``bn`` has γ and β to compare with σ and μ.
        weight_decay: of SGD.
        seed: of all random numbers.
        steps: the measured steps.
        settings: further settings.
        geometry: whether the monitors were active.
        robustness: whether there was an evaluation.
        ended: whether the run finished.
    """
    folder = Path(folder)
    generator = np.random.default_rng([seed, *norm.encode(), int(1e6 * weight_decay)])
    logger = RecordLogger(str(folder.parent.parent), folder.parent.name, folder.name)
    logger.log_hyperparams({"config": {**_settings(norm, weight_decay, seed), **(settings or {})}})
    for step, readings in _trained(generator, norm, weight_decay, steps) if geometry else ():
        _log(logger, readings, step)
        logger.log_metrics({"train/loss": 2.3 * 0.98**step}, step=step)
    if robustness:
        _evaluate(logger, generator, steps[-1] + 1)
    if ended:
        logger.log_results("run", {"status": "finished", "seconds": 12.5})
    logger.finalize("success" if ended else "failed")
    if not ended:  # as after a kill
        logger.path.write_text("".join(logger.path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]))
    return logger.folder


def write_study(
    folder: str | Path,
    norms: Sequence[str] = ("bn", "gn"),
    weight_decays: Sequence[float] = (0.0, 5e-4),
    seeds: Sequence[int] = (0,),
    **options: Any,
) -> Path:
    """Write the records of a grid of runs and their index; return the study's folder.

    Args:
        folder: of the study.
        norms: normalizations.
        weight_decays: weight decays for each normalization.
        seeds: seeds for each combination.
        options: of every run; see :func:`write_run`.
    """
    folder = Path(folder)
    grid = {"model.norm": norms, "optimizer.init_args.weight_decay": weight_decays, "seed_everything": seeds}
    runs = []
    for norm, weight_decay, seed in itertools.product(*grid.values()):
        name = f"norm={norm},weight_decay={weight_decay},seed_everything={seed}"
        write_run(folder / name, norm=norm, weight_decay=weight_decay, seed=seed, **options)
        own = dict(zip(grid, (norm, weight_decay, seed), strict=True))
        runs.append({"name": name, "options": own, "status": "finished", "seconds": 12.5, "error": ""})
    study = {"version": __version__, "name": folder.name, "grid": grid, "configs": ["digits.yaml"], "settings": {}}
    (folder / STUDY_NAME).write_text(json.dumps({**study, "runs": runs}), encoding="utf-8")
    return folder


def _settings(norm: str, weight_decay: float, seed: int) -> dict[str, Any]:
    sgd = {"lr": LR, "momentum": 0.0, "weight_decay": weight_decay}
    return {
        "seed_everything": seed,
        "test_after_fit": True,
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        "model": {"arch": "resnet18", "norm": norm, "input_mean": [0.5, 0.5, 0.5]},
        "data": {"class_path": "lightning_normgeo.DigitsDataModule", "init_args": {"batch_size": 16}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": sgd},
    }


def _trained(
    generator: np.random.Generator, norm: str, weight_decay: float, steps: Sequence[int]
) -> Iterator[tuple[int, Readings]]:
    """Return the monitors' readings of each measured step."""
    squared = generator.uniform(80, 120, len(CONVOLUTIONS))
    sums: dict[str, Any] = {}
    for step in steps:
        growth = _growth(generator, squared, weight_decay)
        for name in ("increment", "explained", "predicted", "residual", "storage_floor"):
            sums[f"cumulative_{name}"] = sums.get(f"cumulative_{name}", 0.0) + growth[name]
        squared = squared + growth["increment"]
        found = {f"norm_growth/{name}": values for name, values in {**growth, **sums}.items()}
        found["orthogonality/max_abs_cos"] = generator.uniform(1e-6, 1e-5, len(squared))
        found["orthogonality/max_abs_cos_corrected"] = found["orthogonality/max_abs_cos"] / generator.uniform(5, 10)
        readings = {key: dict(zip(CONVOLUTIONS, values.tolist(), strict=True)) for key, values in found.items()}
        readings["orthogonality_control/max_abs_cos"] = dict.fromkeys(CONTROL, generator.uniform(0.2, 0.5))
        yield step, {**readings, **(_affine(generator) if norm == "bn" else {})}


def _growth(generator: np.random.Generator, squared: Any, weight_decay: float) -> dict[str, Any]:
    """Return one step of SGD without momentum from weights with given squared norms."""
    units = len(squared)
    predicted = generator.uniform(0.02, 0.06, units)
    terms = {
        "quadratic": predicted,
        "momentum": np.zeros(units),
        "weight_decay": -2 * LR * weight_decay * squared,
        "gradient": generator.normal(0, 1e-7, units),
    }
    explained, floor = sum(terms.values()), generator.uniform(2e-6, 3e-6, units)
    residual = generator.uniform(-1, 1, units) * floor
    return {
        "weight_norm": np.sqrt(squared + explained + residual),
        "increment": explained + residual,
        "predicted": predicted,
        "explained": explained,
        **{f"term_{name}": values for name, values in terms.items()},
        "residual": residual,
        "storage_floor": floor,
        "angular_update": np.sqrt(predicted / squared),
        "effective_lr": LR / squared,
        **({"equilibrium_angle": np.full(units, (2 * LR * weight_decay) ** 0.5)} if weight_decay else {}),
    }


def _affine(generator: np.random.Generator) -> Readings:
    return {
        f"affine/{quantity}_{statistic}": dict(zip(BATCH_NORMS, generator.uniform(0.2, 2, 5).tolist(), strict=True))
        for quantity in ("abs_gamma2_minus_sigma2", "abs_beta_minus_mu", "gamma2_over_sigma2")
        for statistic in ("mean", "median", "q90", "channel")
    }


def _log(logger: RecordLogger, readings: Readings, step: int) -> None:
    """Log as monitors do: aggregates, a few layers by key, and the tables of all layers."""
    by_layer = {key: values for key, values in readings.items() if not key.endswith(("_median", "_q90"))}
    metrics = {key: _over_all(key, list(v.values())) for key, v in readings.items() if not key.endswith("_channel")}
    for key, values in by_layer.items():
        metrics |= {f"{key}/{layer}": value for layer, value in values.items() if layer.startswith(KEYED)}
    logger.log_metrics(metrics, step=step)
    logger.log_layers(by_layer, step=step)


def _over_all(key: str, values: list[float]) -> float:
    found = np.array(values)
    if "max_abs_cos" in key:
        return float(found.max())
    if key.endswith("weight_norm"):
        return float(np.sqrt((found**2).sum()))
    if key.endswith(("angular_update", "equilibrium_angle")):
        return float(np.sqrt((found**2).mean()))
    return float(found.mean() if key.startswith("affine") or key.endswith("effective_lr") else found.sum())


def _evaluate(logger: RecordLogger, generator: np.random.Generator, step: int) -> None:
    """Write the results of an evaluation: counts, per-sample results, statistics and two example images."""
    decisions = _decisions(generator)
    settings = ATTACKS.describe(InputSpace(None, None, normalized_data=False))
    report = RobustnessReport(results_of(decisions), settings, [], decisions)
    report.save(logger.folder)
    logger.log_results("robustness", report.as_dict())
    pictures = list(generator.integers(0, 256, (2, 24, 120, 3), dtype=np.uint8))
    logger.log_image("robustness/examples", pictures, caption=[f"label {k}: clean → {k}, bim → 7" for k in range(2)])
    for name, result in report.results.items():
        numbers = {"accuracy": result.accuracy, "ci_low": result.ci_low, "ci_high": result.ci_high, "n": result.n}
        logger.log_metrics({f"robustness/{name}/{key}": value for key, value in numbers.items()}, step=step)


def _decisions(generator: np.random.Generator) -> SampleResults:
    """Return per-sample results that are wrong more often for stronger attacks; all runs have the same data."""
    index = torch.arange(SAMPLES)
    label = index * 7 % CLASSES
    margin = torch.from_numpy(generator.normal(0.8, 0.7, SAMPLES))
    decisions = SampleResults(ATTACKS.rows)
    strengths = {"clean": 0.0, **{a.name: 20 * a.settings().get("eps", 0.01) for a in ATTACKS.all_attacks}}
    for name, strength in strengths.items():
        loss = torch.nn.functional.softplus(strength - margin).float()
        size = torch.full_like(loss, strength / 20)
        prediction = torch.where(margin > strength, label, (label + 1) % CLASSES)
        decisions.add(name, SampleRows(index, label, prediction, loss, size, 10 * size, torch.ones_like(loss), index))
    return decisions
