"""Several evaluations, loaders and runs: each has keys, files, tables and settings of its own."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_normgeo import RecordLogger, RobustnessEvaluation, evaluate_robustness, read_record, summarize
from lightning_normgeo.callbacks._robustness.dataloaders import named_loaders
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.report import write_report
from lightning_normgeo.report.compared_runs import load_runs
from lightning_normgeo.report.tables import all_tables
from lightning_normgeo.report.tables.accuracies.evaluations import evaluations_of
from lightning_normgeo.robustness import load_decisions
from support.projects import Project, Rows, images, trainer


class Several(Project):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


class Validated(Project):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_results_say_on_which_data_and_that_they_replace_others(tmp_path: Path) -> None:
    logger, project = RecordLogger(str(tmp_path)), Validated()
    run = trainer(RobustnessEvaluation(attacks=[], num_images=0), logger=logger)
    run.test(project, images(24), verbose=False)
    assert "data" not in read_record(logger.folder).evaluations[""]
    assert "validation data" not in str(summarize(logger.folder))
    expected = r"robustness\.json had the results on the test data; now it has those on the validation data, and so"
    with pytest.warns(MeasurementWarning, match=expected):
        run.validate(project, images(16), verbose=False)
    assert read_record(logger.folder).evaluations[""]["data"] == "validation"
    assert json.loads((logger.folder / "robustness.json").read_text())["data"] == "validation"
    assert "clean, validation data" in str(summarize(logger.folder))
    titles = [table.title for table in all_tables(load_runs([logger.folder]))]
    assert "Accuracy under attack: the validation data" in titles
    run.validate(project, images(8), verbose=False)  # of the same data: no warning


def test_evaluations_of_one_trainer_have_names_of_their_own(tmp_path: Path) -> None:
    weak = RobustnessEvaluation(eps=0.01, steps=2, num_images=2)
    strong = RobustnessEvaluation(eps=0.2, steps=2, num_images=2, name="strong", attacks=["bim"])
    logger, project = RecordLogger(str(tmp_path)), Several()
    loaders = {"even": images(24), "odd": images(16)}
    (logged, *_) = trainer(weak, strong, logger=logger).test(project, loaders, verbose=False)
    logger.finalize("success")
    for callback, eps, infix in ((weak, 0.01, ""), (strong, 0.2, "/strong")):
        for loader, data in loaders.items():
            expected = evaluate_robustness(project, data, eps=eps, steps=2, attacks=["bim"], progress=False)
            assert callback.results[f"bim/{loader}"] == expected.results["bim"]
            assert logged[f"robustness/bim{infix}/{loader}/n"] == len(data.dataset)  # type: ignore[arg-type]
    files = {path.name for path in logger.folder.glob("robustness*")}
    assert files == {
        "robustness.json", "robustness_strong.json", "robustness_even.npz", "robustness_odd.npz",
        "robustness_strong_even.npz", "robustness_strong_odd.npz",
    }  # fmt: skip
    record = read_record(logger.folder)
    assert set(record.evaluations) == {"", "strong"}
    assert len(record.examples) == 4
    document = json.loads((logger.folder / "robustness_strong.json").read_text())
    assert document["loaders"]["/strong/odd"]["settings"]["threat"]["eps"] == 0.2
    (run,) = load_runs([logger.folder])
    assert run.evaluation_settings("/strong/odd")["threat"]["eps"] == 0.2
    assert run.evaluation_settings("/odd")["threat"]["eps"] == 0.01
    (found,) = evaluations_of([run])
    assert set(found.decisions) == {"/even", "/odd", "/strong/even", "/strong/odd"}
    assert found.problem == ""
    assert found.conditions("bim/strong/odd")["bim.eps"] == "0.2"
    table = next(table for table in all_tables([run]) if table.anchor == "robustness")
    assert {"clean/even", "bim/odd, ε = 0.01", "bim/strong/odd, ε = 0.2"} <= {row[0].text for row in table.rows}
    assert "bim" in write_report([logger.folder]).read_text()


def test_two_of_one_name_are_refused_before_anything_runs() -> None:
    for names in ((None, None), ("a", "a")):
        run = trainer(*(RobustnessEvaluation(name=name) for name in names))
        with pytest.raises(ConfigurationError, match=r"2 RobustnessEvaluations with name=.*Give each a name"):
            run.fit(Project(), images())
        assert run.global_step == 0
    for name in ("", "a/b", "a_b", "a b"):
        with pytest.raises(ConfigurationError, match="becomes part of keys and files"):
            RobustnessEvaluation(name=name)


@pytest.mark.parametrize(
    ("loaders", "names"),
    [
        (1, [""]),
        ([1], [""]),
        ({"a": 1}, [""]),
        ([1, 2], ["dataloader_0", "dataloader_1"]),
        ({"clean": 1, "shifted set": 2}, ["clean", "shifted_set"]),
        ({"a": [1, 2], "b": {"c": 3}}, ["a.0", "a.1", "b.c"]),
        ([{"a": 1}, 2], ["dataloader_0.a", "dataloader_1"]),
        ({"a b": 1, "a_b": 2, "a?b": 3, "a_b.1": 4}, ["a_b", "a_b.1", "a_b.2", "a_b_1"]),
    ],
    ids=str,
)
def test_loaders_are_called_what_projects_call_them(loaders: Any, names: list[str]) -> None:
    assert list(named_loaders(loaders)) == names


@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size", "max_size_cycle"])
def test_loaders_that_are_combined_are_told_apart(mode: Any, tmp_path: Path) -> None:
    """Also if their batches come side by side, and if the shorter loader starts again."""
    project, callback = Several(), RobustnessEvaluation(steps=1, attacks=["bim"])
    loaders = {"a": images(24), "b": images(40, batch_size=10)}
    trainer(callback, default_root_dir=tmp_path).test(project, CombinedLoader(loaders, mode), verbose=False)
    counts = {name: result.n for name, result in callback.results.items() if name.startswith("clean")}
    assert counts == {"clean/a": 24, "clean/b": 30 if mode == "min_size" else 40}
    whole = evaluate_robustness(project, loaders["a"], steps=1, attacks=["bim"], progress=False)
    assert callback.results["bim/a"] == whole.results["bim"]


# --- folders ----------------------------------------------------------------------------------------------------------


class Versioned(Rows):
    """A logger like W&B's: one folder for all runs, which differ by their version."""

    def __init__(self, folder: Path, version: Any) -> None:
        super().__init__()
        self.folder, self._version = folder, version

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def version(self) -> Any:  # type: ignore[override]
        return self._version


