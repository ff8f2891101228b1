"""RobustnessEvaluation in real Trainers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import RecordLogger, ResNetClassifier, RobustnessEvaluation, read_record
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.robustness import bim_linf
from support.projects import Project, images, trainer


class WithTestData(Project):
    def test_dataloader(self) -> Any:
        return images(40)


def accuracy(project: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    project.eval()
    return float((project(x).argmax(1) == y).float().mean())


def test_test_loop_equals_a_direct_computation(tmp_path: Path) -> None:
    project, callback = Project(), RobustnessEvaluation(eps=0.1, step_size=0.02, steps=5)
    data = images(40)
    x, y = data.dataset.tensors
    logger = RecordLogger(str(tmp_path))
    (logged,) = trainer(callback, logger=logger).test(project, data, verbose=False)
    project.eval()
    attacked = bim_linf(project, x, y, 0.1, 0.02, 5, 0.0, 1.0)
    assert logged["robustness/clean/accuracy"] == pytest.approx(accuracy(project, x, y))
    assert logged["robustness/bim/accuracy"] == pytest.approx(accuracy(project, attacked, y))
    assert logged["robustness/bim/accuracy_drop"] == pytest.approx(
        accuracy(project, x, y) - accuracy(project, attacked, y)
    )
    assert logged["robustness/gaussian/n"] == 40
    assert logged["robustness/bim/ci_low"] < logged["robustness/bim/accuracy"] < logged["robustness/bim/ci_high"]
    results = json.loads((logger.folder / "robustness.json").read_text())
    assert results["settings"]["threat"] == {
        "space": "pixel", "eps": 0.1, "step_size": 0.02, "steps": 5, "noise_std": 0.05,
        "lower": 0.0, "upper": 1.0, "clip_noise": True, "eps_l2": 0.5, "box_first": False,
    }  # fmt: skip
    assert [row["attack"] for row in results["results"]] == ["clean", "gaussian", "bim"]
    assert len(list((logger.folder / "images").glob("*.png"))) == 8
    assert read_record(logger.folder).images["robustness/examples"][0][1].startswith("label ")


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_after_fit_uses_the_last_weights_and_leaves_training_mode(tmp_path: Path) -> None:
    callback, project = RobustnessEvaluation(after_fit=True, steps=2), WithTestData()
    project.net[1].eval()
    logger = RecordLogger(str(tmp_path))
    run = trainer(callback, logger=logger, steps=2)
    run.fit(project, images())
    record = read_record(logger.folder)
    assert record.metrics["robustness/clean/n"] == [(2, 40.0)]
    assert run.callback_metrics["robustness/clean/n"] == 40
    x, y = images(40).dataset.tensors
    assert callback.results["clean"].accuracy == pytest.approx(accuracy(project, x, y))


@pytest.mark.parametrize("found", [None, [], [None], {}], ids=str)
def test_after_fit_with_a_loader_that_is_none(found: Any) -> None:
    class Without(Project):
        def test_dataloader(self) -> Any:
            return found

    message = rf"got {re.escape(repr(found))} from Without\.test_dataloader, which is no data\. Return a DataLoader, or"
    run = trainer(RobustnessEvaluation(after_fit=True), steps=1)
    with pytest.warns(MeasurementWarning, match=message):
        run.fit(Without(), images())


def test_after_fit_without_test_data_is_refused_before_training() -> None:
    run = trainer(RobustnessEvaluation(after_fit=True, on_unsuitable="raise"))
    with pytest.raises(ConfigurationError, match="needs a test_dataloader"):
        run.fit(Project(), images())
    assert run.global_step == 0


def test_modes_gradients_buffers_and_random_numbers_are_restored() -> None:
    seen: list[Any] = []

    class Around(pl.Callback):
        def look(self, module: Any) -> None:
            modes = [m.training for m in module.modules()]
            state = [t.clone() for t in module.state_dict().values()]
            seen.append((modes, state, torch.get_rng_state(), [p.grad for p in module.parameters()]))

        def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            self.look(pl_module)

    class OddModes(Project):
        def on_test_batch_start(self, *args: Any) -> None:
            self.net[1].train()
            for parameter in self.parameters():
                parameter.grad = torch.ones_like(parameter)

    project = OddModes()
    before, after = Around(), Around()
    trainer(before, RobustnessEvaluation(steps=2), after).test(project, images(8), verbose=False)
    (modes, state, rng, grads), (modes2, state2, rng2, grads2) = seen
    assert modes == modes2
    assert any(modes)
    assert all(torch.equal(a, b) for a, b in zip(state, state2, strict=True))
    assert torch.equal(rng, rng2)
    assert all(a is b for a, b in zip(grads, grads2, strict=True))
    assert all((g == 1).all() for g in grads2)


def test_results_do_not_depend_on_the_batch_size() -> None:
    project, found = Project(), []
    for size in (5, 40):
        callback = RobustnessEvaluation(noise_std=0.3, steps=2)
        trainer(callback).test(project, images(40, batch_size=size), verbose=False)
        found.append(callback.results)
    assert found[0] == found[1]


def test_max_samples_and_limit_test_batches() -> None:
    callback = RobustnessEvaluation(max_samples=13, attacks=[])
    trainer(callback).test(Project(), images(40), verbose=False)
    assert callback.results["clean"].n == 13
    callback = RobustnessEvaluation(attacks=["gaussian"])
    trainer(callback, limit_test_batches=2).test(Project(), images(40), verbose=False)
    assert {name: result.n for name, result in callback.results.items()} == {"clean": 16, "gaussian": 16}


def test_normalized_data_is_declared_once() -> None:
    """Data normalized by the pipeline and data normalized by the model give the same answers."""
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    inside = ResNetClassifier(num_classes=4, arch="resnet18", stem="imagenet", input_mean=mean, input_std=std)
    inside.train()
    inside(torch.rand(32, 3, 8, 8))  # nontrivial running statistics
    x, y = images(24).dataset.tensors
    x = (x * 255).round() / 255  # else the same image would have different bits after normalization
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    z = inside.input_normalization(x)
    for preset in ("pixel-8-255", "galloway2019"):
        a, b = RobustnessEvaluation(preset, steps=3), RobustnessEvaluation(preset, steps=3, mean=mean, std=std)
        trainer(a).test(inside, loader, verbose=False)
        trainer(b).test(Project(net=inside.model), DataLoader(TensorDataset(z, y), batch_size=8), verbose=False)
        assert {k: r.correct for k, r in a.results.items()} == {k: r.correct for k, r in b.results.items()}


def test_a_wrong_declaration_is_refused() -> None:
    callback = RobustnessEvaluation(mean=[0.5] * 3, std=[2.0] * 3, normalized_by="data", on_unsuitable="raise")
    with pytest.raises(
        ConfigurationError, match=r"With the declared mean=.*pixels in \[0\.5\d*, 2\.\d*\], not in \[0, 1\]"
    ):
        trainer(callback).test(Project(), images(8), verbose=False)


def test_models_with_several_outputs_are_refused_with_the_remedy() -> None:
    class Two(Project):
        def forward(self, x: torch.Tensor) -> Any:
            return self.net(x), x

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.raises(ConfigurationError, match=r"got tuple\(float32 .*Override RobustnessEvaluation.logits"):
        trainer(RobustnessEvaluation(on_unsuitable="raise")).test(Two(), images(8), verbose=False)


def test_a_failure_after_fit_does_not_take_the_other_callbacks_along(tmp_path: Path) -> None:
    class Broken(Project):
        def test_dataloader(self) -> Any:
            raise OSError("gone")

    ended: list[str] = []

    class Later(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            ended.append("end")

    with pytest.warns(UserWarning, match="Robustness is not evaluated. OSError: gone"):
        trainer(RobustnessEvaluation(after_fit=True), Later()).fit(Broken(), images())
    assert ended == ["end"]


def test_galloway_needs_the_normalization() -> None:
    with pytest.raises(ConfigurationError, match=r"normalized space needs the input normalization.*mean="):
        trainer(RobustnessEvaluation("galloway2019", on_unsuitable="raise")).test(Project(), images(8), verbose=False)


def test_images_outside_pixels_concern_only_the_test() -> None:
    x = torch.randn(16, 3, 8, 8)
    loader = DataLoader(TensorDataset(x, torch.zeros(16, dtype=torch.long)), batch_size=8)
    project, run = Project(), trainer(RobustnessEvaluation(on_unsuitable="raise"))
    run.fit(project, loader)
    assert run.global_step == 4
    with pytest.raises(ConfigurationError, match=r"pixels in \[0, 1\] but span \[-.*mean=.*std=.*space='input'"):
        run.test(project, loader, verbose=False)


def test_other_batches_are_refused_with_the_remedy() -> None:
    class Dictionary(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> Any:
            return {"hidden": torch.rand(3, 8, 8), "state": torch.rand(3, 8, 8), "answer": 0}

    class Lenient(Project):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.raises(
        ConfigurationError, match=r"expects batches \(images, labels\), got dict\(hidden: float32.*unpack"
    ):
        trainer(RobustnessEvaluation(on_unsuitable="raise")).test(
            Lenient(), DataLoader(Dictionary(), batch_size=4), verbose=False
        )

    class Unpacked(RobustnessEvaluation):
        def unpack(self, batch: Any) -> Any:
            return batch["hidden"], batch["answer"]

    callback = Unpacked(attacks=[])
    trainer(callback).test(Lenient(), DataLoader(Dictionary(), batch_size=4), verbose=False)
    assert callback.results["clean"].n == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, r"eps=-0.1 must be at least 0.*8/255"),
        ({"eps": 8}, r"eps=8 is larger than the pixel range.*8/255"),
        ({"steps": 0}, r"steps=0 must be an integer, at least 1"),
        ({"preset": "pixel-8"}, r"preset='pixel-8' is unknown.*'pixel-8-255'"),
        ({"attacks": ["bmi"]}, r"'bmi' is unknown.*'bim'"),
        ({"max_samples": 0}, r"max_samples=0 must be an integer, at least 1"),
        ({"mean": [0.5] * 3}, r"mean=.*std=None must be given together"),
    ],
)
def test_bad_settings_are_refused_when_constructed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RobustnessEvaluation(**settings)


def test_wrong_number_of_classes() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    class NoLoss(Project):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.raises(ConfigurationError, match=r"Labels span \d…3, but the model has 3 classes"):
        trainer(RobustnessEvaluation(on_unsuitable="raise")).test(
            NoLoss(net=net), images(40, batch_size=40), verbose=False
        )


@pytest.mark.parametrize("after_fit", [False, True], ids=["test", "after-fit"])
def test_models_whose_passes_take_all_processes_are_refused(after_fit: bool) -> None:
    class DeepSpeedStrategy(pl.strategies.SingleDeviceStrategy):
        """A strategy with the class name of Lightning's; how it shards does not matter here."""

    callback = RobustnessEvaluation(after_fit=after_fit, on_unsuitable="raise")
    run = trainer(callback, strategy=DeepSpeedStrategy("cpu"), accelerator="auto")
    with pytest.raises(ConfigurationError, match=r"cannot run under DeepSpeedStrategy.*one device or with ddp"):
        run.fit(Project(), images()) if after_fit else run.test(Project(), images(), verbose=False)
