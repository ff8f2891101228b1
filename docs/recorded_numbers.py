"""Numbers of the studies that the texts and tables of the documentation use, read from the records of their runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from overview import KEYS

from lightning_normgeo.report.compared_runs import Run, load_runs
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.tables.accuracies.evaluations import Evaluation, evaluations_of
from lightning_normgeo.report.tables.correlations import correlation_tables
from lightning_normgeo.report.tables.table import Table
from lightning_normgeo.report.verdicts.study_verdicts import verdicts_of
from lightning_normgeo.runs.records.record import STUDY_NAME, Record
from lightning_normgeo.runs.records.record_reader import read_record
from lightning_normgeo.runs.verdicts.claims.claims import CLAIMS
from lightning_normgeo.runs.verdicts.verdict import NOT_TESTED, Verdict

_CURVES = (
    "orthogonality/max_abs_cos",
    "orthogonality/max_abs_cos_corrected",
    "orthogonality_control/max_abs_cos",
    "norm_growth/weight_norm",
    "norm_growth/angular_update",
    "norm_growth/equilibrium_angle",
    "affine/abs_gamma2_minus_sigma2_median",
    "affine/abs_beta_minus_mu_median",
    "affine/gamma2_over_sigma2_median",
)
"""Metrics of which the gallery gives the first, the last, the smallest or the largest value."""
_LAYERS = ("model.conv1", "model.layer1.0.conv1", "model.layer3.0.conv1", "model.layer4.1.conv2", "model.fc")
"""Layers in the table of effective weights."""
_NORMS = ("weight_norm", "effective_norm", "spectral_norm", "effective_spectral_norm", "effective_spectral_residual")
_SUMS = ("increment", "explained", "predicted", "term_weight_decay", "residual", "storage_floor")
"""Increments that the gallery adds up over all measured steps."""


def finished(study: Path) -> list[Path]:
    """Return the folders of the finished runs of a study, in the order of its grid."""
    return [study / run["name"] for run in _index(study) if run["status"] == "finished"]


def _index(study: Path) -> list[dict[str, Any]]:
    """Return the runs of a study, as its index lists them."""
    return list(json.loads((study / STUDY_NAME).read_text(encoding="utf-8"))["runs"])


def overview_numbers(study: Path) -> dict[str, Any]:
    """Return the curves, accuracies and verdicts of every run of paper_small, by the name of its folder."""
    return {run.record.folder.name: _overview_run(run) for run in load_runs(finished(study))}


def _overview_run(run: Run) -> dict[str, Any]:
    record = run.record
    tested = {key: one for key, one in verdicts_of([run]).items() if one.word != NOT_TESTED}
    rows = record.evaluations[""]["results"]
    return {
        "curves": {key: [[step, _short(value)] for step, value in record.metrics.get(key, [])] for key in KEYS},
        "accuracies": {row["attack"]: [row["correct"], row["n"]] for row in rows},
        "verdicts": {CLAIMS[key].title: _verdict(one) for key, one in tested.items()},
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    value = verdict.value if math.isfinite(verdict.value) else None  # JSON has no NaN
    texts = {name: getattr(verdict, name) for name in ("word", "phrase", "detail")}
    return {**texts, "value": value}


def gallery_numbers(study: Path) -> dict[str, Any]:
    """Return the settings of paper_resnet18, the numbers of every run, and the paired tests of its report."""
    runs = load_runs(finished(study))
    evaluations = evaluations_of(runs)
    return {
        "settings": _settings(runs),
        "planned": len(_index(study)),
        "runs": {one.run.record.folder.name: _gallery_run(one) for one in evaluations},
        "paired": list(_paired(all_tables(runs), runs[0].settings["model.norm"])),
    }


def _settings(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the settings of the study, as far as the gallery tells them."""
    run = runs[0]
    evaluated = run.record.evaluations[""]["settings"]
    steps = max(step for step, _ in run.record.points("train/loss")) + 1
    return {
        "steps": steps,
        "epochs": int(run.settings["trainer.max_epochs"]),
        "batch": int(run.settings["data.init_args.batch_size"]),
        "decay": max(float(one.settings["optimizer.init_args.weight_decay"]) for one in runs),
        "lr": float(run.settings["optimizer.init_args.lr"]),
        "eps": [attack["eps"] for attack in evaluated["attacks"].values() if "eps" in attack],
        "attack_steps": evaluated["threat"]["steps"],
        "noise": evaluated["threat"]["noise_std"],
        "semantics": evaluated["semantics"],
        "rescale": evaluated["rescale"],
        "versions": {name: run.record.environment[name] for name in ("torch", "pytorch-lightning", "cpu")},
    }


