"""Evaluation of a network with masked channels, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normgeo.channels.criteria import candidates, masks, partners_of
from lightning_normgeo.channels.masked_model import Partners, masked_channels
from lightning_normgeo.channels.measure import channel_table
from lightning_normgeo.channels.report import MaskedAccuracy, MaskingReport
from lightning_normgeo.channels.settings import MaskingSettings
from lightning_normgeo.channels.table import ChannelTable, PairCounts
from lightning_normgeo.errors import UnsuitableError, reason_of
from lightning_normgeo.normalization.user_inputs import weight_of
from lightning_normgeo.robustness.attacks.search.losses import predicted
from lightning_normgeo.robustness.inputs import InputSpace, class_indices, class_logits
from lightning_normgeo.robustness.inputs.checks import check_labels
from lightning_normgeo.robustness.model.assumptions import check_assumptions
from lightning_normgeo.robustness.model.image_copies import on_copies
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.results.attack_results import AttackResult, results_of
from lightning_normgeo.robustness.results.samples.sample_identity import (
    SeenSamples,
    merged_places,
    order_of,
    sample_keys,
)
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.samples.sample_rows import SampleRows

CLEAN = "clean"
"""Name of the condition without a mask."""
Progress = Callable[[str, int, int, int], None]
"""Called with the name of a condition, the samples just evaluated, and the correct and all samples of it so far."""


class Condition(NamedTuple):
    """One way to mask channels.

    Attributes:
        criterion: name of the criterion.
        ratio: share of the candidates that was asked for.
        replace: name of the replacement.
        keep: which channels are kept, by module path.
        partners: what takes the place of each channel; None unless this is the replacement.
    """

    criterion: str
    ratio: float
    replace: str
    keep: Mapping[str, Tensor]
    partners: Mapping[str, Partners] | None

    @property
    def name(self) -> str:
        """The name of the condition, as in metric keys."""
        return f"{self.criterion}/{self.replace}/{self.ratio:g}"


@dataclass(frozen=True)
class Plan:
    """The conditions of an evaluation, which all processes share.

    Attributes:
        conditions: in the order of evaluation.
        channels: number of channels measured.
        candidates: number of channels that may be removed.
        left_out: the reason for each criterion that is not compared.
        pairs: numbers of similar pairs of channels.
    """

    conditions: Sequence[Condition]
    channels: int
    candidates: int
    left_out: Mapping[str, str]
    pairs: PairCounts


def plan_of(table: ChannelTable, settings: MaskingSettings) -> Plan:
    """Return the conditions for the channels of a table.

    Raises:
        UnsuitableError: if no channel can be ranked.
    """
    found = candidates(table, settings.criteria, settings.seed, settings.streams)
    if not found.rankings or not found.among.any():
        raise UnsuitableError(f"No channel can be ranked: {'; '.join(found.left_out.values())}.")
    conditions, made = [], {}
    for criterion, ratio, replace in settings.conditions():
        if criterion not in found.rankings:
            continue
        one = found.rankings[criterion]
        if (criterion, ratio) not in made:
            made[criterion, ratio] = masks(table, one, found.among, ratio)
        keep = made[criterion, ratio]
        partners = partners_of(table, one, keep) if replace == "partner" else None
        conditions.append(Condition(criterion, ratio, replace, keep, partners))
    return Plan(conditions, len(table), int(found.among.sum()), found.left_out, table.pair_counts())


@dataclass
class MaskedShare:
    """One process's share of an evaluation, in a form that can be sent to other processes."""

    rows: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    places: dict[int, list[int]] = field(default_factory=dict)
    positions_known: bool = False
    failed: str = ""


