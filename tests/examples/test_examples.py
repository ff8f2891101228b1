"""Every script of ``examples`` runs in an empty folder, and prints values that satisfy the relations it is about."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_normgeo import read_record
from support.fork_server import ForkServer, lightning_server, torch_server
from support.isolation import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
NUMBER = r"([-+]?\d[\d.]*(?:e[-+]\d+)?)"


def output(script: str, *arguments: str, server: ForkServer) -> str:
    """Run a script in the folder of this test and return its standard output."""
    done = server.run(EXAMPLES / script, *arguments, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """Return the numbers in the one line that matches a pattern, in which # stands for a number."""
    match = re.search(pattern.replace("#", NUMBER), text)
    assert match, f"no {pattern!r} in {text}"
    return list(map(float, match.groups()))


def check_plain_lightning(script: str) -> None:
    text = output(script, server=lightning_server())
    cosine, control = numbers(r"max \|cos\|: # scale invariant, # control", text)
    assert cosine < 1e-2 < 0.1 < control
    measured, predicted = numbers(r"# measured, # predicted by eq 16", text)
    assert measured == pytest.approx(predicted, rel=0.05)
    clean, bim = numbers(r"accuracy: # clean, # under BIM", text)
    assert bim < clean
    assert clean > 0.9
    (folder,) = re.findall(r"^record: (\S+)$", text, re.MULTILINE)
    assert {"orthogonality", "norm_growth", "affine", "robustness"} <= {
        key.partition("/")[0] for key in read_record(folder).metrics
    }


def check_lightning_namespace(script: str) -> None:
    text = output(script, server=torch_server())
    assert "3 weights: 2 layer, 1 none" in text
    increment, *terms, explained = (
        numbers(rf"cumulative_{name} at step \d+: #", text)[0]
        for name in ("increment", "term_gradient", "term_momentum", "term_weight_decay", "term_quadratic", "explained")
    )
    assert sum(terms) == pytest.approx(explained, abs=1e-5)
    assert explained == pytest.approx(increment, rel=1e-4)
    assert terms[2] < 0 < terms[3]
    assert "eq 16 applies: False" in text
    (checkpoint,) = re.findall(r"^checkpoint: (\S+)$", text, re.MULTILINE)
    assert Path(checkpoint).is_file()


def check_lightning_cli(script: str) -> None:
    text = output(script, server=lightning_server())
    (callbacks,) = re.findall(r"^callbacks: (.*)$", text, re.MULTILINE)
    monitors = {"OrthogonalityMonitor", "NormGrowthMonitor", "AffineConvergenceMonitor", "RobustnessEvaluation"}
    assert {"LearningRateMonitor", *monitors} <= set(callbacks.split(", "))
    assert list(Path("logs").rglob("metrics.csv")), "the project's own logger is kept"
    _, cosine = numbers(r"scale-invariant +# +#", text)
    _, control = numbers(r"of the other weights +# +#", text)
    assert cosine < 1e-2 < 0.1 < control
    accuracies = [numbers(rf" {name} +# %", text)[0] for name in ("clean", r"bim, ε = 0\.01", r"bim, ε = 0\.03")]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 90 > 60 > accuracies[2]
    without = output(script, "fit", f"--config={EXAMPLES / 'lightning_cli/config.yaml'}", server=lightning_server())
    assert "Monitor" in without
    assert not any(name in without for name in monitors), "config.yaml alone is the project as it was"


def check_hydra_app(script: str) -> None:
    text = output(script, "--multirun", "norm=bn,gn", "trainer.max_epochs=1", server=lightning_server())
    for norm, kind in (("bn", "filter"), ("gn", "group")):
        cosine, clean, bim = numbers(
            rf"norm={norm}: {{'{kind}': 1, 'none': 1}}, max \|cos\| #, accuracy # clean, # under BIM", text
        )
        assert cosine < 1e-2
        assert bim < clean
    assert len(list(Path("multirun").rglob("record.jsonl"))) == 2


def check_bare_loop(script: str) -> None:
    names = "[name for name in ('lightning', 'pytorch_lightning') if name in sys.modules]"
    run = Path("run.py")
    run.write_text(f"import runpy, sys; runpy.run_path({str(EXAMPLES / script)!r}); print('imported:', {names})")
    text = output(str(run.resolve()), server=torch_server())
    assert "imported: []" in text
    steps = re.findall(rf"step (\d+): max \|cos\| {NUMBER}, increment {NUMBER}, explained {NUMBER}", text)
    assert [int(step) for step, *_ in steps] == [20, 40, 60, 80, 100]
    for _, cosine, increment, explained in steps:
        assert float(cosine) < 1e-2
        assert float(increment) == pytest.approx(float(explained), abs=2e-6)
    (clean,), (bim,) = numbers(r"clean +# %", text), numbers(r"bim +# %", text)
    assert clean > 90
    assert bim < clean


CHECKS: dict[str, Callable[[str], None]] = {
    "plain_lightning.py": check_plain_lightning,
    "lightning_namespace.py": check_lightning_namespace,
    "lightning_cli/train.py": check_lightning_cli,
    "hydra_app/train.py": check_hydra_app,
    "bare_loop.py": check_bare_loop,
}


@pytest.mark.parametrize("script", CHECKS)
def test_example_prints_the_relations_it_is_about(script: str) -> None:
    CHECKS[script](script)


def test_no_example_is_without_a_test() -> None:
    assert set(CHECKS) == {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}


def test_the_table_lists_every_example() -> None:
    rows = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(CHECKS)
    assert all(name == target for name, target in rows)
