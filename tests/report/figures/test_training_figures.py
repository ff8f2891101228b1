"""Figures of losses and accuracies: the curves that any project logged, and none of the package's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.report.compared_runs import compare_runs
from lightning_normgeo.report.figures.curves import Curves
from lightning_normgeo.report.figures.training_figures import accuracy, loss
from lightning_normgeo.runs.records.record import Record

CURVE = [(0, 2.0), (5, 1.0)]


def curves(**metrics: Any) -> Curves:
    return Curves(
        compare_runs([Record(Path("run"), metrics={key.replace("__", "/"): v for key, v in metrics.items()})])
    )


def quantities(figure: Any) -> list[str]:
    return sorted({row["quantity"] for row in figure.spec["data"]["values"]})


def test_losses_and_accuracies_are_found_by_their_names() -> None:
    found = curves(train_loss=CURVE, val__loss=CURVE, valid_acc=CURVE, MulticlassAccuracy=CURVE, lr=CURVE)
    assert quantities(loss(found)) == ["train_loss", "val/loss"]
    assert quantities(accuracy(found)) == ["MulticlassAccuracy", "valid_acc"]


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"lr": CURVE, "grad_norm": CURVE, "accelerator": CURVE},
        {"test_loss": CURVE, "test_acc": CURVE},  # one value of the whole data, in several evaluations
        {"val_loss": CURVE[:1]},
        {"robustness__clean__accuracy": CURVE, "robustness__bim__accuracy_drop": CURVE},
    ],
)
def test_other_metrics_are_left_out(metrics: dict[str, Any]) -> None:
    found = curves(**metrics)
    assert loss(found) is None
    assert accuracy(found) is None


def test_a_metric_of_steps_and_epochs_is_drawn_once_and_of_many_the_first_three() -> None:
    assert quantities(loss(curves(train_loss_step=CURVE, train_loss_epoch=CURVE))) == ["train_loss_step"]
    assert quantities(loss(curves(train_loss_epoch=CURVE))) == ["train_loss_epoch"]
    assert quantities(loss(curves(**{f"loss_{name}": CURVE for name in "dcba"}))) == ["loss_a", "loss_b", "loss_c"]


@pytest.mark.parametrize(("curve", "scale"), [(CURVE, "log"), ([(0, 1.0), (5, -2.0)], None)])
def test_a_loss_that_can_be_negative_has_a_linear_axis(curve: Any, scale: str | None) -> None:
    layers = loss(curves(loss=curve)).spec["layer"]
    assert layers[0]["encoding"]["y"]["scale"].get("type") == scale
