"""What is known of a run's robustness: the counts of its record, and what became of each sample where that was kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.report.run_settings import flat
from lightning_normgeo.robustness.results.attack_results import compare, paired_drop
from lightning_normgeo.robustness.results.sample_results import SampleResults, load_decisions
from lightning_normgeo.robustness.settings import RESCALED
from lightning_normgeo.utilities.contained_files import MEBIBYTE, contained_file

_LARGEST = 1024 * MEBIBYTE
"""Bytes of decisions: a hundred attacks on half a million samples have as many."""
UNKNOWN_DATA = "the test data"
_RANDOM = ("gaussian", "pgd", "torchattacks")
"""What the names of attacks that draw random numbers begin with."""
_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


@dataclass(frozen=True)
class Evaluation:
    """The robustness of one run.

    Attributes:
        run: the run.
        rows: by attack, ``clean`` first.
        decisions: for each test loader what became of its samples; without those that cannot be used.
        problem: why some are left out, if any.
    """

    run: Run
    rows: dict[str, dict[str, Any]]
    decisions: dict[str, SampleResults]
    problem: str = ""

    @property
    def data(self) -> str:
        """The name of what it was evaluated on."""
        return data_of(self.run)

    def changed(self, attack: str) -> int | None:
        """Return how many decisions differ between an attack and its control; None where they were not kept."""
        (name, loader), (control, _) = split_attack(attack), split_attack(control_of(attack))
        kept = self.decisions.get(loader)
        return None if kept is None else int((kept.of(name).correct != kept.of(control).correct).sum())

    def conditions(self, attack: str) -> dict[str, str]:
        """Return all settings of the evaluation that decide what an attack does."""
        row, loader = split_attack(attack)
        settings = self.run.evaluation_settings(loader)
        threat = settings.get("threat", {})
        name = row.removesuffix(RESCALED)
        found = {"rescale": settings.get("rescale") if name != row else None, "precision": settings.get("precision")}
        if name != "clean":
            found |= {key: threat.get(key) for key in ("space", "lower", "upper")}
            found["normalization"] = None if threat.get("space") == "pixel" else settings.get("normalization")
            found["seed"] = settings.get("seed") if name.startswith(_RANDOM) else None
            found |= {"semantics": settings.get("semantics"), name: settings.get("attacks", {}).get(name, threat)}
        return flat(found)

    def drop(self, attack: str) -> dict[str, Any] | None:
        """Return the drop from the clean accuracy, sample by sample, where it is one and decisions are kept."""
        name, loader = split_attack(attack)
        return paired_drop(self.decisions[loader], name) if loader in self.decisions and name != "clean" else None

    def against(self, other: Evaluation, attack: str) -> dict[str, Any]:
        """Compare this evaluation, the first, with another on the samples that both have.

        Raises:
            ConfigurationError: if they cannot be compared, with the reason.
        """
        name, loader = split_attack(attack)
        for one in (self, other):
            if loader not in one.decisions:
                raise ConfigurationError(f"{one.problem} for {one.run.name}")
        differing = self.conditions(attack).items() ^ other.conditions(attack).items()
        if differing:
            names = ", ".join(sorted({key for key, _ in differing}))
            raise ConfigurationError(f"evaluated under different conditions ({names})")
        found = compare(self.decisions[loader], other.decisions[loader], name)
        if not found["n"]:
            raise ConfigurationError("evaluated on different samples")
        return found


def evaluations_of(runs: Iterable[Run]) -> list[Evaluation]:
    """Return the evaluations of those runs that have one."""
    return [_evaluation(run) for run in runs if run.results]


def attacks_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return the names of all attacks but the control's, in the order of the evaluations."""
    names = dict.fromkeys(attack for evaluation in evaluations for attack in evaluation.rows)
    return [attack for attack in names if not is_control(attack)]


def is_control(attack: str) -> bool:
    """Whether it is an attack's control, with longer weights."""
    return split_attack(attack)[0].endswith(RESCALED)


def control_of(attack: str) -> str:
    """Return the name of an attack's control, with longer weights."""
    name, loader = split_attack(attack)
    return f"{name}{RESCALED}{loader}"


def data_of(run: Run) -> str:
    """Return the name of the data that a run is about, as far as its settings tell."""

    def given(name: str) -> str:
        return run.settings.get(f"data.init_args.{name}", run.settings.get(f"data.{name}", ""))

    if given("name"):
        return _SETS.get(given("name"), given("name"))
    kind = run.settings.get("data.class_path", "").rpartition(".")[2].removesuffix("DataModule")
    parts = [kind, f"({given('data_dir')})" if given("data_dir") else ""]
    return " ".join(filter(None, parts)) or UNKNOWN_DATA


def problems_of(evaluations: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Return what is wrong with decisions, and the runs where it is."""
    found: dict[str, list[str]] = {}
    for evaluation in evaluations:
        if evaluation.problem:
            found.setdefault(evaluation.problem, []).append(evaluation.run.name)
    return found


def _evaluation(run: Run) -> Evaluation:
    rows = {row["attack"]: _completed(row) for row in run.results}
    decisions, problems = {}, []
    for loader in dict.fromkeys(split_attack(attack)[1] for attack in rows):
        name = f"robustness{loader.replace('/', '_')}.npz"
        try:
            path = contained_file(run.record.folder, name, _LARGEST)
        except ConfigurationError as error:
            problems.append(str(error).replace(f"{name} does not exist", f"there is no {name}"))
            continue
        try:
            found = load_decisions(path)
        except ConfigurationError:
            problems.append(f"{name} cannot be read")
            continue
        here = {split_attack(a)[0]: (r["correct"], r["n"]) for a, r in rows.items() if split_attack(a)[1] == loader}
        if _counts(found) == here:
            decisions[loader] = found
        else:
            problems.append(f"{name} is not of the evaluation that was recorded")
    return Evaluation(run, rows, decisions, "; ".join(problems))


def _counts(decisions: SampleResults) -> dict[str, tuple[int, int]]:
    rows = {attack: decisions.of(attack) for attack in decisions.attacks}
    return {attack: (int(found.correct.sum()), len(found.index)) for attack, found in rows.items()}


def _completed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its count, which metrics alone do not have."""
    accuracy = row["accuracy"] if isinstance(row["accuracy"], (int, float)) else 0.0  # of no samples there is none
    return {"correct": round(accuracy * row["n"]), **row, "n": int(row["n"])}


def split_attack(attack: str) -> tuple[str, str]:
    """Return the attack's name and what tells its test loader, with the slash."""
    name, slash, loader = attack.partition("/")
    return name, slash + loader
