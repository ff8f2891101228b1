"""RobustnessEvaluation in projects that it cannot attack: they end as without it, with one warning and one reason."""

from __future__ import annotations

import copy
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_normgeo import RecordLogger, RobustnessEvaluation, evaluate_robustness, read_record
from lightning_normgeo.errors import MeasurementWarning, UnsuitableError
from lightning_normgeo.report import write_report
from lightning_normgeo.robustness.attacks import builders
from lightning_normgeo.robustness.attacks.attack import AttackBatch
from lightning_normgeo.runs.summary import summarize
from support.projects import Project, images, trainer


class Listed(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Any_(pl.LightningModule):  # noqa: N801 - any project
    """Project that calls its network with the parts that a function takes from a batch, and logs the sum."""

    def __init__(self, net: nn.Module, take: Any) -> None:
        super().__init__()
        self.net, self.take = net, take

    def forward(self, *args: Any) -> Any:
        return self.net(*args)

    def _value(self, batch: Any) -> Tensor:
        found = self(*self.take(batch))
        return sum(part.float().square().mean() for part in (found if isinstance(found, tuple) else (found,)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._value(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", self._value(batch), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(24, 4)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.net(torch.cat([first.flatten(1), second.flatten(1)], 1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        return self.net(x.flatten(1)), x.flatten(1)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor
    label: int


PICTURES = torch.rand(16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 9, (16, 5), generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(16) % 4
FLAT = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


def project(net: nn.Module, samples: list[Any], take: Any, **loading: Any) -> tuple[Any, Any]:
    return Any_(copy.deepcopy(net), take), DataLoader(Listed(samples), batch_size=4, **loading)


PROJECTS: dict[str, tuple[Any, str]] = {
    "tokens": (
        lambda: project(nn.Embedding(9, 4), [(t, t) for t in TOKENS], lambda b: (b[0],)),
        r"got list\(int64 \(4, 5\), int64 \(4, 5\)\)",
    ),
    "token dictionaries": (
        lambda: project(
            nn.Embedding(9, 4), [{"input_ids": t, "labels": 1} for t in TOKENS], lambda b: (b["input_ids"],)
        ),
        r"got dict\(input_ids: int64 \(4, 5\), labels: int64 \(4,\)\)",
    ),
    "images alone": (lambda: project(FLAT, list(PICTURES), lambda b: (b,)), r"got float32 \(4, 3, 2, 2\)"),
    "two inputs": (
        lambda: project(Both(), [(x, x, 1) for x in PICTURES], lambda b: b[:2]),
        r"got list\(float32 .*float32 .*int64",
    ),
    "two named inputs": (
        lambda: project(Both(), [Pair(x, x, 1) for x in PICTURES], lambda b: (b.first, b.second)),
        r"got Pair\(first: float32",
    ),
    "a dictionary for the model": (
        lambda: project(
            Both(), [{"image": x, "meta": x, "label": 1} for x in PICTURES], lambda b: (b["image"], b["meta"])
        ),
        r"cannot be called with the images of a batch alone: TypeError",
    ),
    "masks": (
        lambda: project(nn.Conv2d(3, 4, 1), [{"image": x, "mask": x[:1]} for x in PICTURES], lambda b: (b["image"],)),
        r"got dict\(image: float32 .*mask: float32",
    ),
    "maps for labels": (
        lambda: project(nn.Conv2d(3, 4, 1), list(zip(PICTURES, CLASSES, strict=True)), lambda b: (b[0],)),
        r"Expected logits \(batch, classes\) and labels",
    ),
    "several outputs": (
        lambda: project(Twice(), list(zip(PICTURES, CLASSES, strict=True)), lambda b: (b[0],)),
        r"got tuple\(float32 \(4, 4\), float32 \(4, 12\)\).*RobustnessEvaluation.logits",
    ),
    "regression": (
        lambda: project(FLAT, [(x, 0.5) for x in PICTURES], lambda b: (b[0],)),
        r"not whole numbers, so this is no classification.*unpack",
    ),
    "several labels": (
        lambda: project(FLAT, [(x, torch.tensor([1, 0, 1, 0])) for x in PICTURES], lambda b: (b[0],)),
        r"not one-hot.*unpack",
    ),
    "more classes": (
        lambda: project(FLAT, [(x, 7) for x in PICTURES], lambda b: (b[0],)),
        r"Labels span 7…7, but the model has 4 classes",
    ),
    "no pixels": (
        lambda: project(FLAT, [(3 * x - 1, 1) for x in PICTURES], lambda b: (b[0],)),
        r"expected to be pixels in \[0, 1\] but span \[-.*value_range.*space='input'",
    ),
    "pictures of different sizes": (
        lambda: project(
            nn.Identity(),
            [(torch.rand(3, 2 + k % 2, 2), 1) for k in range(8)],
            lambda b: (b[0][0],),
            collate_fn=lambda samples: ([x for x, _ in samples], torch.tensor([y for _, y in samples])),
        ),
        r"got tuple\(list\(float32 \(3, 2, 2\), float32 \(3, 3, 2\)",
    ),
    "graphs": (
        lambda: project(
            nn.Linear(2, 2),
            [1] * 8,
            lambda b: (b.x,),
            collate_fn=lambda samples: type(
                "Graph", (), {"x": torch.rand(5, 2), "edge_index": torch.zeros(2, 4).long()}
            )(),
        ),
        r"got Graph\. Override RobustnessEvaluation\.unpack",
    ),
}


class Witness(pl.Callback):
    """Records the times of warnings, and everything that must not change."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.state: list[Any] = []

    def on_test_batch_start(self, *args: Any) -> None:
        self.order.append("step")

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.state = [torch.get_rng_state(), *(value.clone() for value in pl_module.state_dict().values())]


def ended(make: Any, folder: Path, *callbacks: Any, **settings: Any) -> tuple[Any, Any, Witness, list[str]]:
    torch.manual_seed(1)
    module, loader = make()
    witness = Witness()
    run = trainer(*callbacks, witness, steps=2, default_root_dir=folder, **settings)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if any(parameter.requires_grad for parameter in module.parameters()):
            run.fit(module, loader)
        before = len([w for w in seen if w.category is MeasurementWarning])
        assert before == 0, "nothing is said of the test while training"
        logged = run.test(module, loader, verbose=False)
    return run, logged, witness, [str(w.message) for w in seen if w.category is MeasurementWarning]


@pytest.mark.parametrize("name", PROJECTS)
def test_projects_end_as_without_it_and_are_told_once(name: str, tmp_path: Path) -> None:
    make, message = PROJECTS[name]
    _, expected, alone, _ = ended(make, tmp_path / "alone")
    callback, logger = RobustnessEvaluation(), RecordLogger(str(tmp_path / "runs"))
    run, logged, witness, said = ended(make, tmp_path, callback, logger=logger)
    assert run.state.status == "finished"
    assert logged == expected
    assert all(map(torch.equal, witness.state, alone.state))
    assert len(said) == 1
    assert callback.results == {}
    (reason,) = callback.not_evaluated.values()
    assert list(callback.not_evaluated) == ["all attacks"]
    assert reason in said[0]
    assert re.search(message, said[0])
    document = json.loads((logger.folder / "robustness.json").read_text())
    assert document["results"] == []
    assert document["not_evaluated"] == {"all attacks": reason}
    assert f"not evaluated: {reason}" in str(next(iter(callback.reports.values())))
    logger.finalize("success")
    assert "not evaluated" in summarize(read_record(logger.folder))
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("name", PROJECTS)
def test_whoever_asks_for_it_is_stopped(name: str, tmp_path: Path) -> None:
    make, message = PROJECTS[name]
    module, loader = make()
    with pytest.raises(UnsuitableError, match=message):
        trainer(RobustnessEvaluation(on_unsuitable="raise"), default_root_dir=tmp_path).test(
            module, loader, verbose=False
        )


def test_the_warning_comes_before_the_first_step(tmp_path: Path) -> None:
    order: list[str] = []

    class Ordered(Any_):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            order.append("step")

    callback = RobustnessEvaluation()
    module = Ordered(FLAT, lambda b: (b[0],))
    loader = DataLoader(Listed([(x, 0.5) for x in PICTURES]), batch_size=4)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *args, **kwargs: order.append(str(message)[:30])
        warnings.simplefilter("always", MeasurementWarning)
        trainer(callback, default_root_dir=tmp_path).test(module, loader, verbose=False)
    assert order == ["Robustness is not evaluated. L", *["step"] * 4]


def test_the_report_has_the_reasons(tmp_path: Path) -> None:
    callback, logger = RobustnessEvaluation(attacks=["bim"]), RecordLogger(str(tmp_path))
    make, _ = PROJECTS["regression"]
    ended(make, tmp_path, callback, logger=logger)
    logger.finalize("success")
    page = write_report([logger.folder]).read_text()
    assert "Not evaluated" in page
    assert "not whole numbers" in page


# --- what fails later -------------------------------------------------------------------------------------------------


def test_an_attack_that_fails_is_left_out_and_the_others_are_not(monkeypatch: Any, tmp_path: Path) -> None:
    class Fails(builders.Noise):
        def perturb(self, batch: AttackBatch) -> Tensor:
            raise RuntimeError("the attack has failed")

    monkeypatch.setattr(builders, "Noise", Fails)
    callback, logger = RobustnessEvaluation(steps=2), RecordLogger(str(tmp_path))
    with pytest.warns(MeasurementWarning, match="gaussian is not evaluated. RuntimeError: the attack has failed"):
        (logged,) = trainer(callback, logger=logger).test(Project(), images(24), verbose=False)
    assert list(callback.results) == ["clean", "bim"]
    assert callback.results["bim"].n == 24
    assert callback.not_evaluated == {"gaussian": "RuntimeError: the attack has failed"}
    assert "test_loss" in logged
    assert not any("gaussian" in key for key in logged)


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_a_model_that_fails_in_the_middle_ends_the_evaluation_not_the_test(tmp_path: Path, semantics: Any) -> None:
    counted = itertools.count()

    class Full(Project):
        def forward(self, x: Tensor) -> Tensor:
            if next(counted) > 40:
                raise MemoryError("full")
            return super().forward(x)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", float(len(batch[1])), reduce_fx="sum")

    callback = RobustnessEvaluation(batch_size=8, semantics=semantics)
    with pytest.warns(MeasurementWarning, match="not evaluated. MemoryError: full") as seen:
        (logged,) = trainer(callback, default_root_dir=tmp_path).test(Full(), images(64), verbose=False)
    assert len([w for w in seen if w.category is MeasurementWarning]) <= 2
    assert logged["seen"] == 64
    assert all("MemoryError: full" in reason for reason in callback.not_evaluated.values())


def test_one_loader_that_does_not_suit_leaves_the_others_alone(tmp_path: Path) -> None:
    class Several(Project):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    odd = DataLoader(TensorDataset(torch.rand(8, 3, 8, 8), torch.rand(8)), batch_size=4)
    callback, logger = RobustnessEvaluation(attacks=["gaussian"]), RecordLogger(str(tmp_path))
    with pytest.warns(MeasurementWarning, match="Robustness/odd is not evaluated. Labels float32"):
        trainer(callback, logger=logger).test(Several(), {"even": images(24), "odd": odd}, verbose=False)
    assert list(callback.results) == ["clean/even", "gaussian/even"]
    assert list(callback.not_evaluated) == ["all attacks/odd"]
    document = json.loads((logger.folder / "robustness.json").read_text())
    assert list(document["loaders"]) == ["/even", "/odd"]
    assert document["loaders"]["/odd"]["not_evaluated"].keys() == {"all attacks"}


def test_an_empty_loader_has_no_accuracy(tmp_path: Path) -> None:
    class Nothing(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    callback = RobustnessEvaluation()
    with pytest.warns(MeasurementWarning, match="Robustness is not evaluated. the loader has no samples"):
        logged = trainer(callback, default_root_dir=tmp_path).test(Project(), DataLoader(Nothing()), verbose=False)
    assert callback.results == {}
    assert not any("robustness" in key for one in logged for key in one)
    with pytest.raises(UnsuitableError, match="The dataloader has no samples"):
        evaluate_robustness(Project(), [], progress=False)
    report = evaluate_robustness(Project(), [], progress=False, on_unsuitable="skip")
    assert report.results == {}
    assert "not evaluated: the loader has no samples" in str(report)
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_batch_is_evaluated_as_the_loader_gave_it(tmp_path: Path) -> None:
    """A step that empties its batch, or writes into it, does not affect the evaluation."""

    class Popping(Project):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            labels = batch.pop("labels")
            batch.pop("pixel_values").mul_(0)
            self.log("labels", labels.float().mean(), batch_size=len(labels))

    x, y = images(24).dataset.tensors
    data = DataLoader(Listed([{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]), batch_size=8)
    project, callback = Popping(), RobustnessEvaluation(steps=2)
    trainer(callback, default_root_dir=tmp_path).test(project, data, verbose=False)
    assert callback.results == evaluate_robustness(project, images(24), steps=2, progress=False).results


def test_a_logger_that_fails_loses_neither_the_test_nor_the_others(tmp_path: Path) -> None:
    class Broken(RecordLogger):
        def log_results(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("disk full")

    class Stubborn(Project):
        def log_dict(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError("not like this")

    callback, good = RobustnessEvaluation(steps=1), RecordLogger(str(tmp_path / "good"))
    broken = Broken(str(tmp_path / "broken"))
    with pytest.warns(MeasurementWarning) as seen:
        (logged,) = trainer(callback, logger=[broken, good]).test(Stubborn(), images(16), verbose=False)
    assert "test_loss" in logged
    assert (good.folder / "robustness.json").is_file()
    texts = [str(w.message) for w in seen]
    assert any("Broken failed to log the robustness results" in text for text in texts)
    assert any("the test continues" in text for text in texts)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_steps_that_fetch_their_own_batches(tmp_path: Path) -> None:
    class Fetching(Project):
        def test_step(self, dataloader_iter: Any) -> None:
            (x, y), _, _ = next(dataloader_iter)
            self.log("loss", F.cross_entropy(self(x), y), batch_size=len(y))

    project, callback = Fetching(), RobustnessEvaluation(steps=1)
    trainer(callback, default_root_dir=tmp_path).test(project, images(24), verbose=False)
    assert callback.results == evaluate_robustness(project, images(24), steps=1, progress=False).results


def test_a_record_logger_takes_what_is_called_on_other_experiments(tmp_path: Path) -> None:
    logger = RecordLogger(str(tmp_path))
    logger.experiment.add_image("generated", torch.zeros(3, 2, 2), 0)
    logger.experiment.log({"x": 1})
    assert not logger.path.exists()


def test_rows_that_one_reason_keeps_from_evaluation_have_one_warning() -> None:
    project = Project()
    for layer in project.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 10.0  # so large that the length of weights in front matters
    callback = RobustnessEvaluation(attacks="bim", steps=2, rescale=10.0)
    with pytest.warns(MeasurementWarning) as told:
        trainer(callback).test(project, images(8), verbose=False)
    (message,) = (str(one.message) for one in told if one.category is MeasurementWarning)
    assert message.startswith("clean_rescaled, bim_rescaled are not evaluated. With scale-invariant weights multiplied")


def test_a_network_without_scale_invariant_weights_has_no_control() -> None:
    class Plain(Project):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.modules():
                for name, child in layer.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(layer, name, nn.Identity())

    callback = RobustnessEvaluation(attacks="bim", steps=2, rescale=10.0)
    with pytest.warns(MeasurementWarning, match=r"bim_rescaled are not evaluated\. The model has no scale-inv"):
        trainer(callback).test(Plain(), images(8), verbose=False)
    assert list(callback.results) == ["clean", "bim"]


def test_an_image_that_is_not_finite_leaves_the_control_of_the_others() -> None:
    class Quiet(Project):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", 1.0)

    x, y = images(16).dataset.tensors
    x = torch.cat([x[:3], x[3:4] * torch.nan, x[4:]])
    callback = RobustnessEvaluation(attacks="bim", steps=2, rescale=10.0)
    with pytest.warns(MeasurementWarning) as told:
        trainer(callback).test(Quiet(), DataLoader(TensorDataset(x, y), 8), verbose=False)
    messages = [str(one.message) for one in told if one.category is MeasurementWarning]
    assert all(re.search("1 of 16 images .*not finite|not finite for 1 of 16 images", one) for one in messages)
    assert {name: result.n for name, result in callback.results.items()} == dict.fromkeys(
        ["clean", "bim", "clean_rescaled", "bim_rescaled"], 16
    )
