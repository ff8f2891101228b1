"""Settings of an evaluation with masked channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_normgeo.channels.criteria import CRITERIA, DEFAULT, MERGED
from lightning_normgeo.channels.masked_model import REPLACEMENTS
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.utilities.checked_values import entry_of, flag, numbers_of, short_repr, strings, whole


@dataclass(frozen=True)
class MaskingSettings:
    """Settings of an evaluation with masked channels.

    Attributes:
        ratios: shares of the candidates to remove, in (0, 1).
        criteria: names of criteria.
        replace: names of replacements.
        seed: of the random control.
        streams: whether channels of residual streams are candidates, each layer's by themselves.
    """

    ratios: tuple[float, ...]
    criteria: tuple[str, ...]
    replace: tuple[str, ...]
    seed: int
    streams: bool

    @classmethod
    def checked(
        cls,
        ratios: Any,
        criteria: Any = None,
        replace: Any = ("zero", "mean"),
        seed: Any = 0,
        streams: Any = True,
    ) -> MaskingSettings:
        """Return the settings, in the order given and each once.

        Args:
            ratios: one or several numbers in (0, 1).
            criteria: one or several names. Default: :data:`.criteria.DEFAULT`.
            replace: one or several names.
            seed: an integer, at least 0.
            streams: True or False.

        Raises:
            ConfigurationError: for a ratio out of range, an unknown name, an empty list, or a replacement that no
                criterion has.
        """
        shares = numbers_of("ratios", ratios, "a number between 0 and 1, or a list of these") or ()
        wrong = [ratio for ratio in shares if not 0 < ratio < 1]
        if wrong or not shares:
            raise ConfigurationError(
                f"ratios={short_repr(wrong or ratios)} must be shares of channels to remove, between 0 and 1, as "
                "[0.1, 0.3, 0.5]."
            )
        names = list(DEFAULT) if criteria is None else strings("criteria", criteria, "a criterion such as 'gamma'")
        replacements = strings("replace", replace, "a replacement such as 'zero'")
        _check_names("criteria", names, CRITERIA)
        _check_names("replace", replacements, REPLACEMENTS)
        if replacements == ["partner"] and not set(names) & set(MERGED):
            raise ConfigurationError(
                f"replace='partner' is possible for the criteria {' and '.join(map(repr, MERGED))} only, and criteria="
                f"{short_repr(names)} has none of them. Add one, or replace by 'zero' or 'mean'."
            )
        whole("seed", seed, 0)
        return cls(_once(shares), _once(names), _once(replacements), int(seed), flag("streams", streams))

    def conditions(self) -> list[tuple[str, float, str]]:
        """Return all combinations of criterion, ratio and replacement that are evaluated."""
        return [
            (criterion, ratio, replacement)
            for criterion in self.criteria
            for replacement in self.replace
            for ratio in sorted(self.ratios)
            if replacement != "partner" or criterion in MERGED
        ]

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _check_names(option: str, names: Sequence[str], known: dict[str, str]) -> None:
    if not names:
        raise ConfigurationError(f"{option}=[] names nothing to evaluate; leave it out, or choose of {list(known)}.")
    for name in names:
        entry_of(option, name, known, known)


def _once(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
