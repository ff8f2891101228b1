"""Quantity, one row of the table of logged quantities."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """One logged quantity.

    Attributes:
        key: Metric key ``{group}/{name}`` of the aggregate; with ``*`` or ``{layer}`` it covers several keys.
        unit: Unit of its values.
        meaning: One line for the key table; empty if a row with ``*`` covers the key.
        label: Name in the legends of figures.
        panel: Title of its panel at W&B. Default: the label.
        summary: Name in the summary of a run; empty if the summary does not show it.
        condition: Condition under which the key is logged. Default: in every run whose monitors measure it.
        in_wandb: Whether W&B gets the key with ``wandb_keys="aggregates"``.
        log_scale: Whether it is drawn on a logarithmic axis.
    """

    key: str
    unit: str = ""
    meaning: str = ""
    label: str = ""
    panel: str = ""
    summary: str = ""
    condition: str = ""
    in_wandb: bool = False
    log_scale: bool = False

    @property
    def wandb_title(self) -> str:
        """Title of its panel at W&B."""
        return self.panel or self.label
