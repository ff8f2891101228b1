"""Architecture rules: imports run in one direction, and the small parts stay small."""

from __future__ import annotations

import ast
import functools
import re
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from support.fork_server import torch_server
from support.isolation import REPOSITORY

PACKAGE = REPOSITORY / "lightning_normgeo"
FILES = sorted(PACKAGE.rglob("*.py"))
LIMIT = 300
HEADLESS = re.compile(
    r"((return|yield|tell|say|note|read|find|keep|write|add|count|make|show|take) )?(what|which|who|whom|where|why)\b"
    r"|(how|when|whose)\b",
    re.IGNORECASE,
)

# small helpers that every part may use: errors, checked values, tables in notebooks
_WORDS = {"errors"} | {f"utilities.{name}" for name in ("plain_text", "versions", "checked_values", "notebook")}
_FILES = {"utilities.contained_files", "utilities.files", "utilities.spool"}
# for each part, the parts that it may import besides these; only parts listed above it
ALLOWED = {
    "_version": set(),
    "utilities.__init__": set(),
    "utilities.plain_text": set(),
    "errors": set(),
    "utilities.versions": set(),
    "utilities.checked_values": set(),
    "utilities.notebook": set(),
    "utilities.contained_files": set(),
    "utilities.files": set(),
    "utilities.spool": {"utilities.files"},
    "utilities.checkpoints": set(),
    "utilities.attack_names": set(),
    "utilities.collector": set(),
    "utilities.lazy_names": set(),
    "utilities.one_line_parser": set(),
    "utilities.tf32": set(),
    "_lightning": set(),
    "terminal": {"_version"},
    "geometry": set(),
    "normalization": {"geometry"},
    "symmetries": {"geometry", "normalization"},
    "robustness": {"geometry", "normalization", "symmetries", "utilities.attack_names", "utilities.lazy_names"}
    | {"utilities.tf32"}
    | _FILES,
    "probes": {"geometry", "normalization", "symmetries", "utilities.collector", "utilities.tf32"},
    "channels": {"geometry", "normalization", "symmetries", "robustness", "probes"} | _FILES,
    "runs": {"_lightning", "_version", "robustness", "utilities.attack_names"} | _FILES,
    "report": {"_version", "robustness", "runs", "utilities.attack_names", "utilities.one_line_parser"} | _FILES,
    "data": {"utilities.files"},
    "models": {"normalization", "symmetries"},
    "callbacks": {"_lightning", "channels", "geometry", "normalization", "probes", "robustness", "runs", "symmetries"}
    | {"utilities.attack_names", "utilities.collector"}
    | _FILES,
    "__init__": {"_version", "callbacks", "channels", "data", "models", "normalization", "probes", "robustness", "runs"}
    | {"symmetries", "utilities.lazy_names"},
    "cli": {"_lightning", "_version", "callbacks", "data", "models", "report", "runs", "terminal"}
    | {"utilities.checkpoints", "utilities.files", "utilities.one_line_parser"},
    "study": {"_version", "callbacks", "cli", "report", "runs", "terminal", "utilities.one_line_parser"} | _FILES,
    "__main__": {"_version", "cli", "report", "study", "terminal"},
}
# external packages that the parts without a Trainer may import
THIRD_PARTY = {
    "_version": set(),
    "utilities.plain_text": set(),
    "errors": {"lightning_utilities"},  # for the rank: a package of two dozen helpers, not Lightning
    "utilities.versions": {"packaging"},
    "utilities.checked_values": set(),
    "utilities.notebook": set(),  # pandas if it is installed and requested
    "utilities.contained_files": set(),
    "utilities.files": {"orjson"},  # only if it is installed
    "utilities.spool": set(),
    "utilities.checkpoints": {"torch"},
    "utilities.attack_names": set(),
    "utilities.collector": set(),
    "utilities.lazy_names": set(),
    "utilities.one_line_parser": {"jsonargparse"},
    "utilities.tf32": {"torch"},
    "terminal": set(),
    "geometry": {"numpy", "torch", "numba", "triton"},  # the last two only if they are installed
    "normalization": {"torch"},
    "symmetries": {"numpy", "scipy", "torch"},
    "robustness": {"torch", "numpy", "PIL", "torchvision", "tqdm"}
    | {"numba", "torchattacks"},  # the first only if it is installed, the second only on request
    "probes": {"numpy", "torch"},
    "channels": {"numpy", "torch", "tqdm"},
    "runs": {"filelock", "lightning_utilities", "numpy", "PIL", "pytorch_lightning", "rich", "torch"},
    "report": {"altair", "jinja2", "jsonargparse", "numpy", "PIL", "scipy", "vl_convert", "wandb", "wandb_workspaces"},
    "study": {"filelock", "jsonargparse", "rich", "torch", "yaml"},
}


UTILITIES = {name for name in ALLOWED if name.startswith("utilities.")}


