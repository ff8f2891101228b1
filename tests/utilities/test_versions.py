"""Packages that are too old are refused before they are imported, and only those."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_normgeo.__main__ import main
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities import versions
from lightning_normgeo.utilities.versions import OutdatedError, require
from support.isolation import REPOSITORY

Install = Callable[..., None]
NEEDED = [
    "torch>=2.6",
    "pytorch-lightning!=2.6.2,!=2.6.3,>=2.6",
    "wandb>=0.19.6",
    'torchattacks<3.4,>=3.3; extra == "torchattacks"',
]


def write_metadata(folder: Path, name: str, version: str, requires: list[str] | None = None) -> None:
    place = folder / f"{name.replace('-', '_')}-{version or 'none'}.dist-info"
    place.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}"]
    lines += [f"Version: {version}"] if version else []
    lines += [f"Requires-Dist: {one}" for one in requires or []]
    if version != "torn":
        (place / "METADATA").write_text("\n".join(lines))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Create metadata as if this package and the given ones were installed, and no others."""
    folder = tmp_path / "site-packages"
    write_metadata(folder, "lightning-normgeo", "0.1.0", NEEDED)

    def install(**found: str | list[str]) -> None:
        for name, all_of_it in found.items():
            for version in [all_of_it] if isinstance(all_of_it, str) else all_of_it:
                write_metadata(folder, name.replace("_", "-"), version)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [str(folder)])
        versions._bounds.cache_clear()
        yield install
    versions._bounds.cache_clear()


def test_the_error_names_what_is_there_what_is_needed_and_the_command(install: Install) -> None:
    install(torch="2.4.1+cpu", pytorch_lightning="2.6.1", wandb="0.19.0")
    with pytest.raises(ImportError) as refused:
        require()
    assert str(refused.value) == (
        "lightning_normgeo needs torch>=2.6 (2.4.1+cpu is installed) and wandb>=0.19.6 (0.19.0 is installed). "
        'Run: pip install --upgrade "torch>=2.6" "wandb>=0.19.6"'
    )
    assert isinstance(refused.value, ConfigurationError), "one line in a shell"


def test_only_what_is_asked_for_is_looked_at(install: Install) -> None:
    install(torch="2.6.0", wandb="0.19.0")
    require("torch")
    with pytest.raises(OutdatedError, match="needs wandb"):
        require("torch", "wandb")


@pytest.mark.parametrize("version", ["2.5.1", "2.5.1+cu124", "2.5.0a0+git1", "2.6.2", "2.6.3", "1.9.5", "2.5.1.post1"])
def test_what_is_too_old_or_compromised_is_refused(version: str, install: Install) -> None:
    install(pytorch_lightning=version)
    with pytest.raises(OutdatedError, match=re.escape(f"({version} is installed)")):
        require("pytorch-lightning")


@pytest.mark.parametrize(
    "version",
    [
        "2.6.0",
        "2.6.0a0+git7cc0",
        "2.6.0.dev20241112+cu124",
        "2.6.0rc1",
        "2.7.0.dev1",
        "10.0",
        "v2.6",
        "3!1.0",
        "unknown",
    ],
)
def test_what_is_new_enough_passes_whatever_it_is_called(version: str, install: Install) -> None:
    install(torch=version)
    require("torch")


def test_later_builds_of_an_excluded_version_pass(install: Install) -> None:
    install(pytorch_lightning="2.6.2.post1")
    require("pytorch-lightning")


@pytest.mark.filterwarnings("ignore:Implicit None on return values is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "found", [["2.4.0", "2.6.1"], ["2.6.1", "2.4.0"], ["2.4.0", ""], ["2.4.0", "torn"], []], ids=str
)
def test_metadata_that_contradicts_itself_or_is_missing_stops_nobody(found: list[str], install: Install) -> None:
    install(torch=found)
    require("torch")


def test_extras_are_no_requirement(install: Install) -> None:
    install(torchattacks="3.5.1")
    require()


def test_a_bare_checkout_refuses_nothing(tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(torch="1.0")
    monkeypatch.setattr(versions, "_OURS", "not-installed")
    require()


@pytest.mark.parametrize("command", [["fit", "--help-all"], ["predict"], ["study", "any.yaml"]], ids=" ".join)
def test_the_command_line_refuses_in_one_line(
    command: list[str], install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(torch="2.4.1")
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "normgeo: error: lightning_normgeo needs torch>=2.6 (2.4.1 is installed). "
        'Run: pip install --upgrade "torch>=2.6"\n'
    )


@pytest.mark.parametrize("command", [[], ["--version"], ["fit", "--help"], ["configs"]], ids=" ".join)
def test_what_needs_no_torch_is_answered(command: list[str], install: Install) -> None:
    install(torch="2.4.1")
    main(command)


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("geometry", "torch"),
        ("normalization", "torch"),
        ("robustness", "torch"),
        ("probes", "torch"),
        ("callbacks", "torch"),
        ("data", "torch"),
        ("models", "torch"),
        ("_lightning", "pytorch-lightning"),
    ],
)
def test_every_part_looks_before_it_imports(module: str, needs: str) -> None:
    """In a process of its own, whose metadata has old versions of everything."""
    code = f"""
import sys
from importlib import metadata
metadata.distributions = lambda name: [type("Old", (), {{"version": "0.1"}})]
metadata.requires = lambda name: ["torch>=2.6", "pytorch-lightning>=2.6"]
import lightning_normgeo
try:
    import lightning_normgeo.{module}
except ImportError as error:
    print(error)
print([name for name in ("torch", "pytorch_lightning", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    error, imported = done.stdout.splitlines()
    assert error.startswith("lightning_normgeo needs ")
    assert f"{needs}>=" in error
    assert imported == "[]"


def test_what_is_asked_for_is_required() -> None:
    """A name that is not in pyproject.toml would never be checked."""
    asked = set()
    for file in (REPOSITORY / "lightning_normgeo").rglob("*.py"):
        for call in re.findall(r"^require\((.*)\)", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            asked.update(re.findall(r'"([^"]+)"', call))
    dependencies = (
        (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8").split("dependencies = [")[1].split("\n]")[0]
    )
    assert asked <= set(re.findall(r'^ *"([\w-]+)', dependencies, flags=re.MULTILINE))
    assert asked


def test_the_tests_of_other_versions_exist() -> None:
    """``.ci/versions`` runs the files of this list with the oldest and the newest packages."""
    files = (REPOSITORY / "tests" / "versions.txt").read_text(encoding="utf-8").split()
    assert files
    assert [file for file in files if not (REPOSITORY / file).is_file()] == []