class MaskedEvaluation:
    """Evaluates the samples of one loader, each once, whole and with masked channels.

    Args:
        module: the network.
        logits: maps images to its output.
        settings: the settings of the evaluation.
        loader: yields the batches, for the order of its samples.
        progress: see :data:`Progress`. Default: none.
        agreed: returns what the first process gives, on every process. Default: there is one process.

    Attributes:
        table: the channels; None before the first batch, and on other processes than the first.
        plan: the conditions; None before the first batch.
        failed: the reason if nothing is evaluated; else empty.
    """

    def __init__(
        self,
        module: nn.Module,
        logits: Callable[[Tensor], Any],
        settings: MaskingSettings,
        loader: Any,
        progress: Progress | None = None,
        agreed: Callable[[Callable[[], Any]], Any] = lambda make: make(),
    ) -> None:
        self.settings = settings
        self.table: ChannelTable | None = None
        self.plan: Plan | None = None
        self.failed = ""
        self._module, self._logits, self._progress, self._agreed = module, on_copies(logits), progress, agreed
        self._seen = SeenSamples(order_of(loader))
        self._decisions = SampleResults([CLEAN])

    def begin(self, first: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Measure the channels on the first batch, and make the plan; every process has to call it.

        Args:
            first: returns the images and labels of the first batch; called on the first process only.

        Raises:
            UnsuitableError: if the network or its data cannot be evaluated.
        """
        with preserved_state(self._module), torch.no_grad():
            self.plan = self._agreed(lambda: self._planned(*first()))
        self._decisions = SampleResults([CLEAN, *(one.name for one in self.plan.conditions)])

    def _planned(self, images: Tensor, labels: Tensor) -> Plan:
        images = self._in_precision(images)
        check_assumptions(self._module, self._logits, images, class_indices(labels), gradients=False)
        self.table = channel_table(self._module, images, logits=self._logits)
        return plan_of(self.table, self.settings)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Evaluate the samples of a batch that did not occur before; the first batch begins."""
        if self.failed or not len(images):
            return
        images = self._in_precision(images)
        if self.plan is None:
            self.begin(lambda: (images, labels))
        labels = class_indices(labels)
        keys = sample_keys(images, labels, InputSpace(None, None, normalized_data=True))
        which = torch.tensor(self._seen.new(keys))
        if not which.any():
            return
        numbers = torch.tensor(keys, dtype=torch.long)[which]
        assert self.plan is not None  # noqa: S101
        for condition in (None, *self.plan.conditions):
            scores = self._scores(images, condition)
            if condition is None:
                check_labels(labels, scores)
            self._note(CLEAN if condition is None else condition.name, scores, labels, which, numbers)

    def _scores(self, images: Tensor, condition: Condition | None) -> Tensor:
        """Return the logits of images, whole batches as the loader yields them."""
        with preserved_state(self._module), torch.no_grad(), ExitStack() as stack:
            if condition is not None:
                mask = masked_channels(self._module, condition.keep, condition.replace, condition.partners)
                stack.enter_context(mask)
            return class_logits(self._logits(images), len(images))

    def _note(self, name: str, scores: Tensor, labels: Tensor, which: Tensor, numbers: Tensor) -> None:
        which = which.to(scores.device)
        scores, labels = scores[which].float(), labels[which]
        loss = F.cross_entropy(scores, labels, reduction="none").cpu()
        zero, unknown = torch.zeros_like(loss), torch.full_like(loss, torch.nan)
        found = predicted(scores).cpu()
        rows = SampleRows(numbers, labels.cpu(), found, loss, zero, zero, unknown, numbers)
        self._decisions.add(name, rows)
        if self._progress is not None:
            self._progress(name, len(rows.label), *self._decisions.seen[name])

    def _in_precision(self, images: Tensor) -> Tensor:
        """Return images in the network's precision, as arrays of numpy are in double precision by default."""
        weight = weight_of(self._module)
        if weight is None or images.dtype != torch.float64 or weight.dtype == torch.float64:
            return images
        return images.to(weight.dtype)

    def give_up(self, error: BaseException) -> str:
        """Evaluate no further batch, and return the reason as given in the report."""
        self.failed = reason_of(error)
        return self.failed

    def share(self) -> MaskedShare:
        """Return this process's share of the report."""
        rows = {name: tuple(self._decisions.of(name)) for name in self._decisions.attacks}
        return MaskedShare(rows, self._seen.places, self._seen.order.positions is not None, self.failed)

    def report(self, shares: Sequence[MaskedShare], **about: Any) -> MaskingReport:
        """Return the report made from the shares of all processes.

        Args:
            shares: of all processes.
            about: further settings to report.
        """
        settings = {**self.settings.describe(), **about}
        failed = next((share.failed for share in shares if share.failed), "")
        with_samples = [share for share in shares if len(share.rows.get(CLEAN, ((),))[0])]
        if failed or self.plan is None or not with_samples:
            return MaskingReport(
                None, [], {}, settings, table=self.table, not_evaluated=failed or "there are no samples"
            )
        places = merged_places(
            [share.places for share in with_samples], all(share.positions_known for share in with_samples)
        )
        results = results_of(SampleResults.from_parts([share.rows for share in with_samples], places))
        plan = self.plan
        settings |= {"channels": plan.channels, "candidates": plan.candidates}
        if self.table is not None:
            settings |= {"similar": self.table.similar, "correlated": self.table.correlated}
        clean = _accuracy(("", 0.0, ""), results[CLEAN], {}, plan.candidates)
        found = [_accuracy(one[:3], results[one.name], one.keep, plan.candidates) for one in plan.conditions]
        kept = {(one.criterion, one.ratio): one.keep for one in plan.conditions}
        return MaskingReport(clean, found, kept, settings, plan.left_out, self.table, plan.pairs)


def _accuracy(
    name: tuple[str, float, str], result: AttackResult, keep: Mapping[str, Tensor], candidate_count: int
) -> MaskedAccuracy:
    criterion, ratio, replace = name
    removed = sum(int((~mask).sum()) for mask in keep.values())
    return MaskedAccuracy(
        criterion,
        replace,
        ratio,
        removed,
        removed / candidate_count,
        result.correct,
        result.n,
        result.accuracy,
        result.accuracy_drop,
        result.ci_low,
        result.ci_high,
        sum(not bool(mask.any()) for mask in keep.values()),
    )
