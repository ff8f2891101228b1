"""Robustness of runs: the counts in their records, and the per-sample results if these were saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.run_settings import flat
from lightning_normgeo.runs.records.record_lines import VALIDATION
from lightning_normgeo.runs.run_title import data_title
from lightning_normgeo.utilities.attack_names import is_control, split_attack, without_control
from lightning_normgeo.utilities.contained_files import MEBIBYTE, contained_file

if TYPE_CHECKING:  # what needs torch is imported where there are per-sample results
    from lightning_normgeo.robustness.results.samples.sample_results import SampleResults

_LARGEST = 1024 * MEBIBYTE
"""Largest file of per-sample results in bytes, enough for a hundred attacks on half a million samples."""
UNKNOWN_DATA = "the test data"
"""The name of data of which the settings tell nothing."""
_RANDOM = ("gaussian", "pgd", "apgd", "square", "standard", "torchattacks")
"""Beginnings of the names of attacks that draw random numbers."""
_DRAWN = ("std", "random_start", "queries", "points")
"""Settings that only such attacks have, whatever their names: noise, random starts and random searches."""


@dataclass(frozen=True)
class Evaluation:
    """The robustness of one run.

    Attributes:
        run: The run.
        rows: Counts and accuracies by attack, ``clean`` first.
        decisions: Per-sample results by test loader; those that cannot be used are left out.
        problem: Why per-sample results are left out; empty if none are.
    """

    run: Run
    rows: dict[str, dict[str, Any]]
    decisions: dict[str, SampleResults]
    problem: str = ""

    @property
    def data(self) -> str:
        """The name of the data that the run was evaluated on."""
        return data_of(self.run)

    def changed(self, attack: str) -> int | None:
        """Return the number of samples that only one of an attack and its control gets right.

        Args:
            attack: Name of the attack.

        Returns:
            The number of samples; None without per-sample results.
        """
        name, loader = split_attack(attack)
        found = self.decisions.get(loader)
        if found is None:
            return None
        from lightning_normgeo.robustness.results.attack_results import changed_decisions

        return changed_decisions(found, name)

    def conditions(self, attack: str) -> dict[str, str]:
        """Return all settings of the evaluation that influence an attack, by dotted name."""
        row, loader = split_attack(attack)
        settings = self.run.evaluation_settings(loader)
        threat = settings.get("threat", {})
        name = without_control(row)
        found = {"rescale": settings.get("rescale") if name != row else None, "precision": _precision(settings, name)}
        if name != "clean":
            found |= {key: threat.get(key) for key in ("space", "lower", "upper")}
            found["normalization"] = None if threat.get("space") == "pixel" else settings.get("normalization")
            strength = settings.get("attacks", {}).get(name, threat)
            if name.startswith(_RANDOM) or any(strength.get(key) for key in _DRAWN):
                found["seed"] = settings.get("seed")
                # results without a generator are of versions that drew with torch's, but for the square attack
                is_square = "queries" in strength and "after" not in strength
                found["generator"] = None if is_square else settings.get("generator")
            found |= {"semantics": settings.get("semantics"), name: strength}
        return flat(found)

    def drop(self, attack: str) -> dict[str, Any] | None:
        """Return the paired drop from the clean accuracy; None for ``clean`` itself and without per-sample results."""
        name, loader = split_attack(attack)
        if loader not in self.decisions or name == "clean":
            return None
        from lightning_normgeo.robustness.results.attack_results import paired_drop

        return paired_drop(self.decisions[loader], name)

    def against(self, other: Evaluation, attack: str) -> dict[str, Any]:
        """Compare this evaluation, as the first, with another one on the samples that both share.

        Args:
            other: The second evaluation.
            attack: Name of the attack under which they are compared.

        Returns:
            The result of :func:`lightning_normgeo.robustness.results.attack_results.compare`.

        Raises:
            ConfigurationError: If they cannot be compared, with the reason.
        """
        name, loader = split_attack(attack)
        for one in (self, other):
            if loader not in one.decisions:
                raise ConfigurationError(f"{one.problem} for {one.run.name}")
        differing = self.conditions(attack).items() ^ other.conditions(attack).items()
        if differing:
            names = ", ".join(sorted({key for key, _ in differing}))
            raise ConfigurationError(f"evaluated under different conditions ({names})")
        from lightning_normgeo.robustness.results.attack_results import compare

        found = compare(self.decisions[loader], other.decisions[loader], name)
        if not found["n"]:
            raise ConfigurationError("evaluated on different samples")
        return found


def _precision(settings: Mapping[str, Any], attack: str) -> Any:
    """Return the precision that a row is computed in: with verified decisions only attacks search in another one."""
    verification = settings.get("verification")
    if not verification or attack in verification["attacks"]:
        return settings.get("precision")
    is_exact = attack == "clean" or attack in settings.get("attacks", {})
    return verification["precision"] if is_exact else settings.get("precision")


def evaluations_of(runs: Iterable[Run]) -> list[Evaluation]:
    """Return the evaluations of the runs that have one."""
    return [_evaluation(run) for run in runs if run.results]


def attacks_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return the names of all attacks without their controls, in the order of the evaluations."""
    names = dict.fromkeys(attack for evaluation in evaluations for attack in evaluation.rows)
    return [attack for attack in names if not is_control(attack)]


