"""Rows of the table of logged quantities for channels."""

from __future__ import annotations

from lightning_normgeo.runs.quantities.quantity import Quantity

CHANNELS = "channels"
"""First part of the keys, and the name of the results."""
CHANNEL_QUANTITIES = (
    Quantity("channels/clean/accuracy", "1", "fraction classified correctly by the whole network"),
    Quantity(
        "channels/{criterion}/{replace}/{ratio}/accuracy",
        "1",
        "the same with this share of channels masked: by `gamma`, `product`, `share`, `similar`, `pairs` or `random`, "
        "replaced by `zero`, `mean` or `partner`",
    ),
    Quantity("channels/close_pairs", "1", "share of the pairs of channels of a layer that are close in (γ, β)"),
    Quantity("channels/redundant_pairs", "1", "share of these pairs that are close, and correlated as well"),
)
"""Quantities of ChannelEvaluation, in the order of the key table."""