def _gallery_run(evaluation: Evaluation) -> dict[str, Any]:
    record, rows = evaluation.run.record, evaluation.rows
    curves = {key: [value for _, value in record.points(key)] for key in _CURVES}
    return {
        "minutes": round((record.ended - record.begun) / 60, 1),
        "curves": {key: _ends(values) for key, values in curves.items() if values},
        "first_step": record.points("norm_growth/weight_norm")[0][0],
        "last_step": record.points("norm_growth/weight_norm")[-1][0],
        "measured": len(record.points("norm_growth/weight_norm")),
        "sums": {name: _short(sum(v for _, v in record.points(f"norm_growth/{name}"))) for name in _SUMS},
        "residual_over_floor": _short(max(_ratios(record, "residual", "storage_floor"))),
        "accuracies": {attack: [row["correct"], row["n"]] for attack, row in rows.items()},
        "changed": {attack: evaluation.changed(attack) for attack in rows if f"{attack}_rescaled" in rows},
    }


def _ends(values: list[float]) -> dict[str, float]:
    found = {"first": values[0], "last": values[-1], "least": min(values), "most": max(values)}
    return {name: _short(value) for name, value in found.items()}


def _ratios(record: Record, above: str, below: str) -> Iterator[float]:
    divisors = dict(record.points(f"norm_growth/{below}"))
    for step, value in record.points(f"norm_growth/{above}"):
        if divisors.get(step):
            yield abs(value) / divisors[step]


def _paired(tables: Sequence[Table], only: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of the report's table of runs with weight decay against the same runs without.

    Args:
        tables: All tables of the report.
        only: Normalization of the runs if all have the same; the table has no column for it then.
    """
    (table,) = (one for one in tables if one.anchor.startswith("paired") and one.anchor.endswith("decay"))
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        low, high = map(float, re.findall(r"[-+][\d.]+(?=[,\]])", cells["difference"].text))
        yield {
            "norm": cells["among"].text if "among" in cells else only,
            "attack": cells["attack"].text,
            "difference": cells["difference"].value,
            "low": low / 100,
            "high": high / 100,
            **{name: cells[name].value for name in ("won", "lost", "p")},
            "p_holm": cells["p (Holm)"].value,
        }


def effective_numbers(study: Path) -> dict[str, Any]:
    """Return quantities, accuracies and correlations of the study of effective weights, and some layers of its runs."""
    runs = load_runs(finished(study))
    (table,) = correlation_tables(evaluations_of(runs))
    return {
        "runs": {run.record.folder.name: _effective_run(run.record) for run in runs},
        "table": {
            "columns": table.columns,
            "rows": [[cell.text for cell in row] for row in table.rows],
            "caption": table.caption,
        },
        "layers": dict(_effective_layers(runs)),
    }


def _effective_run(record: Record) -> dict[str, Any]:
    rows = record.evaluations[""]["results"]
    measured = [key for key in record.metrics if key.startswith("effective/")]
    return {
        "quantities": {key: record.metrics[key][-1][1] for key in measured},
        "accuracies": {row["attack"]: [row["correct"], row["n"]] for row in rows},
    }


def _effective_layers(runs: Sequence[Run]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the weight decay and some layers of the first run without weight decay, and of the first with the most."""
    by_decay: dict[float, Run] = {}
    for run in runs:
        by_decay.setdefault(float(run.settings["optimizer.init_args.weight_decay"]), run)
    for decay in (min(by_decay), max(by_decay)):
        found = by_decay[decay].record.results["effective_weights"]["layers"]
        rows = [row for row in found if row["layer"] in _LAYERS]
        yield f"{decay:g}", [{key: row[key] for key in ("layer", *_NORMS)} for row in rows]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def channel_numbers(run: Path) -> dict[str, Any]:
    """Return the correct samples of a run's channel evaluation, by criterion, replacement and ratio."""
    document = read_record(run).results["channels"]
    curves: dict[str, dict[str, int]] = {}
    for row in document["results"]:
        curves.setdefault(f"{row['criterion']}/{row['replace']}", {})[f"{row['ratio']:g}"] = row["correct"]
    clean = [document["clean"]["correct"], document["clean"]["n"]]
    return {"clean": clean, "channels": document["settings"]["channels"], "pairs": document["pairs"], "curves": curves}
