"""A killed evaluation resumes where it was, and writes the same files."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_normgeo import RobustnessEvaluation
from lightning_normgeo.errors import MeasurementWarning
from lightning_normgeo.robustness import SampleResults, evaluate_robustness, load_decisions
from lightning_normgeo.robustness.attacks import builders
from lightning_normgeo.robustness.results.samples import journal
from support.fork_server import lightning_server
from support.isolation import SUPPORT
from support.projects import Project, images, trainer

SCRIPT = SUPPORT / "killed_robustness.py"
evaluate = partial(evaluate_robustness, progress=False, batch_size=8)
FILES = ("robustness.json", "robustness.npz")
FOLDER = Path("robustness", "version_0")


def run(folder: Path, calls: int, semantics: str) -> subprocess.CompletedProcess[str]:
    return lightning_server().run(SCRIPT, str(folder), str(calls), semantics)


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_a_killed_evaluation_goes_on(tmp_path: Path, semantics: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(whole, -1, semantics)
    assert done.returncode == 0, done.stderr[-2000:]
    cost = json.loads(done.stdout.splitlines()[-1])
    assert run(killed, 2 * cost["calls"] // 3, semantics).returncode == -9
    (journal,) = killed.glob("robustness-*.jsonl")
    with journal.open("a") as file:
        file.write('{"attack": "bim", "ind')  # a half-written line
    again = run(killed, -1, semantics)
    assert again.returncode == 0, again.stderr[-2000:]
    assert 0 < json.loads(again.stdout.splitlines()[-1])["images"] < 0.7 * cost["images"], "not all is done again"
    if semantics == "final":
        for name in FILES:
            assert (whole / FOLDER / name).read_bytes() == (killed / FOLDER / name).read_bytes(), name
    else:  # batches are filled up with other samples, which changes rounding
        same_decisions(load_decisions(whole / FOLDER / FILES[1]), load_decisions(killed / FOLDER / FILES[1]))
    assert not list(killed.glob("robustness-*.jsonl"))


def same_decisions(first: SampleResults, second: SampleResults) -> None:
    assert first.attacks == second.attacks
    for attack in first.attacks:
        one, other = first.of(attack), second.of(attack)
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.prediction, other.prediction)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-6)


class BrokenOffError(RuntimeError):
    pass


def broken_after(calls: int, project: Any) -> Any:
    counted = iter(range(calls))

    def logits(x: torch.Tensor) -> torch.Tensor:
        if next(counted, None) is None:
            raise BrokenOffError
        return project(x)  # type: ignore[no-any-return]

    return logits


def test_only_the_same_evaluation_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, data = Project(), images(40)
    with pytest.raises(BrokenOffError):
        evaluate(project, data, logits=broken_after(20, project), resume_dir=tmp_path, steps=5)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    for change in ({"seed": 1}, {"steps": 4}, {"attacks": ["bim"]}):
        other = evaluate(project, data, resume_dir=tmp_path, **{"steps": 5, **change})
        assert other.results == evaluate(project, data, **{"steps": 5, **change}).results
        assert len(list(tmp_path.glob("*.jsonl"))) == 1, "the journal of another evaluation is left alone"
    with monkeypatch.context() as patch:
        patch.setattr(journal, "DRAWS", journal.DRAWS + 1)
        evaluate(project, data, resume_dir=tmp_path, steps=5)
        assert len(list(tmp_path.glob("*.jsonl"))) == 1, "these are other random numbers"
    with torch.no_grad():
        next(project.parameters()).add_(1e-3)
    evaluate(project, data, resume_dir=tmp_path, steps=5)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1, "these are other weights"


def test_resuming_without_lightning(tmp_path: Path) -> None:
    project, data = Project(), images(40)
    expected = evaluate(project, data, steps=5)
    with pytest.raises(BrokenOffError):
        evaluate(project, data, logits=broken_after(20, project), resume_dir=tmp_path, steps=5)
    found = evaluate(project, data, resume_dir=tmp_path, steps=5)
    assert found.results == expected.results
    assert json.dumps(found.as_dict()) == json.dumps(expected.as_dict())


def test_a_folder_that_cannot_be_written_does_not_stop_the_evaluation(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(MeasurementWarning, match=r"cannot be resumed: .*cannot be written \(Not a dir") as said:
        report = evaluate(Project(), images(16), resume_dir=blocked / "folder", steps=1)
    assert report.results["clean"].n == 16
    assert len(said) == 1


def test_a_trainer_leaves_its_journal_only_where_it_was_interrupted(tmp_path: Path) -> None:
    class Broken(RobustnessEvaluation):
        def logits(self, pl_module: Any, images: torch.Tensor) -> torch.Tensor:
            if self._run.evaluations[0].seen._seen >= 24:
                raise BrokenOffError
            return super().logits(pl_module, images)

    project, data = Project(), images(40)
    with pytest.raises(BrokenOffError):
        trainer(Broken(steps=2, batch_size=8, on_unsuitable="raise"), default_root_dir=tmp_path).test(
            project, data, verbose=False
        )
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    callback = RobustnessEvaluation(steps=2, batch_size=8)
    trainer(callback, default_root_dir=tmp_path).test(project, data, verbose=False)
    assert not list(tmp_path.glob("*.jsonl"))
    assert callback.results == evaluate(project, data, steps=2).results
    off = tmp_path / "off"
    with pytest.raises(BrokenOffError):
        trainer(Broken(steps=2, batch_size=8, resume=False, on_unsuitable="raise"), default_root_dir=off).test(
            project, data, verbose=False
        )
    assert not list(off.glob("*.jsonl"))


@pytest.mark.parametrize("semantics", ["final", "any"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_attacks_resume_with_the_random_numbers_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, semantics: Any, share: float
) -> None:
    """Also those of torchattacks, and of a suite, which passes samples on from one attack to the next."""
    project, data = Project(), images(60, batch_size=7)
    attacks = [
        *("gaussian", "bim", "torchattacks.Square", "pgd", "standard"),
        {"name": "square", "queries": 8},
        {"name": "apgd", "steps": 3, "loss": "dlr", "restarts": 2},
    ]
    for name, few in (("_STEPS", 3), ("_QUERIES", 8), ("_TARGETS", 2)):
        monkeypatch.setattr(builders, name, few)
    settings: dict[str, Any] = {
        "attacks": attacks, "eps": 0.1, "steps": 3, "semantics": semantics, "batch_size": 8,
        "attack_options": {"torchattacks.Square": {"n_queries": 8, "eps": 0.1}},
    }  # fmt: skip
    whole: list[int] = []
    seen: list[int] = []

    def counted(sizes: list[int]) -> Any:
        return lambda x: sizes.append(len(x)) or project(x)

    expected = evaluate_robustness(project, data, progress=False, logits=counted(whole), **settings)
    broken = broken_after(int(share * len(whole)), project)
    with pytest.raises(BrokenOffError):
        evaluate_robustness(project, data, progress=False, logits=broken, resume_dir=tmp_path, **settings)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    found = evaluate_robustness(project, data, progress=False, logits=counted(seen), resume_dir=tmp_path, **settings)
    for attack in expected.decisions.attacks:
        one, other = expected.decisions.of(attack), found.decisions.of(attack)
        assert torch.equal(one.sample, other.sample)
        assert torch.equal(one.prediction, other.prediction), attack
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-6)
    assert sum(seen) < sum(whole), "not all is done again"


@pytest.mark.parametrize("semantics", ["final", "any"])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_pictures_are_those_of_an_evaluation_that_nobody_stopped(tmp_path: Path, semantics: Any, share: float) -> None:
    """A journal has only per-sample results, so example images are attacked once more."""
    project, data = Project(), images(40)
    calls: list[int] = []
    settings: dict[str, Any] = {"attacks": ["gaussian", "bim", "pgd"], "steps": 3, "semantics": semantics}

    def counted(x: torch.Tensor) -> Any:
        calls.append(len(x))
        return project(x)

    whole = evaluate(project, data, logits=counted, num_images=6, **settings)
    broken = broken_after(int(share * len(calls)) - 1, project)
    with pytest.raises(BrokenOffError):
        evaluate(project, data, logits=broken, resume_dir=tmp_path, num_images=6, **settings)
    again = evaluate(project, data, resume_dir=tmp_path, num_images=6, **settings)
    assert again.results.keys() == whole.results.keys()
    assert again.shown.labels == whole.shown.labels
    assert again.shown.predictions == whole.shown.predictions
    for attack, pictures in whole.shown.pixels.items():
        for sample, picture in pictures.items():
            torch.testing.assert_close(again.shown.pixels[attack][sample], picture, rtol=0, atol=1e-6)
    if semantics == "final":
        assert json.dumps(again.as_dict()) == json.dumps(whole.as_dict())
