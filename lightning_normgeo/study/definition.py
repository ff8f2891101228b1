"""Definition of a study: a grid of options over configurations of ``normgeo fit``, read from one YAML file."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, get_loader

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.terminal.shipped_configs import find_config
from lightning_normgeo.utilities.files import user_path
from lightning_normgeo.utilities.notebook import summary

_SHORT = {"seed_everything": "seed"}
CONFIG = "config"
"""The option whose values are configuration files; these override the files of the study."""
_NOT_OF_THE_RUN = ("wandb", "report")
"""Options that do not influence the results of a run."""
_LONGEST_VALUE, _LONGEST_NAME = 48, 255
"""Characters of a value in the name of a run, and bytes of the whole name, which is that of a folder."""
_LONGEST_REASON = 300
"""Characters of a parser's message, which may have the whole file in it."""
_CLASS = re.compile(r'"class_path": "(?:[\w.]*\.)?(\w+)"(?:, "init_args":)?')
"""The class in a value, of which a short name keeps only the last part."""
_NOT_FINITE = {"Infinity": ".inf", "-Infinity": "-.inf", "NaN": ".nan"}
"""Numbers that JSON does not have: the texts that Python writes, and those that YAML reads."""
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|-?Infinity|NaN')
"""Such a number, or a text, which is matched so that nothing inside it is replaced."""
_Values = TypeVar("_Values")


@dataclass(frozen=True)
class Study:
    """A grid of runs: every combination of the values is one run of ``normgeo fit``.

    More specific settings override more general ones: first ``configs``, then ``settings``, then files in the grid, and
    last the other options of the grid.

    Attributes:
        name: Name of the study; its runs are written to ``<save_dir>/<name>/<run>``.
        grid: Values of each option. Options are those of ``normgeo fit``, with dots. The option ``config`` takes
            configurations as ``configs`` does, for values that change several options at once.
        configs: Configurations of ``normgeo fit`` for all runs: files, relative to the study's file, or names of those
            that come with the package, such as ``quickstart``.
        settings: Options for all runs.
        save_dir: Folder of all studies.
        keep_optimizer_states: Whether checkpoints of finished runs keep the states of optimizers and schedules. False
            halves them with momentum, and leaves a third with Adam. Tests and evaluations need the weights only; a
            training that is to continue from such a checkpoint needs all of it.
    """

    name: str
    grid: dict[str, list[Any]]
    configs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    save_dir: str = "runs"
    keep_optimizer_states: bool = False

    def __repr__(self) -> str:
        return summary("Study", [repr(self.name), f"{len(self.runs())} runs", f"grid {' × '.join(self.grid)}"])

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return user_path(self.save_dir) / self.name

    @property
    def shared(self) -> list[str]:
        """The arguments that all runs have in common."""
        return [f"--{CONFIG}={path}" for path in self.configs] + arguments_of(self.settings)

    def runs(self) -> dict[str, dict[str, Any]]:
        """Return the grid options of each run by the name of the run; the last option of the grid varies fastest."""
        short = _short_names(list(self.grid))
        runs = {}
        for values in itertools.product(*self.grid.values()):
            options = dict(zip(self.grid, values, strict=True))
            runs[",".join(f"{short[option]}={_readable(value)}" for option, value in options.items())] = options
        return runs

    def digest(self, options: Mapping[str, Any]) -> str:
        """Return a hash of everything that a run is told, by which a changed study is recognized.

        Args:
            options: Grid options of the run.

        Returns:
            12 hexadecimal digits, from the study's settings, the options, and the contents of all configuration files.

        Raises:
            OSError: If a file cannot be read.
        """
        files = list(self.configs)
        if CONFIG in options:
            files.append(options[CONFIG])
        settings = {key: value for key, value in self.settings.items() if key not in _NOT_OF_THE_RUN}
        # files count by their content, not their path
        own = {key: value for key, value in options.items() if key != CONFIG}
        told = [settings, own, [_lines(Path(file)) for file in files]]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]


