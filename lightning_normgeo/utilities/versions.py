"""Refusal of outdated dependencies before they are imported and fail with an obscure error.

The lowest versions are written in ``pyproject.toml`` only and read from the metadata of the installed package. In a
checkout that is not installed there is no metadata, and nothing is refused.
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
    """An installed package whose version cannot work."""


def require(*packages: str) -> None:
    """Raise an error if packages are installed in a version that cannot work.

    Cost: reads the metadata of each package, about a millisecond; imports only ``packaging``.

    Args:
        packages: names as in ``pyproject.toml``. Default: all dependencies of an installation without extras.

    Raises:
        OutdatedError: with the installed and the required versions and the command that updates them. Pre-releases and
            local versions (``2.6.0a0+git``) count as their release; a package without a readable version passes.
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
    """Return the required versions of each dependency of an installation without extras."""
    try:
        lines = metadata.requires(_OURS) or []
    except metadata.PackageNotFoundError:
        return {}
    from packaging.requirements import Requirement  # a dependency of this package, so it is installed

    requirements = [Requirement(line) for line in lines]
    plain = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return {one.name: one.specifier for one in plain}


def _versions(package: str) -> list[str]:
    """Return the versions in all metadata of a package: conda and pip may both have left some, perhaps damaged."""
    versions = []
    for found in metadata.distributions(name=package):
        try:
            versions.append(found.version)
        except Exception:  # the class of the error differs between versions of Python
            versions.append("unknown")
    return versions


def _suits(versions: list[str], needed: SpecifierSet) -> bool:
    """Whether any of the versions fulfills the requirement; True too if one is unreadable or there is none."""
    from packaging.version import InvalidVersion, Version

    try:
        found = [Version(version) for version in versions]
    except (InvalidVersion, TypeError):
        return True
    released = [Version(version.base_version) for version in found]  # 2.6.0a0+git was built from the code of 2.6.0
    return not found or any(needed.contains(version, prereleases=True) for version in found + released)
