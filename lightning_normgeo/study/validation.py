"""Validation of a study before its first run, so that a wrong value does not stop it in the middle of the night."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from typing import Any

import torch

from lightning_normgeo.cli import NormgeoCLI
from lightning_normgeo.errors import ConfigurationError, nearest_names
from lightning_normgeo.study.definition import Study, arguments_of
from lightning_normgeo.study.run_sizes import RunSize, size_of


class Checker(NormgeoCLI):
    """The command line of ``normgeo fit`` as a checker: it parses arguments and builds models, but runs nothing."""

    def __init__(self) -> None:
        self._models: dict[str, Any] = {}
        super().__init__([])

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Skip the parsing in the constructor of LightningCLI."""
        self.config = {"subcommand": None}

    def before_instantiate_classes(self) -> None:
        """Do nothing."""

    def instantiate_classes(self) -> None:
        """Do nothing: no Trainer, data or model is built."""

    def after_instantiate_classes(self) -> None:
        """Do nothing."""

    def _set_seed(self) -> None:
        pass

    def longer(self, option: str) -> list[str]:
        """Return the options of ``fit`` that an unknown option abbreviates; none for an option that exists."""
        known = [text.removeprefix("--") for text in self._parser("fit")._option_string_actions]
        return [] if option in known else [name for name in known if name.startswith(option)]

    def parse(self, args: list[str]) -> Any:
        """Parse a command and return its settings.

        Raises:
            ConfigurationError: If the command cannot be parsed.
        """
        try:
            with redirect_stderr(StringIO()) as printed:
                config = self._parsed(self.parser, args)
        except SystemExit as error:
            reason = printed.getvalue().rpartition("error: ")[2]
            raise ConfigurationError(" ".join(reason.split())) from error
        return config[config.subcommand]

    def check(self, args: list[str]) -> Any:
        """Parse a command, build its model on torch's meta device, which needs no memory, and return the settings.

        Raises:
            ConfigurationError: If the command cannot be parsed, or its model, optimizer or schedule cannot be built.
        """
        settings = self.parse(args)
        # Two quick builds instead of one, as spectral normalization of a hundred layers takes seconds: the architecture
        # with batch normalization, and the normalization with few layers, on which its errors do not depend.
        for other in ({"norm": "bn", "groups": None}, {"arch": "resnet18"}):
            self.meta_model(**{**settings.model.as_dict(), **other})
        self._check_optimizer(settings.model.as_dict())
        return settings

    def _check_optimizer(self, settings: dict[str, Any]) -> None:
        """Refuse arguments of the optimizer and of the schedule that their classes refuse."""
        small = {**settings, "norm": "bn", "groups": None, "arch": "resnet18", "decayed": "all"}
        try:
            self.meta_model(**small).configure_optimizers()
        except ConfigurationError as error:
            # errors of other classes may be about the meta device
            if isinstance(error.__cause__, ValueError | TypeError | ArithmeticError):
                raise

    def meta_model(self, **settings: Any) -> Any:
        """Return a model on the meta device, from the settings of the model; the same one for the same settings."""
        key = repr(settings)
        if key not in self._models:
            with torch.device("meta"):
                self._models[key] = self._model_class(**settings)
        return self._models[key]


@dataclass(frozen=True)
class CheckedCase:
    """Settings of a run in which one option of the grid has another value than in the first run.

    Attributes:
        option: The option; empty for the first run.
        value: Its value.
        settings: The parsed settings.
        checker: Has built the models.
    """

    option: str
    value: Any
    settings: Any
    checker: Checker = field(repr=False)

    @cached_property
    def size(self) -> RunSize:
        """Size of the run."""
        return size_of(self.settings, self.checker.meta_model)


def checked_cases(study: Study, name: str = "study") -> list[CheckedCase]:
    """Check every option of a study with every value once, and return the settings, those of the first run first.

    Cost: one parse for each value of the grid, and two small models for each different model setting.

    Args:
        study: Study to check.
        name: Name of the study in error messages.

    Raises:
        ConfigurationError: For the first value that cannot work, with the reason.
    """
    checker = Checker()
    for option in (*study.settings, *study.grid):
        if longer := checker.longer(option):  # argparse accepts abbreviations, even beside the full option
            raise ConfigurationError(
                f"{name}: {option} is short for {nearest_names(option, longer)}; write it in full."
            )
    first = {option: values[0] for option, values in study.grid.items()}
    cases = [("", None), *((option, value) for option, values in study.grid.items() for value in values[1:])]
    found = []
    for option, value in cases:
        options = {**first, option: value} if option else first
        try:
            settings = checker.check(["fit", *study.shared, *arguments_of(options)])
        except ConfigurationError as error:
            label = f"{name}: {option}={value}" if option else name
            raise ConfigurationError(f"{label}: {error}") from error
        found.append(CheckedCase(option, value, settings, checker))
    return found
