"""Configurations that come with the package, which commands find by name from any folder."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_normgeo.errors import ConfigurationError, near_names, nearest_names

_ENDINGS = (".yaml", ".yml")
CONFIG_OPTIONS = ("-c", "--config")
"""Options that take a configuration."""
DEFAULTS = "defaults"
"""Name of the configuration that every command of the Trainer reads first."""


def configs_folder() -> Path:
    """Return the folder of the configurations, inside an installed package or next to it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the files of the configurations by name, the relative path without its suffix, such as ``norm/gn_wd``."""
    folder = configs_folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.relative_to(folder).parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def title_of(config: Path) -> str:
    """Return the title of a configuration, the first sentence of the comment on its first line."""
    line = config.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    sentence = re.split(r"\. (?=[A-Z])", line)[0]  # "et al. 2020" does not end a sentence
    return sentence.rstrip(".:")


def find_config(given: str, option: str = "--config", folder: Path | None = None) -> str:
    """Return the path of a configuration.

    Args:
        given: path of a file, or the name of a configuration that comes with the package: ``norm/gn_wd``, its last part
            ``gn_wd`` if that is unique, or ``configs/norm/gn_wd.yaml`` as in a checkout.
        option: name of the option, for the message.
        folder: the folder that a path is relative to. Default: the working directory.

    Raises:
        ConfigurationError: if there is no such file or configuration; the message lists similar names.
    """
    path = given if folder is None else str(folder / given)
    if Path(path).is_file():
        return path
    known = shipped_configs()
    name = Path(given).with_suffix("") if given.endswith(_ENDINGS) else Path(given)
    asked = name.as_posix().removeprefix("./").removeprefix("configs/")
    alike = [asked] if asked in known else [one for one in known if one.rpartition("/")[2] == asked]
    if len(alike) == 1:
        return str(known[alike[0]])
    what = "is a folder" if Path(path).is_dir() else "does not exist"
    nearest = alike or near_names(asked, known)
    hint = f"Nearest: {nearest_names(asked, nearest)}; normgeo" if nearest else "normgeo"
    raise ConfigurationError(
        f"{option} {path} {what}, and no configuration that comes with the package has this name. "
        f"{hint} configs lists all {len(known)}."
    )


def with_config_paths(arguments: list[str]) -> list[str]:
    """Replace the names of configurations in the arguments of a command by their paths.

    Args:
        arguments: the words after the command.

    Raises:
        ConfigurationError: if there is no such configuration, see :func:`find_config`.
    """
    found, is_config = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if is_config and not is_inline(argument):
            argument = find_config(argument)
        elif equals and option in CONFIG_OPTIONS and not is_inline(value):
            argument = f"{option}={find_config(value)}"
        is_config = argument in CONFIG_OPTIONS
        found.append(argument)
    return found


def is_inline(value: str) -> bool:
    """Whether a value is no path or name, but the text of a configuration (YAML, JSON) or ``-`` for standard input."""
    return value == "-" or "\n" in value or ": " in value or value.startswith("{")
