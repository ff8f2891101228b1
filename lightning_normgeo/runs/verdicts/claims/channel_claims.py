"""Claims about channels: small γ, and similar (γ, β)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_normgeo.robustness.results.statistics.statistics import wilson_interval
from lightning_normgeo.runs.quantities.channels import CHANNELS
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.verdicts.claims.claim import Claim
from lightning_normgeo.runs.verdicts.claims.robustness_claims import difference, margin_of
from lightning_normgeo.runs.verdicts.thresholds import Thresholds
from lightning_normgeo.runs.verdicts.verdict import REFUTED, SUPPORTED, UNDECIDED, Verdict
from lightning_normgeo.runs.verdicts.wording import counted, percent, points

_NUMBERS = ("ratio", "accuracy", "ci_low", "ci_high", "n")


def _small_gamma(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge the cost of removing the channels of smallest |γ| by that of removing as many at random."""
    found = record.results.get(CHANNELS)
    document: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    clean = document.get("clean")
    rows = [row for row in document.get("results", []) if row.get("replace") == "zero" and _is_complete(row)]
    by_criterion = {
        name: {row["ratio"]: row for row in rows if row["criterion"] == name} for name in ("gamma", "random")
    }
    shares = sorted(share for share in by_criterion["gamma"] if share >= thresholds.removed_share)
    if not shares or not isinstance(clean, Mapping) or not isinstance(clean.get("accuracy"), (int, float)):
        return None
    row, control = by_criterion["gamma"][shares[0]], by_criterion["random"].get(shares[0])
    loss, margin = difference(clean["accuracy"], row["accuracy"]), thresholds.accuracy_margin
    evidence = f"{100 * shares[0]:g} % of the channels set to 0, n = {row['n']}"
    number, limit = points(loss, margin), f"at most {margin_of(thresholds)}"
    if control is None:
        return Verdict(UNDECIDED, "lost", number, limit, "no random control", "", evidence, loss)
    at_random = difference(clean["accuracy"], control["accuracy"])
    detail = f"Channels drawn at random cost {points(at_random)}."
    word, reason = UNDECIDED, "near the limit"
    if loss <= margin and float(row["ci_low"]) > float(control["ci_high"]):
        word, reason = SUPPORTED, ""
    elif loss <= margin:
        reason = "intervals overlap" if at_random > loss else "random ones cost no more"
    elif float(clean["accuracy"]) - float(row["ci_high"]) > margin:
        # the threshold removes all channels that it equals, and so more than at random
        ordered = row.get("removed") == control.get("removed")
        word, reason = (REFUTED, "") if ordered else (UNDECIDED, "equal |γ| have no order")
    return Verdict(word, "lost", number, limit, reason, detail, evidence, loss)


def _similar_channels(record: Record, thresholds: Thresholds) -> Verdict | None:
    """Judge how many pairs of channels that are close in (γ, β) have correlated outputs."""
    found = record.results.get(CHANNELS)
    pairs = found.get("pairs") if isinstance(found, Mapping) else None
    if not isinstance(pairs, Mapping) or not pairs.get("close"):
        return None
    share = float(pairs["redundant"]) / float(pairs["close"])
    word, reason = UNDECIDED, "neither many nor few"
    others, alike = pairs["pairs"] - pairs["close"], pairs["correlated"] - pairs["redundant"]
    if not others:
        reason = "all pairs are close"
    elif share >= thresholds.redundant_share:
        least, most = wilson_interval(pairs["redundant"], pairs["close"])[0], wilson_interval(alike, others)[1]
        word, reason = (SUPPORTED, "") if least > most else (UNDECIDED, "intervals overlap")
    elif share < thresholds.redundant_share / thresholds.far:
        word, reason = REFUTED, ""
    limit = f"least {100 * thresholds.redundant_share:g} %"
    detail = (
        f"Close in (γ, β): {counted(pairs['close'], 'pair')}. Correlated, too: {pairs['redundant']:,}; of the "
        f"{others:,} others: {alike:,}."
    )
    evidence = f"{counted(pairs['pairs'], 'pair')} of channels of a layer"
    number = percent(share, thresholds.redundant_share, thresholds.redundant_share / thresholds.far)
    return Verdict(word, "also alike", number, limit, reason, detail, evidence, share)


def _is_complete(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("criterion"), str) and all(isinstance(row.get(name), (int, float)) for name in _NUMBERS)


CHANNEL_CLAIMS = (
    Claim(
        key="small_gamma",
        title="Small γ: prunable",
        statement="Channels with small γ can be removed at little cost.",
        source="section 2.2, Liu et al. 2017",
        rule=(
            "Number: points of accuracy lost with the channels of smallest |γ| set to zero, at the smallest share of "
            "at least `removed_share`. Supported up to `accuracy_margin`, if as many channels drawn at random cost "
            "more, with 95 % intervals apart; refuted if the loss is above `accuracy_margin` also at the upper end of "
            "the interval of the accuracy, and equal |γ| do not remove more channels than were asked for."
        ),
        needs="ChannelEvaluation",
        stage="evaluation",
        section="channels",
        thresholds=("removed_share", "accuracy_margin"),
        judge=_small_gamma,
    ),
    Claim(
        key="similar_channels",
        title="Similar (γ, β): redundant",
        statement="Channels with similar γ and β have similar outputs, so that one of them can be removed.",
        source="section 2.2",
        rule=(
            "Number: share of the pairs close in (γ, β) whose outputs are correlated as well. Supported from "
            "`redundant_share` on, if outputs of the other pairs are correlated less often, with 95 % intervals apart; "
            "refuted below `redundant_share` over `far`."
        ),
        needs="ChannelEvaluation",
        stage="evaluation",
        section="channel-pairs",
        thresholds=("redundant_share", "far"),
        judge=_similar_channels,
    ),
)
"""Claims of section 2.2 about channels."""
