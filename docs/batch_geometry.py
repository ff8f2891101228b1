"""Trainings behind the page of BatchGeometryMonitor: one network with batches of 4, 32, and 128 images.

``python docs/batch_geometry.py runs/batch_geometry`` trains a ResNet-18 on the digits of scikit-learn for 40 steps
with each batch size, on one CPU core in a few minutes; those that are in the folder already are not trained again. It
writes docs/records/batch_geometry.json, and the table and the picture of the page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import altair as alt
import pytorch_lightning as pl

from lightning_normgeo import BatchGeometryMonitor, DigitsDataModule, RecordLogger, ResNetClassifier, read_record

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "callbacks" / "batch_geometry.md"
PICTURE = DOCS / "pictures" / "batch-geometry.png"
RECORD = "batch_geometry"
BATCHES, STEPS, EVERY = (4, 32, 128), 40, 10
_LAYERS = ("layer1.0.conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2")
_TABLE = re.compile(r"(<!-- table: batch_geometry -->\n).*?(<!-- /table -->)", re.DOTALL)
_KEYS = ("rank", "rank_over_inputs", "kernel_share_mean", "effective_rank", "orthogonality_gap")
_DRAWN = {"rank_over_inputs": "rank of Σ_X over n", "kernel_share_mean": "share of W in the kernel"}
_TOTALS = ("collapsed_channels", "radius_reached_min", "epsilon_over_variance_max")


def train(batch: int, folder: Path) -> None:
    """Train the network with one batch size."""
    pl.seed_everything(0, verbose=False)
    settings = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}
    network = ResNetClassifier(arch="resnet18", norm="bn", stem="imagenet", optimizer=settings)
    record = RecordLogger(str(folder.parent), name=folder.name, version=f"batch={batch}")
    trainer = pl.Trainer(
        logger=[record],
        callbacks=[BatchGeometryMonitor(EVERY, layers="*conv*", exact_up_to=1152)],
        max_steps=STEPS,
        max_epochs=-1,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(network, DigitsDataModule(batch_size=batch))


def numbers(run: Path) -> dict[str, Any]:
    """Return what the page says about a run: each layer at the first and the last measured step, and totals."""
    record = read_record(run)
    layers = {
        key: {layer: [_short(row[1].get(layer)) for row in (rows[0], rows[-1])] for layer in rows[0][1]}
        for key in _KEYS
        if (rows := record.layers[f"batch_geometry/{key}"])
    }
    totals = {
        key: [_short(value) for value in (points[0][1], points[-1][1])]
        for key in _TOTALS
        if (points := record.points(f"batch_geometry/{key}"))
    }
    return {"layers": layers, "totals": totals}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def table(runs: dict[str, Any]) -> str:
    """Return the table of the page: the rank at the last step, and the kernel share at the first and the last."""
    rows = [
        "| images per batch | layer | rank of Σ_X | of n | W in the kernel, first → last |",
        "|---:|---|---:|---:|---:|",
    ]
    for batch, run in runs.items():
        for layer in _LAYERS:
            rank, of_n, share = (run["layers"][key].get(f"model.{layer}") for key in _KEYS[:3])
            if rank is None or None in (*rank, *share):
                rows.append(f"| {batch} | `{layer}` | not known |  |  |")
            else:
                shares = " → ".join(f"{100 * value:.1f} %" for value in share)
                rows.append(f"| {batch} | `{layer}` | {rank[1]:g} | {100 * of_n[1]:.2f} % | {shares} |")
    return "\n".join(rows)


def with_table(text: str, runs: dict[str, Any]) -> str:
    """Return the page with its table up to date."""
    return _TABLE.sub(lambda match: f"{match[1]}{table(runs)}\n{match[2]}", text)


def draw(runs: dict[str, Any]) -> Path:
    """Draw rank over width and the share of weights in the kernel, layer by layer at the last step."""
    rows = [
        {"batch": int(name), "layer": layer, "panel": title, "value": values[-1]}
        for name, run in runs.items()
        for key, title in (
            ("rank_over_inputs", "rank of Σ_X over n"),
            ("kernel_share_mean", "share of W in the kernel"),
        )
        for layer, values in run["layers"][key].items()
        if values[-1] is not None
    ]
    order = list(dict.fromkeys(row["layer"] for row in rows))
    panels = [
        alt.Chart(alt.Data(values=[row for row in rows if row["panel"] == title]), title=title, width=430, height=230)
        .mark_line(point=alt.OverlayMarkDef(size=36))
        .encode(
            x=alt.X("layer:N", sort=order, title=None, axis=alt.Axis(labelAngle=-60)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("batch:N", title="images per batch", sort=list(BATCHES)),
        )
        for title in dict.fromkeys(row["panel"] for row in rows)
    ]
    from pictures import on_paper

    with TemporaryDirectory() as folder:
        alt.hconcat(*panels).configure_view(stroke=None).save(f"{folder}/picture.png", scale_factor=1.6)
        return on_paper(Path(folder, "picture.png"), PICTURE)


def main(arguments: Sequence[str]) -> None:
    """Train the networks that are missing, and write record, table and picture."""
    from pictures import write_record

    folder = Path(arguments[0])
    for batch in BATCHES:
        if not (folder / f"batch={batch}").exists():
            train(batch, folder)
    runs = {str(batch): numbers(folder / f"batch={batch}") for batch in BATCHES}
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), runs), encoding="utf-8")
    for path in (write_record(RECORD, runs), draw(json.loads(json.dumps(runs)))):
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main(sys.argv[1:])
