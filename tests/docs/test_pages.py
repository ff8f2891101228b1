"""The code, commands, pictures, keys and names of the documentation's pages match the package."""

from __future__ import annotations

import re
import shlex
import subprocess
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchvision
import yaml

import lightning_normgeo
from lightning_normgeo import RecordLogger, evaluate_robustness, read_record
from lightning_normgeo.__main__ import main
from lightning_normgeo.runs.quantities.table import QUANTITIES
from support.isolation import REPOSITORY
from support.pages import DOCS, PAGES, accept, blocks, commands, entries, generator, named, public_names, without_code
from support.projects import Project, images, sgd, trainer

PACKAGES = (
    "callbacks",
    "normalization",
    "robustness",
    "channels",
    "geometry",
    "probes",
    "models",
    "data",
    "report",
    "study",
    "cli",
)
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = sorted({line for page in PAGES for line in commands(page)})
NORMGEO = [line for line in COMMANDS if line.startswith("normgeo ")]
ANSWERED = [line for line in NORMGEO if shlex.split(line)[1] in ("configs", "--version")]
OPTION = "--print_config"
"""It prints and exits, which other tests check."""
FRAGMENTS = 2
"""Largest number of Python blocks that do not run."""
GEOMETRY = ("orthogonality", "orthogonality_control", "norm_growth", "norm_growth_control", "affine", "symmetry")
SECTIONS = (*GEOMETRY, "sphere", "batch_geometry", "effective", "robustness", "channels")
CONDITIONS = ("with weight decay", "with `cumulative=True`")
"""Conditions of quantities that hold in the run of these tests."""
SUFFIXES = ("_median", "_q90")
PARTS = (
    "orthogonality",
    "norm_growth",
    "affine_convergence",
    "symmetry",
    "sphere_projection",
    "effective_weights",
    "batch_geometry",
    "robustness",
    "channels",
)


def scope() -> dict[str, Any]:
    """Return the names that the pages take from the reader's project, all of them small."""
    network, loader = torchvision.models.resnet18(num_classes=4), images(4)

    def small_trainer(*, callbacks: Any, logger: Any) -> pl.Trainer:
        return trainer(*callbacks, logger=logger)

    record = RecordLogger("runs", version="before")
    record.log_metrics({"orthogonality/max_abs_cos": 1.0}, step=0)
    record.finalize("success")
    report = evaluate_robustness(network, loader, steps=1, progress=False)
    return {
        "Trainer": small_trainer,
        "RecordLogger": RecordLogger,
        "model": Project(sgd(weight_decay=0.01)),
        "network": network,
        "images": torch.rand(2, 3, 64, 64),
        "train_loader": images(),
        "test_loader": loader,
        "record": record,
        "folder": record.folder,
        "report": report,
        "other_report": report,
        "Lion": type("Lion", (torch.optim.Optimizer,), {}),
    }


@pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning")  # small, untrained models
@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_blocks_run(page: Path) -> None:
    """One after the other, as a reader would run them; each test is in a folder of its own."""
    names = scope()
    for block in blocks(page, "python"):
        if block.reason is None:
            exec(compile(block.code, str(page), "exec"), names)


def test_few_blocks_are_fragments() -> None:
    found = [block for page in PAGES for block in blocks(page, "python")]
    assert sum(block.reason is not None for block in found) <= FRAGMENTS
    assert len(found) > 10


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=named)
def test_shell_blocks_parse(page: Path) -> None:
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    for line in commands(page):
        for script in re.findall(r"python3? ((?:docs|benchmarks)/\S+\.py)", line):
            assert (REPOSITORY / script).is_file(), line


@pytest.mark.parametrize("command", [line for line in NORMGEO if line not in ANSWERED and OPTION not in line])
def test_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(command, monkeypatch)


