"""Check of the files of ``--config`` before the parser reads them, whose own errors do not name the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.terminal.shipped_configs import CONFIG_OPTIONS, is_inline

_KINDS = {type(None): "nothing", list: "a list", str: "a text"}


def check_config_files(arguments: Sequence[str]) -> None:
    """Check that every file of ``--config`` is YAML with settings by name.

    Args:
        arguments: Arguments of a command.

    Raises:
        ConfigurationError: For the first file that cannot be used, with the place of the mistake.
    """
    for file in _files(arguments):
        settings = _read(file)
        if not isinstance(settings, dict):
            held = _KINDS.get(type(settings), f"a {type(settings).__name__}")
            raise ConfigurationError(
                f"--config {file} has to hold settings by name, such as model: {{norm: gn}}, and holds {held}."
            )


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--config {file} is not text in UTF-8 ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise ConfigurationError(f"--config {file} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--config {file} is not YAML: {' '.join(str(error).split())}") from error


def _files(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the files of the arguments; text of a configuration in place of a file is the parser's own."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, _, value = argument.partition("=")
        given = argument if before in CONFIG_OPTIONS else value if option in CONFIG_OPTIONS else ""
        if given and not is_inline(given) and Path(given).is_file():
            yield Path(given)
