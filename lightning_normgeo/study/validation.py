"""Finds what cannot work in a study before its first run, so that it does not turn up in the middle of the night."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch

from lightning_normgeo.cli import NormgeoCLI
from lightning_normgeo.errors import ConfigurationError, nearest_names
from lightning_normgeo.study.definition import Study, arguments_of


class Checker(NormgeoCLI):
    """The command line, stopped where it would parse."""

    def __init__(self) -> None:
        self._built: set[str] = set()
        super().__init__([])

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse nothing."""
        self.config = {"subcommand": None}

    def before_instantiate_classes(self) -> None:
        """Do nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def after_instantiate_classes(self) -> None:
        """Do nothing."""

    def _set_seed(self) -> None:
        pass

    def longer(self, option: str) -> list[str]:
        """Return the options of ``fit`` that begin like this one, if it is none itself."""
        known = [text.removeprefix("--") for text in self._parser("fit")._option_string_actions]
        return [] if option in known else [name for name in known if name.startswith(option)]

    def parse(self, args: list[str]) -> Any:
        """Parse a command and return its settings.

        Raises:
            ConfigurationError: if it cannot be parsed.
        """
        try:
            with redirect_stderr(StringIO()) as said:
                config = self._parsed(self.parser, args)
        except SystemExit as error:
            reason = said.getvalue().rpartition("error: ")[2]
            raise ConfigurationError(" ".join(reason.split())) from error
        return config[config.subcommand]

    def check(self, args: list[str]) -> Any:
        """Parse a command, build its model without memory for its weights, and return the settings.

        Raises:
            ConfigurationError: if either does not work.
        """
        settings = self.parse(args)
        model = settings.model.as_dict()
        if repr(model) not in self._built:
            self._built.add(repr(model))
            self._build(model)
        return settings

    def _build(self, model: dict[str, Any]) -> None:
        # a spectral normalization of a hundred layers takes seconds; what is refused of it does not depend on the depth
        for other in ({"norm": "bn", "groups": None}, {"arch": "resnet18"}):
            with torch.device("meta"):
                self._model_class(**{**model, **other})


def check(study: Study, name: str = "study") -> Any:
    """Check every option with every value once; return the settings of the first run.

    Args:
        study: what is checked.
        name: of the study in what is said about it.

    Raises:
        ConfigurationError: for the first value that cannot work, with the reason.
    """
    checker = Checker()
    for option in (*study.settings, *study.grid):
        if longer := checker.longer(option):  # argparse would take it, even beside the same option in full
            raise ConfigurationError(
                f"{name}: {option} is short for {nearest_names(option, longer)}; write it in full."
            )
    first = {option: values[0] for option, values in study.grid.items()}
    cases: list[tuple[str, dict[str, Any]]] = [(name, first)]
    for option, values in study.grid.items():
        cases += [(f"{name}: {option}={value}", {**first, option: value}) for value in values[1:]]
    found = []
    for label, options in cases:
        try:
            found.append(checker.check(["fit", *study.shared, *arguments_of(options)]))
        except ConfigurationError as error:
            raise ConfigurationError(f"{label}: {error}") from error
    return found[0]