class Keeping(Versioned):
    """A logger of the project's own that keeps results, and has no folder of its run."""

    def log_results(self, name: str, results: Any) -> None:
        self.kept = results


LOGGERS: dict[str, Any] = {
    "none": lambda folder, k: False,
    "csv": lambda folder, k: CSVLogger(folder),
    "record": lambda folder, k: RecordLogger(str(folder)),
    "a version": lambda folder, k: Versioned(folder, f"run{k}"),
    "a number": lambda folder, k: Versioned(folder, k),
    "no version": lambda folder, k: Versioned(folder, None),
    "results": lambda folder, k: Keeping(folder, k),
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_no_run_overwrites_what_another_has_written(kind: str, tmp_path: Path) -> None:
    written: dict[Path, bytes] = {}
    for k in range(3):
        logger = LOGGERS[kind](tmp_path, k)
        callback = RobustnessEvaluation(attacks=[], seed=k, num_images=0)
        trainer(callback, logger=logger, default_root_dir=tmp_path).test(Project(), images(16), verbose=False)
        files = {path: path.read_bytes() for path in tmp_path.rglob("robustness*") if path.is_file()}
        assert len(files) == 2 * (k + 1)
        assert all(files[path] == content for path, content in written.items())
        written = files
    assert not list(tmp_path.glob("robustness.*")), "not beside other runs"


def test_a_fast_run_of_lightnings_own_writes_nothing(tmp_path: Path) -> None:
    callback = RobustnessEvaluation(steps=1)
    trainer(callback, default_root_dir=tmp_path, fast_dev_run=True).test(Project(), images(16), verbose=False)
    assert callback.results["bim"].n == 8
    assert not list(tmp_path.rglob("*robustness*"))


def test_results_are_whole_or_what_they_were(tmp_path: Path, monkeypatch: Any) -> None:
    report = evaluate_robustness(Project(), images(16), attacks=[], progress=False)
    report.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        report.decisions.save(tmp_path / "robustness.npz")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load_decisions(tmp_path / "robustness.npz").attacks == ["clean"]


def test_the_journal_stays_where_results_cannot_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    def full(file: Any, **arrays: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    callback, project = RobustnessEvaluation(steps=1), Project()
    with pytest.warns(UserWarning, match=r"cannot be written to .*No space left on device"):
        trainer(callback, default_root_dir=tmp_path).test(project, images(16), verbose=False)
    assert len(list(tmp_path.glob("robustness-*.jsonl"))) == 1
    monkeypatch.undo()
    again = RobustnessEvaluation(steps=1)
    trainer(again, default_root_dir=tmp_path).test(project, images(16), verbose=False)
    assert again.results == callback.results
    assert not list(tmp_path.glob("robustness-*.jsonl"))


def test_evaluations_with_names_keep_journals_of_their_own(tmp_path: Path) -> None:
    counted = itertools.count()

    class Broken(Several):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if next(counted) > 30:
                raise KeyboardInterrupt
            return super().forward(x)

    callbacks = [RobustnessEvaluation(name=name, batch_size=4, steps=2) for name in ("one", "two")]
    with pytest.raises(SystemExit):
        trainer(*callbacks, default_root_dir=tmp_path).test(Broken(), images(64, batch_size=4), verbose=False)
    assert len(list(tmp_path.glob("robustness-*.jsonl"))) == 2


def test_a_callback_can_be_copied_before_and_after(tmp_path: Path) -> None:
    callback = RobustnessEvaluation(steps=1, name="copied")
    assert pickle.loads(pickle.dumps(callback)).name == "copied"
    run = trainer(callback, default_root_dir=tmp_path)
    run.test(Project(), images(16), verbose=False)
    again = copy.deepcopy(callback)
    assert again.results == callback.results


# --- batches and outputs in a Trainer ---------------------------------------------------------------------------------


class Shaped(Dataset[Any]):
    def __init__(self, shape: Any) -> None:
        self.shape = shape
        self.x, self.y = images(24).dataset.tensors

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return self.shape(self.x[index], int(self.y[index]))


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.loss, self.logits = None, logits


@pytest.mark.parametrize(
    ("shape", "answer"),
    [
        (lambda x, y: {"pixel_values": x, "labels": y}, lambda z: Output(z)),
        (lambda x, y: {"image": x, "label": torch.nn.functional.one_hot(torch.tensor(y), 4)}, lambda z: {"logits": z}),
        (lambda x, y: (x, float(y), "name"), lambda z: (z,)),
        (lambda x, y: (x, {"label": torch.tensor(y, dtype=torch.int16), "box": torch.rand(4)}), lambda z: (None, z)),
        (lambda x, y: [{"data": x, "label": torch.tensor([y])}], lambda z: z[:, :, None, None]),
    ],
    ids=["transformers", "one-hot", "floats", "nested", "pipelines"],
)
def test_batches_and_outputs_that_projects_have(shape: Any, answer: Any, tmp_path: Path) -> None:
    class Own(Several):
        def forward(self, x: torch.Tensor) -> Any:
            return answer(self.net(x))

    project, callback = Own(), RobustnessEvaluation(eps=0.1, steps=2)
    trainer(callback, default_root_dir=tmp_path).test(project, DataLoader(Shaped(shape), 8), verbose=False)
    expected = evaluate_robustness(Project(net=project.net), images(24), eps=0.1, steps=2, progress=False)
    assert callback.results == expected.results


def test_sizes_that_differ_between_batches_are_evaluated_by_size(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    batches = [
        (torch.rand(n, 3, 8 + k % 3, 8, generator=generator), torch.arange(n) % 4)
        for k, n in enumerate([3, 5, 4, 2, 7, 1])
    ]
    for semantics in ("final", "any"):
        project, callback = Several(), RobustnessEvaluation(eps=0.1, steps=2, semantics=semantics)  # type: ignore[arg-type]
        trainer(callback, default_root_dir=tmp_path).test(project, DataLoader(batches, batch_size=None), verbose=False)
        found = callback.reports[""].decisions
        assert callback.results["bim"].n == 22
        for x, y in batches:
            alone = evaluate_robustness(
                project, [(x, y)], eps=0.1, steps=2, semantics=semantics, progress=False
            ).decisions.of("bim")
            rows = found.of("bim")
            there = torch.isin(rows.sample, alone.sample)
            order = torch.argsort(rows.sample[there]), torch.argsort(alone.sample)
            assert torch.equal(rows.prediction[there][order[0]], alone.prediction[order[1]])
            torch.testing.assert_close(rows.loss[there][order[0]], alone.loss[order[1]], rtol=1e-4, atol=1e-6)


def test_inputs_in_units_of_their_own(tmp_path: Path) -> None:
    """Decibels, with radius and bounds in decibels, against the formula in float64."""
    x = -40 + 15 * torch.randn(24, 1, 6, 5, generator=torch.Generator().manual_seed(1))
    x = x.clamp(-80, 0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(30, 3))
    with torch.no_grad():
        net[1].bias.sub_(net(x).mean(0))
        y = net(x).argmax(1)
    wide, attacked = copy.deepcopy(net).double(), x.double()
    for _ in range(10):
        attacked = attacked.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(wide(attacked), y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, attacked)
        moved = attacked.detach() + 0.5 * slope.sign()
        attacked = torch.min(torch.max(moved, x.double() - 2), x.double() + 2).clamp(-80, 0)
    expected = int((wide(attacked).argmax(1) == y).sum())
    units = {"space": "input", "eps": 2.0, "noise_std": 3.0, "lower": -80.0, "upper": 0.0}
    callback, logger = RobustnessEvaluation(**units), RecordLogger(str(tmp_path))
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    trainer(callback, logger=logger).test(Several(net=net), data, verbose=False)
    assert callback.results["bim"].correct == expected
    assert 0 < expected < callback.results["clean"].correct == 24
    assert callback.results["bim"].linf == pytest.approx(2.0, rel=1e-5)
    assert callback.reports[""].settings["threat"]["space"] == "input"
    assert len(read_record(logger.folder).examples) == 8
    unbounded = units | {"lower": -float("inf"), "upper": float("inf")}
    free = evaluate_robustness(net, data, attacks=["bim"], progress=False, num_images=1, **unbounded)
    assert free.results["bim"].n == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "input"}, r"give eps, lower, noise_std, upper too"),
        ({"space": "input", "eps": 1.0, "attacks": ["bim"]}, r"give lower, upper too"),
        ({"space": "input", "attacks": ["pgd_l2"], "lower": 0.0, "upper": 9.0}, r"give eps_l2 too"),
        ({"space": "normalized"}, r"space='normalized' does not go with preset='pixel-8-255'"),
        ({"space": "rgb"}, r"space='rgb' does not go with"),
        (
            {"space": "input", "attacks": ["torchattacks.FGSM"], "lower": -float("inf"), "upper": 1.0},
            r"works on pixels, so space='input' needs lower=… and upper=… that are finite",
        ),
        ({"value_range": [1, 1]}, r"value_range=\[1\.0, 1\.0\] must be the smallest and the largest"),
        ({"value_range": [0, 1], "mean": [0.5], "std": [0.5]}, r"not both"),
        ({"normalized_by": "both"}, r"normalized_by='both' is unknown"),
        ({"on_unsuitable": "warn"}, r"on_unsuitable='warn' is unknown; choose 'skip' or 'raise'"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_when_constructed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RobustnessEvaluation(**settings)


def test_units_of_the_inputs_leave_no_room_for_a_normalization() -> None:
    with pytest.raises(ConfigurationError, match="mean, std, normalized_by and value_range have no part in it"):
        RobustnessEvaluation(space="input", eps=1.0, noise_std=1.0, lower=-1.0, upper=1.0, value_range=[-1, 1])


@pytest.mark.parametrize("low_high", [(-1.0, 1.0), (0.0, 255.0), (-80.0, 0.0)])
def test_a_declared_range_is_black_to_white(low_high: tuple[float, float]) -> None:
    low, high = low_high
    x, y = images(24).dataset.tensors
    net = Project().net
    moved = torch.nn.Sequential(ScaleState(low, high), net)
    plain = evaluate_robustness(net, DataLoader(TensorDataset(x, y), 8), eps=0.1, progress=False)
    data = DataLoader(TensorDataset(x * (high - low) + low, y), 8)
    found = evaluate_robustness(moved, data, value_range=low_high, attacks=["bim"], eps=0.1, progress=False)
    assert found.results["bim"].correct == plain.results["bim"].correct
    assert found.results["bim"].linf == pytest.approx(0.1, rel=1e-4)


class ScaleState(torch.nn.Module):
    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.low) / (self.high - self.low)


def test_bytes_are_evaluated_where_the_model_takes_them_for_numbers(tmp_path: Path) -> None:
    class Bytes(Several):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.dtype) / 255)

    class Only(Several):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x / 255 if x.dtype == torch.uint8 else x)

    x, y = images(24).dataset.tensors
    levels = (x * 255).round()
    data = DataLoader(TensorDataset(levels.to(torch.uint8), y), 8)
    project, callback = Bytes(), RobustnessEvaluation(steps=2)
    trainer(callback, default_root_dir=tmp_path).test(project, data, verbose=False)
    pixels = DataLoader(TensorDataset(levels / 255, y), 8)
    expected = evaluate_robustness(Project(net=project.net), pixels, steps=2, progress=False)
    assert {k: r.correct for k, r in callback.results.items()} == {k: r.correct for k, r in expected.results.items()}
    with pytest.warns(
        UserWarning, match="Images are bytes, and the model does not give the same logits for the same numbers"
    ):
        trainer(RobustnessEvaluation(), default_root_dir=tmp_path).test(Only(), data, verbose=False)
