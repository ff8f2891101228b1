"""An evaluation restores all state: random numbers, attributes, merged weights, logs, the Trainer's stage."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, random_split

from lightning_normgeo import RobustnessEvaluation, evaluate_robustness
from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from support.projects import ConvNet, Project, images, trainer


class Drawing(Project):
    """Model that draws from every random number generator."""

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
        return super().forward(x) + noise * torch.arange(4)


class Collecting(Project):
    """Model that stores activations in attributes, and logs in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.by_size: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        self.seen.append(len(x))
        self.by_size[len(self.seen)] = len(x)
        self.mean = found.mean().detach()
        self.log("mean", self.mean)
        return found

    def on_test_batch_end(self, *args: Any) -> None:
        self.log("own", self.mean, batch_size=1)

    def on_test_epoch_end(self) -> None:
        self.log("rows", float(sum(self.seen)))


class Merging(nn.Linear):
    """Low-rank adapter that merges its weights for evaluation."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.low, self.rank, self.merged = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 8)), False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (1 if not mode else -1) * self.low.data @ self.rank.data
            self.merged = not mode
        return self


def metrics(project: Any, *callbacks: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    module = project()
    found = trainer(*callbacks, default_root_dir=folder).test(module, images(24), verbose=False)
    state = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    return [{k: v for k, v in one.items() if not k.startswith("robustness")} for one in found], state


@pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning")  # the model is random
@pytest.mark.parametrize("project", [Drawing, Collecting], ids=lambda kind: kind.__name__)
def test_metrics_and_random_numbers_are_the_projects_own(project: Any, tmp_path: Path) -> None:
    expected = metrics(project, folder=tmp_path)
    assert metrics(project, RobustnessEvaluation(steps=2), folder=tmp_path) == expected


def test_weights_that_are_merged_for_evaluation_are_taken_apart_bit_by_bit() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), Merging())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with preserved_state(net):
        assert net[2].merged
        assert not torch.equal(net[2].weight, before["2.weight"])
    assert not net[2].merged
    assert net[2].training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_attributes_come_back_also_after_an_error() -> None:
    net = ConvNet()
    net.kept, net.table, net.names = [1], {"a": 1}, {"x"}  # type: ignore[assignment]
    kept = net.kept
    with pytest.raises(KeyError), preserved_state(net):  # noqa: PT012 - what was done before the error is undone
        net.kept.append(2)  # type: ignore[operator]
        net.table["b"] = 2  # type: ignore[index]
        net.names = {"y"}  # type: ignore[assignment]
        net.new = 3  # type: ignore[assignment]
        raise KeyError
    assert net.kept is kept
    assert (net.kept, net.table, net.names) == ([1], {"a": 1}, {"x"})
    assert not hasattr(net, "new")


def test_weights_that_were_made_in_inference_mode_are_attacked_all_the_same(tmp_path: Path) -> None:
    class Swapped(pl.Callback):
        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            self.own = [p.data for p in pl_module.parameters()]
            for p in pl_module.parameters():
                p.data = p.data * 1.5

        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            for p, own in zip(pl_module.parameters(), self.own, strict=True):
                p.data = own

    project, callback = Project(), RobustnessEvaluation(steps=2)
    trainer(Swapped(), callback, default_root_dir=tmp_path).test(project, images(24), verbose=False)
    with torch.no_grad():
        for parameter in project.parameters():
            parameter.mul_(1.5)
    assert callback.results == evaluate_robustness(project, images(24), steps=2, progress=False).results


class Split(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.fitting, self.testing = random_split(images(24).dataset, [16, 8])

    def train_dataloader(self) -> Any:
        return DataLoader(self.fitting, 8)

    def test_dataloader(self) -> Any:
        return DataLoader(self.testing, 8)


def test_after_fit_neither_draws_nor_splits_anew(tmp_path: Path) -> None:
    found = []
    for callbacks in ((), (RobustnessEvaluation(after_fit=True, steps=1),)):
        torch.manual_seed(0)
        data = Split()
        trainer(*callbacks, default_root_dir=tmp_path).fit(Project(), data)
        found.append((torch.get_rng_state().tolist(), list(data.testing.indices)))
    assert found[0] == found[1]


def test_after_fit_hooks_see_the_test_stage(tmp_path: Path) -> None:
    class Augmenting(Project):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return (1 - batch[0] if self.trainer.training else batch[0]), batch[1]

        def test_dataloader(self) -> Any:
            return images(24)

    project, callback = Augmenting(), RobustnessEvaluation(after_fit=True, steps=1)
    run = trainer(callback, default_root_dir=tmp_path)
    run.fit(project, images())
    assert callback.results == evaluate_robustness(project, images(24), steps=1, progress=False).results


def test_after_fit_raises_where_it_was_asked_to(tmp_path: Path) -> None:
    class Two(Project):
        def forward(self, x: Tensor) -> Any:
            return self.net(x), self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])[0].sum()

        def test_dataloader(self) -> Any:
            return images(24)

    with pytest.raises(UnsuitableError, match="got tuple"):
        trainer(RobustnessEvaluation(after_fit=True, on_unsuitable="raise"), default_root_dir=tmp_path).fit(
            Two(), images()
        )


@pytest.mark.parametrize("shape", ["view", "squeeze"])
def test_models_that_ask_for_an_order_in_memory_or_squeeze(shape: str) -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(180, 4)
            self.small = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.conv(x)))
            if shape == "view":
                return self.head(x.view(x.shape[0], -1))
            return self.small(nn.functional.adaptive_avg_pool2d(x, 1).squeeze())

    torch.manual_seed(0)
    net = Shaped()
    for size in (1, 8):
        fast, plain = (
            evaluate_robustness(net, images(9, batch_size=size), steps=2, eps=0.1, fold=fold, progress=False)
            for fold in (True, False)
        )
        assert {k: r.correct for k, r in fast.results.items()} == {k: r.correct for k, r in plain.results.items()}
        assert fast.results["bim"].n == 9


def test_workers_that_all_go_through_a_stream_show_each_sample_once() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(images(12).dataset)

    report = evaluate_robustness(Project(), DataLoader(Stream(), 4, num_workers=2), attacks=[], progress=False)
    assert report.results["clean"].n == 12
