"""Report of an evaluation: results by attack, as a table and as JSON, and per-sample results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_normgeo.robustness.results.attack_results import AttackResult, changed_decisions
from lightning_normgeo.robustness.results.example_images import ExampleImages
from lightning_normgeo.robustness.results.logged_results import COLUMNS
from lightning_normgeo.robustness.results.samples.sample_results import SampleResults
from lightning_normgeo.robustness.results.sanity_checks import SanityCheck, verdict_on
from lightning_normgeo.robustness.results.statistics.corruption_summary import CorruptionSummary
from lightning_normgeo.robustness.results.statistics.smallest_radii import SmallestRadii
from lightning_normgeo.robustness.results.statistics.worst_case import WorstCase
from lightning_normgeo.robustness.results.verified_decisions import VerifiedDecisions, verification_note
from lightning_normgeo.utilities.attack_names import NORM_TITLES, draws_of_clean, without_control
from lightning_normgeo.utilities.checked_values import UnknownNameError, nearest, short_repr
from lightning_normgeo.utilities.files import finite, user_path, write_document
from lightning_normgeo.utilities.notebook import NotebookTable, summary


@dataclass(frozen=True)
class RobustnessReport:
    """Results of an evaluation. ``report["bim"]`` is the result under an attack, iteration yields the attacks' names.

    Attributes:
        results: the result under each attack, ``clean`` first.
        settings: the settings that determine the results, as plain values.
        warnings: warnings about the data and about attacks that seem to fail.
        decisions: the per-sample results.
        shown: example images, by :mod:`sample <lightning_normgeo.robustness.results.samples.sample_identity>`.
        weights: weight norms: raw and effective ones, and those of the control.
        not_evaluated: the reason for each attack without a result; under ``all attacks`` if there is no result at all.
        parts: the kind of detail by row, for rows that are details, see :attr:`.RobustnessSettings.parts`.
        worst: what each attack adds to the worst case over attacks, for each radius.
        radii: the smallest radii at which an attack succeeds, for each attack that looks for them.
        corruptions: accuracies under corruptions; None without any.
        checks: sanity checks of the evaluation; empty without the attacks of ``sanity``.
    """

    results: dict[str, AttackResult]
    settings: dict[str, Any]
    warnings: list[str]
    decisions: SampleResults
    shown: ExampleImages = field(default_factory=ExampleImages)
    weights: dict[str, Any] = field(default_factory=dict)
    not_evaluated: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    worst: list[WorstCase] = field(default_factory=list)
    radii: dict[str, SmallestRadii] = field(default_factory=dict)
    corruptions: CorruptionSummary | None = None
    checks: list[SanityCheck] = field(default_factory=list)

    def __getitem__(self, attack: str) -> AttackResult:
        """Return the result under an attack.

        Raises:
            UnknownNameError: a KeyError and a ConfigurationError, if there is none.
        """
        if attack in self:
            return self.results[attack]
        why = self.not_evaluated.get(attack) if isinstance(attack, str) else None
        because = f"was not evaluated: {why}" if why else "was not evaluated"
        raise UnknownNameError(f"{short_repr(attack)} {because}; {nearest(attack, self.results)}.")

    def __contains__(self, attack: object) -> bool:
        return isinstance(attack, str) and attack in self.results

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __bool__(self) -> bool:
        return True  # also without results, where __len__ would make it false

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each attack, with the keys :data:`COLUMNS`, ``by_class`` and ``not_finite``.

        Rows of controls with rescaled weights also have ``changed``, the number of samples that only one of the attack
        and its control gets right. Rows that are details have ``part``: of a ``suite``, one ``corruption`` at one
        severity, a ``check`` of the evaluation, a search for the smallest ``radius``, or a ``draw`` of a random model.
        """
        rows = []
        for name, result in self.results.items():
            strength = self.settings["attacks"].get(without_control(name), {})
            known = {"attack": name, "eps": self._radius(strength), "std": strength.get("std"), **asdict(result)}
            others = {"by_class": known["by_class"], "not_finite": known["not_finite"], **self._changed(name)}
            if name in self.parts:
                others["part"] = self.parts[name]
            rows.append({**{column: known[column] for column in COLUMNS}, **others})
        return rows

    def _changed(self, name: str) -> dict[str, int]:
        attack = without_control(name)
        paired = attack != name and {attack, name} <= set(self.decisions.attacks)
        return {"changed": changed_decisions(self.decisions, attack)} if paired else {}

    def _radius(self, strength: Mapping[str, Any]) -> float | None:
        """Return the radius of an attack; if it is a multiple of √d, with d values per image, then its actual value.

        None if there is no radius, or if images differ in d.
        """
        if not strength.get("times_sqrt_d"):
            radius: float | None = strength.get("eps")
            return radius
        values = self.settings.get("values_per_image")
        return None if values is None else float(strength["eps"] * values**0.5)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``robustness.json``, with None in place of NaN and infinities."""
        known = {"settings": self.settings, "warnings": self.warnings, "results": self.rows()}
        more: dict[str, Any] = {"not_evaluated": self.not_evaluated, "weights": self.weights}
        if self.worst:
            more["worst"] = [asdict(one) for one in self.worst]
        if self.radii:
            more["radii"] = {name: asdict(one) for name, one in self.radii.items()}
        if self.corruptions is not None:
            more["corruptions"] = asdict(self.corruptions)
        if self.verified:
            more["verified"] = {name: asdict(one) for name, one in self.verified.items()}
        if self.checks:
            more["sanity"] = [asdict(check) for check in self.checks]
        if self.clean_draws:
            more["clean_draws"] = self.clean_draws
        found: dict[str, Any] = finite({**known, **more})
        return found

    def save(self, folder: str | Path) -> None:
        """Write ``robustness.json``, and ``robustness.npz`` with the per-sample results.

        Each file replaces an earlier one atomically.

        Args:
            folder: the folder for the files, which is created if it does not exist.
        """
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.results:
            self.decisions.save(folder / "robustness.npz")
        write_document(folder / "robustness.json", self.as_dict())

    def __repr__(self) -> str:
        found = [f"{name} {100 * result.accuracy:.2f} %" for name, result in self.results.items()]
        samples = max((result.n for result in self.results.values()), default=None)
        missing = [f"{name} not evaluated" for name in self.not_evaluated]
        return summary("RobustnessReport", found + missing, "" if samples is None else f" of {samples}")

    def _table(self) -> NotebookTable:
        columns = ("attack", "accuracy, %", "95 % interval", "drop, points", "correct", "n")
        rows: list[tuple[object, ...]] = [
            (
                name,
                100 * r.accuracy,
                f"{100 * r.ci_low:.2f} … {100 * r.ci_high:.2f}",
                100 * r.accuracy_drop,
                r.correct,
                r.n,
            )
            for name, r in self.results.items()
        ]
        missing = [f"{name}: not evaluated: {why}" for name, why in self.not_evaluated.items()]
        return NotebookTable("Robustness", columns, rows, [*missing, *self.notes])

    def _repr_html_(self) -> str:
        return self._table().to_html()

    def to_frame(self) -> Any:
        """Return the rows as a pandas data frame, indexed by attack, with :data:`COLUMNS`; accuracies are in [0, 1].

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        return NotebookTable("", COLUMNS, [[row[name] for name in COLUMNS] for row in self.rows()]).to_frame("attack")

    @property
    def verified(self) -> dict[str, VerifiedDecisions]:
        """The numbers of repeated and changed decisions by attack; empty unless ``autocast="bf16-verified"``."""
        if "verification" not in self.settings:
            return {}
        names = {name for name in self.results if without_control(name) in self.settings["verification"]["attacks"]}
        return {name: VerifiedDecisions.of(self.decisions.of(name).checked) for name in self.results if name in names}

    @property
    def ladders(self) -> list[str]:
        """For each radius with several attacks, what each of them takes of those before it, in points of accuracy."""
        found = []
        for case in self.worst:
            n = self.results[case.name].n
            steps = [f"clean {100 * self.results['clean'].accuracy:.2f}"]
            named = [name for name in case.attacks if case.gained[name] or self.parts.get(name) != "check"]
            steps += [f"{name} −{100 * case.gained[name] / n:.2f}" for name in named]
            found.append(f"{' → '.join(steps)} → {case.name} {100 * self.results[case.name].accuracy:.2f} %")
        return found

    @property
    def medians(self) -> list[str]:
        """For each attack that looks for the smallest radius, the median with its 95 % interval."""
        return [
            f"{name}: median of the smallest {NORM_TITLES[one.norm]} radius {one.median:.4g} "
            f"({one.ci_low:.4g} … {one.ci_high:.4g}), {one.broken} of {one.n} broken"
            for name, one in self.radii.items()
        ]

    @property
    def clean_draws(self) -> list[float]:
        """The accuracies on clean images of a random model, by draw; empty for other models."""
        drawn = [self.results[name].accuracy for name in draws_of_clean() if name in self.results]
        return [self.results["clean"].accuracy, *drawn] if drawn else []

    @property
    def notes(self) -> list[str]:
        """Lines below the table: what attacks add, medians, corruptions, draws of a random model, checks, warnings."""
        found = [*self.ladders, *self.medians]
        if self.corruptions is not None:
            one = self.corruptions
            found.append(
                f"corruptions: mean accuracy {100 * one.accuracy:.2f} % "
                f"({100 * one.ci_low:.2f} … {100 * one.ci_high:.2f}) over {len(one.by_kind)} kinds and "
                f"{len(one.by_severity)} severities: "
                + ", ".join(f"{kind} {100 * value:.1f}" for kind, value in one.by_kind.items())
            )
        if self.clean_draws:
            drawn = [100 * value for value in self.clean_draws]
            found.append(
                f"random model: clean accuracy {fmean(drawn):.2f} % on average over {len(drawn)} draws, from "
                f"{min(drawn):.2f} to {max(drawn):.2f} %"
            )
        verdicts = [text for text in (verification_note(self.verified), verdict_on(self.checks)) if text]
        return [*found, *verdicts, *self._unconfirmed, *self.warnings]

    @property
    def _unconfirmed(self) -> list[str]:
        inputs = self.settings.get("inputs", {})
        if not self.results or inputs.get("confirmed", True):
            return []
        return [f"inputs: {inputs['source'] or 'as declared'}, unconfirmed"]

    def __str__(self) -> str:
        """Return the table."""
        shown = {name: one for name, one in self.results.items() if self.parts.get(name) != "corruption"}
        width = max(len(name) for name in ("attack", *shown, *self.not_evaluated))
        lines = [f"{'attack':{width}}  accuracy   95 % interval     drop       n"]
        for name, r in shown.items():
            interval = f"{100 * r.ci_low:6.2f} … {100 * r.ci_high:6.2f}"
            lines.append(
                f"{name:{width}}  {100 * r.accuracy:6.2f} %  {interval}  {100 * r.accuracy_drop:6.2f}  {r.n:6}"
            )
        lines += [f"{name:{width}}  not evaluated: {reason}" for name, reason in self.not_evaluated.items()]
        return "\n".join([*lines, *self.notes])
