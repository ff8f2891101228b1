"""Refusal of packages that are older than this one needs, before they are imported and fail somewhere inside.

The bounds stand in ``pyproject.toml`` alone and are read from the metadata of the installed package; a bare checkout
has none, and nothing is refused there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING

from lightning_normgeo.errors import ConfigurationError

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_OURS = "lightning-normgeo"


class OutdatedError(ImportError, ConfigurationError):
    """A package that is installed in a version that cannot work."""


def require(*packages: str) -> None:
    """Refuse packages that are installed in a version that cannot work.

    Cost: reads the metadata of each package, about a millisecond; nothing is imported but ``packaging``.

    Args:
        packages: as they are called in ``pyproject.toml``; all that a plain installation needs if left out.

    Raises:
        OutdatedError: with the versions found and needed and the command that mends it. A version at or above the bound
            passes whatever it is marked as (``2.6.0a0+git``), and so does a package that does not say its version.
    """
    needed = _bounds()
    found = {name: _versions(name) for name in packages or needed if name in needed}
    outdated = [name for name in found if not _suits(found[name], needed[name])]
    if outdated:
        wrong = " and ".join(f"{name}{needed[name]} ({found[name][0]} is installed)" for name in outdated)
        mend = " ".join(f'"{name}{needed[name]}"' for name in outdated)
        raise OutdatedError(f"lightning_normgeo needs {wrong}. Run: pip install --upgrade {mend}")


@functools.cache
def _bounds() -> Mapping[str, SpecifierSet]:
    """Return what a plain installation needs, without its extras."""
    try:
        lines = metadata.requires(_OURS) or []
    except metadata.PackageNotFoundError:
        return {}
    from packaging.requirements import Requirement  # there wherever we are installed

    requirements = [Requirement(line) for line in lines]
    plain = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return {one.name: one.specifier for one in plain}


def _versions(package: str) -> list[str]:
    """Return the versions of a package in all its metadata: conda's and pip's may lie side by side, some torn."""
    versions = []
    for found in metadata.distributions(name=package):
        try:
            versions.append(found.version)
        except Exception:  # differs between versions of Python
            versions.append("unknown")
    return versions


def _suits(versions: list[str], needed: SpecifierSet) -> bool:
    """Whether any version is as needed; so is one that cannot be read, and a package that is not there."""
    from packaging.version import InvalidVersion, Version

    try:
        found = [Version(version) for version in versions]
    except (InvalidVersion, TypeError):
        return True
    released = [Version(version.base_version) for version in found]  # 2.6.0a0+git is built from what became 2.6.0
    return not found or any(needed.contains(version, prereleases=True) for version in found + released)
