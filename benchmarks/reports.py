"""Benchmark of reports: time, memory and size for synthetic studies of many runs, and what a long run writes.

Run it as a plain script: ``python benchmarks/reports.py [--studies 8x1000,48x300,200x1000] [--folder FOLDER]``. A study
is a number of runs times a number of measured steps. Its records have the names and numbers of two measured steps of a
ResNet-101, times a factor that is drawn for each run and step. Each report is written by a process of its own, whose
peak memory is that of the whole process. With 200 runs of 1,000 steps the records take 7 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from results import Result
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    ResNetClassifier,
    read_record,
)
from lightning_normgeo.callbacks._monitors.cadence import is_due
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.records.record_lines import as_line
from lightning_normgeo.runs.records.value_columns import LayerColumns, MetricColumns

_NORMS = ("bn", "gn", "ln", "in", "wn")
_PAPER_STEPS, _EVERY = 156_400, 20
"""Steps of a run of ``paper_cifar10`` (200 epochs of 782 batches), and the Trainer's ``log_every_n_steps``."""


_PROCESS = """import sys
from lightning_normgeo.report.write import write_report
write_report(sys.argv[1], sys.argv[2])
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(peak.split()[1])"""
"""What the process that writes a report runs; it prints its peak memory in KiB. Of Linux, where a process inherits the
peak of its parent otherwise."""


def template(folder: Path) -> Record:
    """Return the record of a short training."""
    logger = RecordLogger(str(folder))
    trainer = pl.Trainer(
        max_steps=2,
        logger=logger,
        callbacks=[OrthogonalityMonitor(1), NormGrowthMonitor(1), AffineConvergenceMonitor(1)],
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.rand(8, 3, 32, 32), torch.randint(10, (8,)))
    trainer.fit(ResNetClassifier(arch="resnet101", stem="imagenet"), DataLoader(data, 4))
    return read_record(logger.log_dir)


def last_values(record: Record) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the metrics, and the values by layer, of the last measured step."""
    step = max(points[-1][0] for points in record.layers.values())
    metrics = {key: points[-1][1] for key, points in record.metrics.items() if points[-1][0] == step}
    return metrics, {quantity: points[-1][1] for quantity, points in record.layers.items()}


def write_study(folder: Path, record: Record, runs: int, steps: int) -> None:
    """Write the records and the index of a study."""
    names = []
    for number in range(runs):
        norm, decay, seed = _NORMS[number % 5], (0.0, 5e-4)[number // 5 % 2], number // 10
        names.append(f"norm={norm},wd={decay},seed={seed}")
        config = {"model": {"norm": norm}, "optimizer": {"init_args": {"weight_decay": decay}}, "seed_everything": seed}
        run, draw = folder / names[-1], random.Random(number)  # noqa: S311 - no secret
        run.mkdir(parents=True)
        columns = MetricColumns(), LayerColumns()
        variants = [_scaled(record, columns, draw.uniform(1.0, 1.3)) for _ in range(20)]
        with (run / "record.jsonl").open("w", encoding="utf-8") as file:
            file.write(as_line("environment", {"values": record.environment}) + "\n")
            file.write(as_line("settings", {"values": {"config": config}}) + "\n")
            file.writelines(text for names_of, _ in variants for text in names_of)
            for step in range(steps):
                for text in variants[step % 20][1]:
                    file.write(text.replace('"step": -1', f'"step": {50 * step}', 1))
            file.write(as_line("observation", {"values": record.observed}) + "\n")
            file.write(as_line("end", {"status": "success"}) + "\n")
    entries = [
        {"name": name, "options": {}, "status": "finished", "seconds": 1.0, "error": "", "digest": ""} for name in names
    ]
    index = {"version": "0", "name": folder.name, "grid": {}, "runs": entries}
    (folder / "study.json").write_text(json.dumps(index), encoding="utf-8")


def _scaled(record: Record, columns: tuple[MetricColumns, LayerColumns], factor: float) -> tuple[list[str], list[str]]:
    """Return the lines of the names that are new, and of the values of the last measured step times a factor."""
    metrics, layers = last_values(record)
    of_metrics = columns[0].lines({key: value * factor for key, value in metrics.items()}, -1)
    of_layers = columns[1].lines(
        {quantity: {layer: value * factor for layer, value in values.items()} for quantity, values in layers.items()},
        -1,
    )
    lines = [(kind.endswith("values"), text + "\n") for kind, text in (*of_metrics, *of_layers)]
    return [text for is_values, text in lines if not is_values], [text for is_values, text in lines if is_values]


def report_row(folder: Path, runs: int, steps: int) -> tuple[str, ...]:
    """Write the report of a study and return a row of the table."""
    size = sum(file.stat().st_size for file in folder.rglob("record.jsonl"))
    report, began = folder / "report.html", time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", _PROCESS, str(folder), str(report)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - this package
    took, peak = time.perf_counter() - began, int(done.stdout.split()[-1]) / 1024
    html = report.stat().st_size
    return f"{runs} × {steps}", f"{size / 1e6:.0f}", f"{took:.1f}", f"{peak:.0f}", f"{html / 1e6:.1f}"


def paper_row(folder: Path, record: Record) -> Result:
    """Return what a run of the paper's CIFAR-10 study writes, simulated step by step."""
    metrics, layers = last_values(record)
    logger, points = RecordLogger(str(folder)), 0
    for step in range(1, _PAPER_STEPS + 1):
        if is_due(-_EVERY, step):
            points += 1
            logger.log_metrics(metrics, step)
            logger.log_layers(layers, step)
        if step % 782 == 0:
            logger.log_metrics({"train/loss": 1.0, "train/accuracy": 0.5, "val/loss": 1.0, "val/accuracy": 0.5}, step)
    logger.finalize("success")
    size = (Path(logger.log_dir) / "record.jsonl").stat().st_size
    title = f"A run of paper_cifar10: {_PAPER_STEPS} steps"
    return Result(
        title, ("measured steps", "MB", "kB each"), [(str(points), f"{size / 1e6:.1f}", f"{size / points / 1e3:.1f}")]
    )


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", default="8x1000,48x300", help="runs x measured steps, from small to large")
    parser.add_argument("--folder", type=Path, help="where to write the studies; default: a temporary folder")
    parser.add_argument("--markdown", action="store_true", help="print tables for a document")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        record, rows = template(Path(place) / "template"), []
        results = [paper_row(Path(place) / "paper", record)]
        for study in options.studies.split(","):
            runs, steps = map(int, study.split("x"))
            folder = Path(place) / study
            write_study(folder, record, runs, steps)
            rows.append(report_row(folder, runs, steps))
        columns = ("runs × measured steps", "records, MB", "s", "memory, MB", "page, MB")
        results.append(Result("Reports of synthetic studies", columns, rows))
    for result in results:
        result.put(Console(width=120), options.markdown)


if __name__ == "__main__":
    main()
