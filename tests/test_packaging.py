"""The archives of a release are complete, and the wheel works where it is installed without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

from lightning_normgeo import __version__
from support.isolation import REPOSITORY

pytestmark = pytest.mark.slow


def files(*folders: str) -> set[str]:
    """Return the files in these folders that git does not ignore, relative to the root of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (REPOSITORY / name).exists()}


@dataclass
class Release:
    """The archives of a release.

    Attributes:
        wheel: path of the wheel.
        in_wheel: names of its files.
        in_source: names of the files of the source archive, without its outer folder.
    """

    wheel: Path
    in_wheel: set[str]
    in_source: set[str]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Build the source archive, and the wheel from it."""
    folder = tmp_path_factory.mktemp("release")
    build = [sys.executable, "-m", "build", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    assert source.name == f"lightning_normgeo-{__version__}.tar.gz"
    with tarfile.open(source) as archive:
        in_source = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return Release(wheel, set(zipfile.ZipFile(wheel).namelist()), in_source)


def test_the_wheel_has_the_package_and_its_data(release: Release) -> None:
    package = files("lightning_normgeo")
    configs = {f"lightning_normgeo/{name}" for name in files("configs")}
    assert {"lightning_normgeo/py.typed", "lightning_normgeo/report/formats/page.html.j2"} <= package
    metadata = {name for name in release.in_wheel if ".dist-info/" in name}
    assert release.in_wheel - metadata == package | configs | {"lightning_normgeo/CITATION.cff"}
    assert f"lightning_normgeo-{__version__}.dist-info/licenses/LICENSE" in metadata


def test_the_source_archive_has_the_repository(release: Release) -> None:
    assert release.in_source == files() | {"PKG-INFO"}


def test_the_metadata_are_those_of_a_release(release: Release) -> None:
    with zipfile.ZipFile(release.wheel) as archive:
        text = archive.read(f"lightning_normgeo-{__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert (metadata["Version"], metadata["License-Expression"]) == (__version__, "Apache-2.0")
    assert {line.partition(",")[0] for line in metadata.get_all("Project-URL")} == {
        *("Homepage", "Documentation", "Repository", "Changelog", "Issues")
    }


@pytest.fixture(scope="module")
def installed(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone in a new environment, which finds its dependencies here."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    packages = place / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    # a path in a .pth file: .pth files in there, such as that of an editable installation, are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--ignore-installed", str(release.wheel)], check=True)
    return place / "bin"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["normgeo"], "normgeo fit"),
        (["normgeo", "--version"], f"normgeo {__version__}"),
        (["normgeo", "configs"], "cifar10/resnet101_bn"),
        (["normgeo", "configs", "callbacks"], "lightning_normgeo.OrthogonalityMonitor"),
        (["python", "-c", "import lightning_normgeo; print(lightning_normgeo.__file__)"], "site-packages"),
        (["python", "-c", "import lightning_normgeo as ng; print(ng.NormGrowthMonitor())"], "NormGrowthMonitor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_installed_wheel_works_in_any_folder(installed: Path, command: list[str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = [str(installed / command[0]), *command[1:]]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert str(REPOSITORY) not in done.stdout + done.stderr
