"""RobustnessEvaluation in validation, with several loaders, progress bars and loggers, and when an attack fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from lightning_normgeo import ChannelEvaluation, RecordLogger, RobustnessEvaluation
from lightning_normgeo.callbacks._robustness.logging import local_folder
from lightning_normgeo.robustness import evaluate_robustness, load_decisions
from lightning_normgeo.robustness.attacks import builders
from lightning_normgeo.robustness.attacks.attack import AttackBatch
from support.projects import Project, images, trainer


class Validated(Project):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


def test_validate_evaluates_and_validation_inside_fit_does_not(tmp_path: Path) -> None:
    project, callback = Validated(), RobustnessEvaluation(eps=0.1, steps=2)
    run = trainer(callback, steps=2, default_root_dir=tmp_path)
    run.fit(project, images(), images(24))
    assert callback.results == {}
    (logged,) = trainer(callback, default_root_dir=tmp_path).validate(project, images(24), verbose=False)
    expected = evaluate_robustness(project, images(24), eps=0.1, steps=2, progress=False)
    assert callback.results == expected.results
    assert logged["robustness/bim/accuracy"] == pytest.approx(expected.results["bim"].accuracy)
    assert logged["robustness/bim/n"] == 24


def test_the_loop_and_the_function_write_the_same_files(tmp_path: Path) -> None:
    project, data = Project(), images(40)
    trainer(RobustnessEvaluation(steps=2), default_root_dir=tmp_path / "loop").test(project, data, verbose=False)
    report = evaluate_robustness(project, data, steps=2, progress=False)
    report.save(tmp_path / "function")
    for name in ("robustness.json", "robustness.npz"):
        assert (tmp_path / "loop" / "robustness" / "version_0" / name).read_bytes() == (
            tmp_path / "function" / name
        ).read_bytes()
    assert str(report).splitlines()[0].startswith("attack")
    assert len(str(report).splitlines()) == 1 + len(report.results) + 1
    assert str(report).splitlines()[-1] == "inputs: pixels, unconfirmed", "random numbers are no 8-bit images"


def test_every_result_carries_what_decided_it(tmp_path: Path) -> None:
    report = evaluate_robustness(
        Project(), images(24), attacks=["gaussian", "bim", "pgd_l2"], eps=[0.05, 0.1], steps=4, progress=False
    )
    report.save(tmp_path)
    document = json.loads((tmp_path / "robustness.json").read_text())
    settings = document["settings"]
    assert settings["precision"] == "fp32"
    assert settings["seed"] == 0
    assert settings["attacks"]["bim_eps0.1"] == {
        "norm": "linf", "eps": 0.1, "step_size": 0.025, "times_sqrt_d": False, "steps": 4, "random_start": False,
        "restarts": 1, "loss": "cross_entropy",
    }  # fmt: skip
    assert settings["attacks"]["gaussian"] == {"std": 0.05, "clip": True}
    rows = {row["attack"]: row for row in document["results"]}
    assert list(rows) == ["clean", "gaussian", "bim_eps0.05", "bim_eps0.1", "pgd_l2"]
    assert rows["bim_eps0.05"]["linf"] == pytest.approx(0.05, rel=1e-5)
    assert rows["pgd_l2"]["l2"] <= 0.5 * (1 + 1e-5)
    for row in rows.values():
        assert sum(n for _, n in row["by_class"].values()) == row["n"] == 24
        assert sum(hits for hits, _ in row["by_class"].values()) == row["correct"]


def test_several_loaders_have_files_and_keys_of_their_own(tmp_path: Path) -> None:
    callback, logger = RobustnessEvaluation(attacks=["gaussian"]), RecordLogger(str(tmp_path))
    trainer(callback, logger=logger).test(Validated(), [images(24), images(16)], verbose=False)
    assert {name: r.n for name, r in callback.results.items()} == {
        "clean/dataloader_0": 24, "gaussian/dataloader_0": 24, "clean/dataloader_1": 16, "gaussian/dataloader_1": 16,
    }  # fmt: skip
    rows = json.loads((logger.folder / "robustness.json").read_text())["results"]
    assert [row["attack"] for row in rows] == list(callback.results)
    for number, n in enumerate((24, 16)):
        decisions = load_decisions(logger.folder / f"robustness_dataloader_{number}.npz")
        assert decisions.attacks == ["clean", "gaussian"]
        assert len(decisions.of("gaussian").index) == n


@pytest.mark.parametrize("own", [TQDMProgressBar, RichProgressBar])
def test_a_bar_shows_the_attack_and_the_accuracy(own: Any, capsys: Any, tmp_path: Path) -> None:
    seen: list[str] = []

    class Watched(RobustnessEvaluation):
        def logits(self, pl_module: Any, images: torch.Tensor) -> torch.Tensor:
            bar = self._run.bars[0]
            if bar is not None:
                task = getattr(bar, "_task", None)
                seen.append(str(bar._bar) if task is None else bar._progress.tasks[task].description)
            return super().logits(pl_module, images)

    run = trainer(Watched(steps=2, batch_size=8), own(), enable_progress_bar=True, default_root_dir=tmp_path)
    run.test(Project(), images(24), verbose=False)
    assert any("bim" in line and "%" in line for line in seen)
    assert any("clean" in line for line in seen)


class Fails(builders.Noise):
    def perturb(self, batch: AttackBatch) -> torch.Tensor:
        torch.rand(3)
        raise RuntimeError("the attack has failed")


def state_of(project: Any) -> Any:
    modes = [module.training for module in project.modules()]
    tensors = [value.clone() for value in project.state_dict().values()]
    parameters = [(id(p), p.requires_grad, p.grad, "forward" in vars(p)) for p in project.parameters()]
    return modes, tensors, torch.get_rng_state(), parameters, [sorted(vars(m)) for m in project.modules()]


def same_state(first: Any, second: Any) -> None:
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert torch.equal(first[2], second[2])
    assert first[3:] == second[3:]


def test_an_attack_that_fails_leaves_everything_as_it_was(monkeypatch: Any) -> None:
    monkeypatch.setattr(builders, "Noise", Fails)
    project = Project()
    project.net[1].eval()
    before = state_of(project)
    with pytest.raises(RuntimeError, match="the attack has failed"):
        evaluate_robustness(project, images(16), attacks=["bim", "gaussian"], steps=1, progress=False)
    same_state(before, state_of(project))


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_an_evaluation_leaves_everything_as_it_was(semantics: Any) -> None:
    project = Project()
    project.net[1].train()
    before = state_of(project)
    attacks = ["gaussian", "bim", "pgd", "bim_l2", "pgd_l2"]
    evaluate_robustness(project, images(16), attacks=attacks, steps=2, semantics=semantics, progress=False)
    same_state(before, state_of(project))


def test_half_precision_is_said_and_decides_nearly_the_same() -> None:
    project, data = Project(), images(64)
    full, half = (evaluate_robustness(project, data, steps=2, autocast=a, progress=False) for a in (None, "bf16"))
    assert half.settings["precision"] == "bf16"
    assert not torch.equal(full.decisions.of("clean").loss, half.decisions.of("clean").loss)
    assert abs(full.results["clean"].correct - half.results["clean"].correct) <= 3


class Normalized(Dataset[Any]):
    """A data set that normalizes like torchvision's."""

    def __init__(self, transform: Any) -> None:
        self.transform, self.inner = transform, images(24).dataset

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        image, label = self.inner[index]
        return self.transform(image), label