@pytest.mark.parametrize("command", ANSWERED)
def test_commands_answer(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        main(shlex.split(command.partition(" > ")[0])[1:])
    assert capsys.readouterr().out


def test_configurations_of_the_pages_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    own, callbacks = (yaml.safe_load(block.code) for block in blocks(DOCS / "guides" / "configuration.md", "yaml"))
    assert callbacks == yaml.safe_load((REPOSITORY / "configs" / "callbacks.yaml").read_text())
    Path("own.yaml").write_text(yaml.safe_dump(own))
    accept("normgeo fit --config own.yaml", monkeypatch)


def test_the_key_table_is_complete() -> None:
    """Every key that a run logs is in the table, and every key of the table that such a run can have is logged."""
    names = lightning_normgeo
    monitors = [names.OrthogonalityMonitor(), names.NormGrowthMonitor(cumulative=True)]
    monitors += [names.AffineConvergenceMonitor(), names.SymmetryMonitor(), names.RobustnessEvaluation(steps=1)]
    monitors += [names.ChannelEvaluation(criteria="gamma", replace="zero"), names.SphereProjection()]
    monitors += [names.EffectiveWeightsSummary()]
    monitors.append(names.BatchGeometryMonitor())
    record = RecordLogger("runs")
    fitted = trainer(*monitors, logger=[record])
    fitted.fit(Project(sgd(weight_decay=0.01)), images())
    fitted.test(Project(sgd()), images(8), verbose=False)
    logged = {key for key in read_record(record.folder).metrics if key.split("/")[0] in SECTIONS}
    documented = re.findall(r"^\| `([^`]+/[^`]+)` \| ", (DOCS / "callbacks" / "keys.md").read_text(), re.MULTILINE)
    elsewhere = {key for key, one in QUANTITIES.items() if one.condition not in ("", *CONDITIONS)}
    patterns = [re.sub(r"\{\w+\}", "*", key) for key in documented]
    patterns += [key.replace("_mean", suffix) for key in patterns if key.endswith("_mean") for suffix in SUFFIXES]
    never = {key for key in patterns if not any(fnmatchcase(one, key) for one in logged)}
    assert never <= {key for other in elsewhere for key in (other, *(other.replace("_mean", s) for s in SUFFIXES))}
    patterns += [f"affine/{name}_channel/*" for name in ("abs_beta_minus_mu", "gamma2_over_sigma2")]
    for key in logged:
        assert any(fnmatchcase(one, p) for one in (key, key.rpartition("/")[0]) for p in patterns), key


def test_each_callback_has_its_part_of_the_key_table() -> None:
    pages = [DOCS / "callbacks" / f"{name}.md" for name in PARTS]
    rows = [set(re.findall(r"^\| `([^`]+/[^`]+)` \|", page.read_text(), re.MULTILINE)) for page in pages]
    assert set.union(*rows) == {key for key, quantity in QUANTITIES.items() if quantity.meaning}
    assert sum(map(len, rows)) == len(set.union(*rows))


def test_every_public_name_is_in_the_reference() -> None:
    found = entries()
    short = {path.rpartition(".")[2] for path in found}
    assert set(lightning_normgeo.__all__) - short == {"__version__"}
    for package in PACKAGES:
        names = public_names(f"lightning_normgeo.{package}")
        assert names
        missing = {name for name in names if f"lightning_normgeo.{package}.{name}" not in found}
        assert missing == set(), package
    index = (DOCS / "api" / "index.md").read_text()
    assert all(f"`{name}`" in index for name in lightning_normgeo.__all__)


def test_generated_pages_are_up_to_date() -> None:
    """The module is that of the test of configurations, which checks the other generated files, too."""
    files = generator().files()
    stale = [named(path) for path, text in files.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run docs/generate.py"
    assert {path for path in files if path.parent == DOCS / "api"} == set((DOCS / "api").glob("*.md"))


def test_the_formulas_cite_the_paper_alone() -> None:
    """Sections and equations of other publications are not the paper's, and names of code are no formulas."""
    text = (DOCS / "theory" / "formulas.md").read_text(encoding="utf-8")
    cited = {line.split("`")[1]: line.rpartition(" | ")[2] for line in text.splitlines() if line.startswith("| `")}
    assert set(re.findall(r"section ([\d.]+)", " ".join(cited.values()))) <= {"2.2", "2.3", "2.4", "2.5", "3.1", "3.2"}
    assert cited["geodesic_step"] == cited["largest_singular_value"] == " |"
    assert not re.search(r"\$[A-Z]\w+\$", text)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_pictures_exist_and_are_described(page: Path) -> None:
    for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", without_code(page)):
        assert (page.parent / target.partition("#")[0]).is_file(), target  # the theme's #only-light
        assert text.strip(), target


def test_every_picture_is_used() -> None:
    files = [*PAGES, REPOSITORY / "mkdocs.yml", REPOSITORY / "README.md"]
    text = "\n".join(file.read_text() for file in files)
    assert [picture.name for picture in (DOCS / "pictures").iterdir() if picture.name not in text] == []