def data_of(run: Run) -> str:
    """Return the name of a run's data from its settings, or :data:`UNKNOWN_DATA`."""

    def given(name: str) -> str:
        return run.settings.get(f"data.init_args.{name}", run.settings.get(f"data.{name}", ""))

    title = data_title(given("name"), run.settings.get("data.class_path", ""))
    parts = [title, f"({given('data_dir')})" if given("data_dir") and not given("name") else ""]
    name = " ".join(filter(None, parts))
    if any(found.get("data") == VALIDATION for found in run.record.evaluations.values()):
        return f"{name}, validation data" if name else "the validation data"
    return name or UNKNOWN_DATA


def problems_of(evaluations: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Return the runs' names by the problem with their per-sample results."""
    found: dict[str, list[str]] = {}
    for evaluation in evaluations:
        if evaluation.problem:
            found.setdefault(evaluation.problem, []).append(evaluation.run.name)
    return found


def _evaluation(run: Run) -> Evaluation:
    """Return the evaluation of a run, with per-sample results if their counts match those of the record."""
    every = {row["attack"]: _completed(row) for row in run.all_results}
    rows = {row["attack"]: every[row["attack"]] for row in run.results}
    decisions, problems = {}, []
    for loader in dict.fromkeys(split_attack(attack)[1] for attack in every):
        name = f"robustness{loader.replace('/', '_')}.npz"
        try:
            path = contained_file(run.record.folder, name, _LARGEST)
        except ConfigurationError as error:
            problems.append(str(error).replace(f"{name} does not exist", f"there is no {name}"))
            continue
        from lightning_normgeo.robustness.results.samples.sample_results import load_decisions

        try:
            found = load_decisions(path)
        except ConfigurationError:
            problems.append(f"{name} cannot be read")
            continue
        here = {split_attack(a)[0]: (r["correct"], r["n"]) for a, r in every.items() if split_attack(a)[1] == loader}
        if _counts(found) == here:
            decisions[loader] = found
        else:
            problems.append(f"{name} is not of the evaluation that was recorded")
    return Evaluation(run, rows, decisions, "; ".join(problems))


def _counts(decisions: SampleResults) -> dict[str, tuple[int, int]]:
    """Return the numbers of correct and of all samples by attack."""
    rows = {attack: decisions.of(attack) for attack in decisions.attacks}
    return {attack: (int(found.correct.sum()), len(found.index)) for attack, found in rows.items()}


def _completed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the numbers of samples and of correct ones, which a row downloaded from W&B may lack."""
    accuracy = row["accuracy"] if isinstance(row["accuracy"], (int, float)) else 0.0  # null if there are no samples
    n = int(row.get("n") or 0)
    return {"correct": round(accuracy * n), **row, "n": n}