def part(name: str) -> str:
    """Return the part of a dotted name below the package; each file of the utilities is a part of its own."""
    first, second = [*name.split("."), "__init__", "__init__"][1:3]
    return f"{first}.{second}" if first == "utilities" else first


def part_of(file: Path) -> str:
    return part(".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)))


@functools.cache
def imported(file: Path) -> set[str]:
    """Return the dotted names of all modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            inside = node.module == PACKAGE.name  # from lightning_normgeo import record
            names.update(f"{node.module}.{alias.name}" for alias in node.names) if inside else names.add(node.module)
    return names


def named(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_every_part_has_its_place() -> None:
    assert {part_of(file) for file in FILES} == set(ALLOWED)
    parts = list(ALLOWED)
    for i, name in enumerate(parts):
        assert ALLOWED[name] <= set(parts[:i]), f"{name} is allowed to import what stands above it"


@pytest.mark.parametrize("file", FILES, ids=named)
def test_imports_run_one_way(file: Path) -> None:
    inside = {part(name) for name in imported(file) if name.split(".")[0] == PACKAGE.name}
    own = part_of(file)
    parts = list(ALLOWED)
    words = {name for name in _WORDS if parts.index(name) < parts.index(own)}
    assert inside - {own} <= ALLOWED[own] | words


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file) in THIRD_PARTY], ids=named)
def test_foundations_need_little(file: Path) -> None:
    outside = {name.split(".")[0] for name in imported(file)} - {PACKAGE.name} - sys.stdlib_module_names
    assert outside <= THIRD_PARTY[part_of(file)]


@pytest.mark.parametrize("file", FILES, ids=named)
def test_wandb_is_imported_where_reports_are_read_and_published_only(file: Path) -> None:
    allowed = {"downloaded_records.py", "publishing.py"} if part_of(file) == "report" else set()
    assert file.name in allowed or not any(name.split(".")[0] == "wandb" for name in imported(file))


@pytest.mark.parametrize("file", FILES, ids=named)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LIMIT


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lightning_normgeo", ["torch", "pytorch_lightning", "lightning", "numpy"]),
        ("lightning_normgeo.geometry", ["pytorch_lightning", "lightning", "wandb", "numba", "triton"]),
        ("lightning_normgeo.normalization", ["pytorch_lightning", "lightning", "wandb"]),
        ("lightning_normgeo.robustness", ["pytorch_lightning", "lightning", "wandb", "numba"]),
        ("lightning_normgeo.probes", ["pytorch_lightning", "lightning", "wandb"]),
        ("lightning_normgeo.runs.records.record_reader", ["torch", "pytorch_lightning", "lightning", "numpy"]),
        ("lightning_normgeo.__main__", ["torch", "pytorch_lightning", "lightning", "numpy"]),
        ("lightning_normgeo.report.report_command", ["altair", "torch", "wandb"]),
        ("lightning_normgeo.report.write", ["torch", "pytorch_lightning", "lightning", "wandb"]),
    ],
)
def test_import_is_light(module: str, absent: list[str], tmp_path: Path) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    script = tmp_path / "imports.py"
    script.write_text(code)
    if "torch" in absent:
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    else:
        done = torch_server().run(script)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_picture_shows_the_imports() -> None:
    script = runpy.run_path(str(REPOSITORY / "docs" / "architecture.py"))
    assert script["PICTURE"].read_text(encoding="utf-8") == script["svg"](), "run docs/architecture.py"
    assert set(script["PARTS"]) == {part_of(file) for file in FILES if file.parent != PACKAGE} - UTILITIES


def test_docstrings_name_what_they_are_about() -> None:
    """A summary begins with a noun or a verb, never with "what", "which" or "return what"."""
    headless = [
        f"{named(file)}: {text.splitlines()[0]}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (text := ast.get_docstring(node))
        and HEADLESS.match(text)
    ]
    assert headless == []


def test_imports_have_no_circle() -> None:
    """This includes imports inside functions and for types."""
    modules = {".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in FILES}
    edges = {}
    for name, file in modules.items():
        if file.name != "__init__.py":
            edges[name] = {other for other in imported(file) if other in modules and other != name}
    TopologicalSorter(edges).prepare()


def test_public_names() -> None:
    import lightning_normgeo

    assert all(getattr(lightning_normgeo, name) is not None for name in lightning_normgeo.__all__)
    assert dir(lightning_normgeo) == sorted(lightning_normgeo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Monitor'"):
        _ = lightning_normgeo.Monitor  # type: ignore[attr-defined]


def test_the_page_on_the_architecture_names_what_exists() -> None:
    page = (REPOSITORY / "docs" / "reference" / "architecture.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page))
    assert len(paths) > 40
    roots = [PACKAGE, REPOSITORY, *PACKAGE.iterdir()]
    missing = {path for path in paths if not any((root / path).exists() for root in roots)}
    assert not missing
