"""Runs with robustness evaluations, written in milliseconds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_normgeo import RecordLogger
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.robustness.results.attack_results import results_of
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows

SHARES = {"clean": 0.8, "gaussian": 0.7, "bim": 0.3}

N = 50


def write_run(
    name: str,
    *,
    norm: str = "bn",
    decay: float = 0.0,
    seed: int | None = 0,
    shares: dict[str, float] | None = None,
    n: int = N,
    first: int = 0,
    classes: int = 10,
    settings: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    conditions: dict[str, Any] | None = None,
    metrics: dict[str, list[tuple[int, float]]] | None = None,
    loader: str = "",
) -> Path:
    """Write a run with random per-sample results; the indices of its samples start at ``first``."""
    logger = RecordLogger("out", version=name)
    config = {
        "test_after_fit": True,
        "trainer": {},
        "model": {"norm": norm},
        "optimizer": {"init_args": {"weight_decay": decay}},
        "seed_everything": seed,
    }
    logger.log_hyperparams({"config": config | (settings or {})})
    for key, points in (metrics or {}).items():
        for step, value in points:
            logger.log_metrics({key: value}, step=step)
    generator = np.random.default_rng(list(name.encode()))
    shares = SHARES if shares is None else shares
    decisions = SampleResults(list(shares))
    index = torch.arange(first, first + n)
    label = index % classes
    for attack, share in shares.items():
        prediction = label + torch.from_numpy(generator.random(n) >= share)
        decisions.add(attack, SampleRows(index, label, prediction, *torch.rand(4, n), index))
    strengths = {"gaussian": {"std": 0.05}, "bim": {"eps": 8 / 255}} | (evaluation or {})
    if shares:
        rows = [
            {"attack": attack + loader, **strengths.get(attack, {}), **asdict(result)}
            for attack, result in results_of(decisions).items()
        ]
        decisions.save(logger.folder / f"robustness{loader.replace('/', '_')}.npz")
        logger.log_results("robustness", {"settings": {"attacks": strengths} | (conditions or {}), "results": rows})
    logger.finalize("success")
    return logger.folder


def correct(run: Run, attack: str) -> Any:
    """Return whether each sample of a run is classified correctly, as numpy reads the file."""
    with np.load(run.record.folder / "robustness.npz") as file:
        return (file[f"{attack}/prediction"] == file["label"]).astype(int)


MEASURED: dict[str, list[tuple[int, float]]] = {
    "orthogonality/max_abs_cos": [(4, 3e-5), (9, 1.5e-5)],
    "orthogonality/max_abs_cos_corrected": [(4, 3e-6), (9, 2.5e-7)],
    "orthogonality_control/max_abs_cos": [(4, 0.5), (9, 0.25)],
    "norm_growth/weight_norm": [(4, 80.0), (9, 100.0)],
    "norm_growth/residual": [(4, 5.0), (9, -3e-7)],
    "norm_growth/storage_floor": [(4, 1.0), (9, 6e-7)],
    "norm_growth/cumulative_increment": [(9, 1234.5)],
    "norm_growth/cumulative_predicted": [(9, 1200.5)],
    "norm_growth/cumulative_residual": [(9, -2.0)],
    "norm_growth/cumulative_storage_floor": [(9, 8.0)],
    "norm_growth/angular_update": [(4, 1.0), (9, 0.003)],
    "norm_growth/equilibrium_angle": [(4, 1.0), (9, 0.002)],
    "affine/abs_gamma2_minus_sigma2_median": [(9, 0.125)],
    "affine/abs_beta_minus_mu_median": [(9, 0.375)],
    "affine/gamma2_over_sigma2_median": [(9, 1.75)],
}
