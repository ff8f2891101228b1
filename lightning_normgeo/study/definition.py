"""What a study runs: a grid of options over configurations of ``normgeo fit``, as one YAML file."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lightning_normgeo.errors import ConfigurationError

_SHORT = {"seed_everything": "seed"}
CONFIG = "config"
"""The option whose values are files, which go over those of the study."""
_NOT_OF_THE_RUN = ("wandb", "report")
"""Options that make no difference to what a run finds."""
_LONGEST_VALUE, _LONGEST_NAME = 48, 255


@dataclass(frozen=True)
class Study:
    """A grid: every combination of the values becomes one run of ``normgeo fit``.

    Attributes:
        name: of the study; its runs are ``<save_dir>/<name>/<run>``.
        grid: for each option its values. Options are those of ``normgeo fit``, with dots. The option ``config`` takes
            files, for values that change several options at once.
        configs: configuration files of ``normgeo fit`` that every run starts from, relative to the study's file.
        settings: options for every run, over those files.
        save_dir: where studies live.
    """

    name: str
    grid: dict[str, list[Any]]
    configs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    save_dir: str = "runs"

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.save_dir) / self.name

    @property
    def shared(self) -> list[str]:
        """The arguments that all runs have."""
        return [f"--{CONFIG}={path}" for path in self.configs] + arguments_of(self.settings)

    def runs(self) -> dict[str, dict[str, Any]]:
        """Return the runs: for each name the options that are its own; the last option varies fastest."""
        short = _short_names(list(self.grid))
        runs = {}
        for values in itertools.product(*self.grid.values()):
            options = dict(zip(self.grid, values, strict=True))
            runs[",".join(f"{short[option]}={_readable(value)}" for option, value in options.items())] = options
        return runs

    def digest(self, options: Mapping[str, Any]) -> str:
        """Return a number that changes with whatever the run with these options is told, files included."""
        files = [*self.configs, *([options[CONFIG]] if CONFIG in options else [])]
        settings = {key: value for key, value in self.settings.items() if key not in _NOT_OF_THE_RUN}
        told = [settings, dict(options), [_lines(Path(file)) for file in files]]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]


def load_study(path: str | Path) -> Study:
    """Read a study's file.

    Raises:
        ConfigurationError: if it is missing, is no study, or has options without values or with the same twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist. Give a study, such as configs/study/paper_small.yaml.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        study: Study = Study(**vars(parser.parse_path(path).clone()))
    except (ArgumentError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is not a study ({' '.join(str(error).split())}). It needs name and grid, and may have configs, "
            "settings, save_dir."
        ) from error
    _check_options(study, path)
    here = path.absolute().parent
    files = [_found(here, file) for file in study.configs]
    grid = {
        option: [_found(here, value) for value in values] if option == CONFIG else values
        for option, values in study.grid.items()
    }
    return Study(study.name, grid, files, study.settings, study.save_dir)


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """Return options as arguments of the command line; a file comes first, so that the others go over it."""
    ordered = sorted(options.items(), key=lambda entry: entry[0] != CONFIG)
    return [f"--{option}={_text(value)}" for option, value in ordered]


def _check_options(study: Study, path: Path) -> None:
    if not study.grid:
        raise ConfigurationError(f"{path}: the grid is empty. Give options with their values.")
    if not re.fullmatch(r"\w[\w.+-]*", study.name):
        raise ConfigurationError(f"{path}: name={study.name!r} has to be a folder's name: letters, digits, . + - _")
    for option in {*study.settings, *study.grid} & {"run", "ckpt_path"}:
        raise ConfigurationError(f"{path}: {option} is what the study itself gives each run; leave it out.")
    if CONFIG in study.settings:
        raise ConfigurationError(f"{path}: settings.{CONFIG} belongs into configs, which is a list of files.")
    for option, values in study.grid.items():
        if not values:
            raise ConfigurationError(f"{path}: grid.{option} has no values.")
        readable = [_readable(value) for value in values]
        twice = [_text(value) for value in values if readable.count(_readable(value)) > 1]
        if twice:
            raise ConfigurationError(f"{path}: grid.{option} has the values {', '.join(twice)}, which name one run.")
        if option in study.settings:
            raise ConfigurationError(f"{path}: {option} is in settings and in the grid; leave it to one of them.")
    longest = max(study.runs(), key=len)
    if len(longest.encode()) > _LONGEST_NAME:
        raise ConfigurationError(f"{path}: {longest} is too long for a folder. Put options into files, under {CONFIG}.")


def _found(folder: Path, file: Any) -> str:
    found = (folder / str(file)).resolve()
    if not found.is_file():
        raise ConfigurationError(f"{found} does not exist; files of a study are relative to the study's own.")
    try:
        return str(found.relative_to(Path.cwd()))  # short, and the same on every machine of a sweep
    except ValueError:
        return str(found)


def _lines(path: Path) -> list[str]:
    """Return the lines of a configuration without those of comments alone."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _short_names(options: Sequence[str]) -> dict[str, str]:
    """Return for each option its last parts, as many as it takes to tell them apart."""
    short: dict[str, str] = {}
    for option in options:
        parts = option.split(".")
        tails = [_SHORT.get(option, ""), *(".".join(parts[-k:]) for k in range(1, len(parts) + 1))]
        others = [f".{other}" for other in options if other != option]
        free = [tail for tail in tails if tail and not any(other.endswith(f".{tail}") for other in others)]
        short[option] = free[0] if free else option  # the end of another one
    return short


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _readable(value: Any) -> str:
    """Return a value as part of a folder's name."""
    text = Path(value).stem if isinstance(value, str) and value.endswith((".yaml", ".yml")) else _text(value)
    plain = re.sub(r"[^\w.+-]+", "_", text).strip("_")
    if len(plain) <= _LONGEST_VALUE:
        return plain
    return f"{plain[: _LONGEST_VALUE - 8]}-{hashlib.sha256(text.encode()).hexdigest()[:7]}"