def test_a_normalization_in_the_data_pipeline_is_found() -> None:
    from torchvision.transforms import Compose, Normalize, RandomInvert

    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    data = DataLoader(Normalized(Compose([RandomInvert(0.0), Normalize(mean, std)])), batch_size=8)
    project = Project()
    found = evaluate_robustness(project, data, steps=2, progress=False)
    declared = evaluate_robustness(project, data, mean=mean, std=std, steps=2, progress=False)
    assert found.settings["normalization"]["mean"] == pytest.approx(mean)
    assert found.settings["normalized_data"] is True
    assert found.results == declared.results


def test_longer_weights_change_nothing_in_the_control() -> None:
    project, data = Project(), images(40)
    project.train()
    for x, _ in data:
        project(x)  # nontrivial running statistics
    report = evaluate_robustness(project, data, eps=0.1, steps=3, rescale=8.0, attacks=["bim"], progress=False)
    assert list(report.results) == ["clean", "bim", "clean_rescaled", "bim_rescaled"]
    for name in ("clean", "bim"):
        assert report.results[name].correct == report.results[f"{name}_rescaled"].correct
    control = report.weights["rescaled"]
    assert control["norms"]
    for norms in control["norms"].values():
        assert norms["after"] == pytest.approx(8 * norms["before"], rel=1e-5)
    assert control["largest_logit_change"] < 1e-2
    effective = report.weights["effective_norms"]
    assert effective.keys() & control["norms"].keys()
    any_iterate = evaluate_robustness(
        project, data, eps=0.1, steps=3, rescale=8.0, attacks=["bim"], semantics="any", progress=False
    )
    assert any_iterate.results["bim"].correct == any_iterate.results["bim_rescaled"].correct


@pytest.mark.filterwarnings("ignore")  # ignore warnings of the compiler
def test_a_compiled_evaluation_decides_the_same() -> None:
    project, data = Project(), images(64)
    plain, compiled = (evaluate_robustness(project, data, steps=2, compile=c, progress=False) for c in (False, True))
    for name, result in plain.results.items():
        assert compiled.results[name].correct == result.correct
        assert compiled.results[name].loss == pytest.approx(result.loss, rel=1e-4)


@pytest.mark.parametrize("observed", [RobustnessEvaluation, ChannelEvaluation])
@pytest.mark.parametrize("logged", [False, True])
def test_with_remote_storage_files_are_written_to_the_current_folder(
    observed: type, logged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = CSVLogger(f"memory://{observed.__name__}/logs", name="run", version=3) if logged else False
    run = trainer(observed(), default_root_dir=f"memory://{observed.__name__}/runs", logger=logger)
    with pytest.warns(UserWarning, match=r"written to the current folder, not to memory://\w+/(runs|logs)"):
        run.test(Project(), images(8), verbose=False)
    (file,) = tmp_path.rglob("*.json")
    assert file.relative_to(tmp_path).parts[:2] == ("run", "version_3") if logged else (file.stem, "version_0")
    assert not list(tmp_path.glob("memory*")), "no folder has the name of a protocol"


def test_the_address_of_a_local_folder_is_that_folder(tmp_path: Path) -> None:
    assert local_folder(f"file://{tmp_path}") == tmp_path
    assert local_folder("runs") == Path("runs")


def test_remote_storage_beside_a_local_record_needs_no_other_folder(tmp_path: Path) -> None:
    logger = RecordLogger(str(tmp_path))
    run = trainer(RobustnessEvaluation(resume=False), default_root_dir="memory://bucket/runs", logger=logger)
    run.test(Project(), images(8), verbose=False)
    assert (Path(logger.log_dir) / "robustness.json").is_file()
