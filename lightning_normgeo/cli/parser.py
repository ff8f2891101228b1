"""Parser of Lightning's commands with one-line errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from lightning_normgeo.cli.error_messages import explain_mistake
from lightning_normgeo.errors import refused


class OneLineParser(LightningArgumentParser):
    """A parser that explains a mistake in one line, instead of two pages of usage.

    Attributes:
        given: Arguments of the command.
        commands: Parsers of all commands by name.
    """

    given: Sequence[str] = ()
    commands: Mapping[str, Any] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line about the mistake and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        command = next((word for word in self.given if word in self.commands), "")
        refused(explain_mistake(message, self.given, self.commands.get(command, self), command))