def load_study(path: str | Path) -> Study:
    """Read the definition of a study.

    Args:
        path: YAML file of the study, or the name of a study that comes with the package, such as ``paper_small``.

    Raises:
        ConfigurationError: If the file or one of those it names is missing, it is not a study, an option has no values
            or equal ones, or an option is given twice or belongs elsewhere.
    """
    path = Path(find_config(str(path), "normgeo study"))
    study = _read(path)
    files = [_found(path, "configs", file) for file in study.configs]
    grid = {
        option: [_found(path, f"grid.{option}", value) for value in values] if option == CONFIG else values
        for option, values in study.grid.items()
    }
    study = replace(study, grid=grid, configs=files)
    _check_options(study, path)
    return study


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """Return options as arguments of the command line; a file comes first, so that the others override it."""
    return [f"--{option}={text_of(value)}" for option, value in files_first(options).items()]


def files_first(options: Mapping[str, _Values]) -> dict[str, _Values]:
    """Return options with ``config`` first, because later arguments of a command override earlier ones."""
    return dict(sorted(options.items(), key=lambda entry: entry[0] != CONFIG))


def text_of(value: Any) -> str:
    """Return the text of a value that the command line reads as this value."""
    if isinstance(value, str):
        return value
    return _JSON_TOKEN.sub(lambda token: _NOT_FINITE.get(token[0], token[0]), json.dumps(value, default=str))


def _read(path: Path) -> Study:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        study = Study(**vars(parser.parse_path(path).clone()))
    except (ArgumentError, TypeError) as error:
        reason = shorten(str(error), _LONGEST_REASON, placeholder=" …")
        raise ConfigurationError(
            f"{path} is not a study ({reason}). It needs name and grid, and may have configs, settings, save_dir, "
            "keep_optimizer_states."
        ) from error
    # the values as written: the parser would expand those with a class_path by all defaults of the class
    written = get_loader("yaml")(path.read_text(encoding="utf-8"))
    return replace(study, grid=written["grid"], settings=written.get("settings") or {})


def _check_options(study: Study, path: Path) -> None:
    """Raise a ConfigurationError for options that are reserved, given twice, or cannot name a run."""
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


def _found(study: Path, option: str, given: Any) -> str:
    """Return the path of a configuration: relative to the study's file, or one that comes with the package, by name.

    Raises:
        ConfigurationError: If there is no such file or configuration.
    """
    found = Path(find_config(str(given), f"{study}: {option}", study.absolute().parent)).resolve()
    try:
        return str(found.relative_to(Path.cwd()))  # short, and the same on every machine of a sweep
    except ValueError:
        return str(found)


def _lines(path: Path) -> list[str]:
    """Return the lines of a configuration, without empty ones and those that are only a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _short_names(options: Sequence[str]) -> dict[str, str]:
    """Return for each option the shortest end of its name that no other option has."""
    short: dict[str, str] = {}
    for option in options:
        parts = option.split(".")
        tails = [_SHORT.get(option, ""), *(".".join(parts[-k:]) for k in range(1, len(parts) + 1))]
        others = [f".{other}" for other in options if other != option]
        free = [tail for tail in tails if tail and not any(other.endswith(f".{tail}") for other in others)]
        short[option] = free[0] if free else option  # none is free if the whole name is the end of another
    return short


def _readable(value: Any) -> str:
    """Return a value as part of a folder's name; a long one is cut off and ends in a hash of the whole value."""
    text = Path(value).stem if isinstance(value, str) and value.endswith((".yaml", ".yml")) else text_of(value)
    plain = _plain(text)
    if len(plain) <= _LONGEST_VALUE:
        return plain
    short = _plain(_CLASS.sub(r"\1", text))  # the module of a class is less informative than its arguments
    return f"{short[: _LONGEST_VALUE - 8]}-{hashlib.sha256(text.encode()).hexdigest()[:7]}"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")
