"""Models that normalize their input in place are measured as those that do not, and no batch is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import (
    batch_geometry,
    channel_table,
    effective_weights,
    evaluate_robustness,
    masking,
    scale_invariant_units,
    scale_symmetries,
    swap_norm,
)
from lightning_normgeo.robustness import FoldedModel, InputSpace, RescaledModel, RobustnessEvaluator, RobustnessSettings
from lightning_normgeo.robustness.model.image_copies import on_copies
from support.small_models import worn

ATTACKS = ["gaussian", "bim", "pgd", "apgd", {"name": "square", "queries": 50}, "bim_l2", "torchattacks.FGSM"]


class Classifier(nn.Module):
    """A classifier that normalizes its images, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.net = worn(
            nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25)


def models() -> tuple[Classifier, Classifier]:
    plain, in_place = Classifier(in_place=False), Classifier(in_place=True)
    in_place.load_state_dict(plain.state_dict())
    return plain.eval(), in_place.eval()


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, 8, 8), generator=generator) / 255, torch.arange(n) % 4


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"attacks": ATTACKS},
        {"fold": False, "rescale": 10.0},
        {"attacks": {"name": "bim", "bisections": 3}},
        {"attacks": ["bim", "transfer"], "surrogate": True},
    ],
    ids=["attacks", "control", "radii", "transfer"],
)
def test_accuracies_are_bit_for_bit_those_out_of_place(settings: dict[str, Any]) -> None:
    reports = []
    for model in models():
        other = {"surrogate": copy.deepcopy(model)} if "surrogate" in settings else {}
        found = {"attacks": ["gaussian", "bim"], "steps": 3, **settings, **other}
        reports.append(evaluate_robustness(model, loader(), progress=False, **found))
    assert reports[0].results == reports[1].results
    for name in reports[0].results:
        columns = zip(*(report.decisions.of(name) for report in reports), strict=True)
        assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in columns)


def test_masked_accuracies_are_those_out_of_place() -> None:
    reports = [masking(model, loader(), progress=False) for model in models()]
    assert reports[0].results == reports[1].results
    assert reports[0].left_out == reports[1].left_out == {}


MEASURED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "units": lambda model, x: str(scale_invariant_units(model.train(), x)),
    "symmetries": lambda model, x: str(scale_symmetries(model.train(), x)),
    "batch geometry": lambda model, x: str(batch_geometry(model.train(), x)),
    "effective weights": lambda model, x: effective_weights(model, x).as_dict(),
    "channels": lambda model, x: channel_table(model, x).joined("share").tolist(),
    "swap": lambda model, x: str(swap_norm(model, "none", example_batch=x)),
    "folded": lambda model, x: FoldedModel(model, model, x).folded,
    "rescaled": lambda model, x: RescaledModel(model, model, x).difference,
}


@pytest.mark.parametrize("measured", MEASURED.values(), ids=MEASURED)
def test_measurements_leave_the_batch_alone(measured: Callable[[nn.Module, Tensor], Any]) -> None:
    results = []
    for model in models():
        images = data()[0]
        results.append(measured(model, images))
        assert torch.equal(images, data()[0])
    assert results[0] == results[1]


def test_an_evaluator_by_itself_leaves_the_images_alone() -> None:
    found = []
    for model in models():
        images, labels = data()
        evaluator = RobustnessEvaluator(model, InputSpace(None, None, normalized_data=False), RobustnessSettings())
        evaluator.put(images, labels, range(len(images)))
        decisions = evaluator.finish()
        found.append([tensor.tolist() for name in decisions.attacks for tensor in decisions.of(name)])
        assert torch.equal(images, data()[0])
    assert str(found[0]) == str(found[1])


def test_images_are_copied_once() -> None:
    seen: list[Tensor] = []
    images = data()[0]
    call = on_copies(seen.append)
    assert on_copies(call) is call
    call(images)
    assert seen[0] is not images
    assert torch.equal(seen[0], images)
