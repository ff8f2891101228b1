"""What a study runs: a grid of options over configurations of ``normgeo fit``, as one YAML file."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, get_loader

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.terminal.shipped_configs import find_config
from lightning_normgeo.utilities.notebook import summary

_SHORT = {"seed_everything": "seed"}
CONFIG = "config"
"""The option whose values are files, which go over those of the study."""
_NOT_OF_THE_RUN = ("wandb", "report")
"""Options that make no difference to what a run finds."""
_LONGEST_VALUE, _LONGEST_NAME = 48, 255
_CLASS = re.compile(r'"class_path": "(?:[\w.]*\.)?(\w+)"(?:, "init_args":)?')
_NOT_FINITE = {"Infinity": ".inf", "-Infinity": "-.inf", "NaN": ".nan"}
"""Numbers that JSON has no text for: what Python writes, and what YAML reads."""
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|-?Infinity|NaN')
_Values = TypeVar("_Values")


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

    def __repr__(self) -> str:
        return summary("Study", [repr(self.name), f"{len(self.runs())} runs", f"grid {' × '.join(self.grid)}"])

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
        own = {key: value for key, value in options.items() if key != CONFIG}  # files count for what is in them
        told = [settings, own, [_lines(Path(file)) for file in files]]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]


def load_study(path: str | Path) -> Study:
    """Read a study's file.

    Args:
        path: of the file, or the name of a study that comes with the package: ``paper_small``.

    Raises:
        ConfigurationError: if it is missing, is no study, or has options without values or with the same twice.
    """
    path = Path(find_config(str(path), "normgeo study"))
    study = _read(path)
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
    return [f"--{option}={text_of(value)}" for option, value in files_first(options).items()]


def files_first(options: Mapping[str, _Values]) -> dict[str, _Values]:
    """Return options in the order in which a command needs them."""
    return dict(sorted(options.items(), key=lambda entry: entry[0] != CONFIG))


def text_of(value: Any) -> str:
    """Return a value as the command line reads it."""
    if isinstance(value, str):
        return value
    return _JSON_TOKEN.sub(lambda token: _NOT_FINITE.get(token[0], token[0]), json.dumps(value, default=str))


def _read(path: Path) -> Study:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        study = Study(**vars(parser.parse_path(path).clone()))
    except (ArgumentError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is not a study ({' '.join(str(error).split())}). It needs name and grid, and may have configs, "
            "settings, save_dir."
        ) from error
    # the values as they are written: the parser takes those with a class_path for its own, and fills in all defaults
    written = get_loader("yaml")(path.read_text(encoding="utf-8"))
    return replace(study, grid=written["grid"], settings=written.get("settings") or {})


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
        twice = [text_of(value) for value in values if readable.count(_readable(value)) > 1]
        if twice:
            raise ConfigurationError(f"{path}: grid.{option} has the values {', '.join(twice)}, which name one run.")
    for one, other in itertools.combinations([*study.settings, *study.grid], 2):
        if one == other:
            raise ConfigurationError(f"{path}: {one} is in settings and in the grid; leave it to one of them.")
        if one.replace(".init_args", "") == other.replace(".init_args", ""):
            raise ConfigurationError(f"{path}: {one} and {other} are the same option; leave one of them out.")
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


def _readable(value: Any) -> str:
    """Return a value as part of a folder's name."""
    text = Path(value).stem if isinstance(value, str) and value.endswith((".yaml", ".yml")) else text_of(value)
    plain = _plain(text)
    if len(plain) <= _LONGEST_VALUE:
        return plain
    short = _plain(_CLASS.sub(r"\1", text))  # where a class comes from says less of it than its arguments
    return f"{short[: _LONGEST_VALUE - 8]}-{hashlib.sha256(text.encode()).hexdigest()[:7]}"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")
