"""Random trainings: every number of every layer in every step against an independent recursion."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor, SymmetryMonitor
from lightning_normgeo.errors import MeasurementWarning
from support.projects import Fingerprint, same, trainer
from support.random_trainings import Training, batches
from support.witness import Layers, Moved, Sums, Witness, is_weight, layer

GROUPS = ("norm_growth", "norm_growth_control")
TERMS = ("gradient", "momentum", "weight_decay", "quadratic")
PARTS = ("direction", "weight_decay", "quadratic")
ADDITIVE = ("increment", "predicted", "explained", "residual", "term_gradient", "cumulative_increment")
INVARIANT = 1e-9
"""Bound on |cos(W, g)| of invariant weights without ε: rounding, where large gradients nearly cancel."""
BATCHES = 7


@dataclass
class Compared:
    """Result of one training, compared with its witness."""

    layer_steps: int = 0
    numbers: int = 0
    largest_cos: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def expect(self, what: str, value: float, truth: float, tolerance: float) -> None:
        self.numbers += 1
        if not abs(value - truth) <= tolerance:
            self.wrong.append(f"{what}: {value!r}, and not {truth!r} to {tolerance:.1e}")


def train(seed: int, folder: Path, *callbacks: Any, calm: bool, **more: Any) -> Training:
    """Train two epochs, for some seeds with a checkpoint between them."""
    for epochs in (1, 2) if calm else (2,):
        training = Training(seed, calm)
        run = trainer(*callbacks, steps=-1, max_epochs=epochs, **training.settings, **more)
        saved = folder / "one.ckpt"
        run.fit(training, batches(seed, BATCHES), ckpt_path=saved if epochs == 2 and calm else None)
        if epochs == 1:
            run.save_checkpoint(saved)
    return training


def run(seed: int, folder: Path) -> Compared:
    """Run with and without monitors, which has to be equal bit for bit; compare all logged values."""
    calm, bare, observed, rows, witness = seed % 4 == 0, Fingerprint(), Fingerprint(), Layers(), Witness()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(seed, folder, bare, calm=calm)
        every = Training(seed).every
        monitors = (
            NormGrowthMonitor(every, layers="*", cumulative=True),
            OrthogonalityMonitor(every, layers="*"),
            SymmetryMonitor(every),
        )
        training = train(seed, folder, witness, *monitors, observed, calm=calm, logger=rows)
    compared = Compared()
    ours = [str(one.message) for one in said if issubclass(one.category, MeasurementWarning)]
    compared.wrong += [text for text in ours if "failed" in text or "differs from the formula" in text]
    if not same(bare.states, observed.states):
        compared.wrong.append("training is not the same")
    Comparison(rows, witness, training, compared).everything()
    if compared.wrong:
        compared.wrong.insert(0, f"edits {training.log_of_edits}, {training.settings}, said {ours}")
    return compared


@dataclass
class Comparison:
    """Logged rows and the witness's records of the same training."""

    rows: Layers
    witness: Witness
    training: Training
    found: Compared

    def everything(self) -> None:
        totals = dict(self.rows.rows)
        for step in self.rows.layers:
            moved = self.witness.moved.get(step, {})
            weights = {layer(n): one for n, one in moved.items() if is_weight(n, one.before)}
            seen: list[str] = []
            for group in GROUPS:
                layers = self.rows.by_layer(step, group)
                here = {name: own for name, own in layers.items() if "weight_norm" in own}
                seen += here
                for name, own in here.items():
                    self.layer(f"{step} {group} {name}", own, weights.get(name), moved)
                self.cosines(step, group, here, weights)
                self.sums(step, group, layers)
                self.totals(step, group, totals[step])
            if self.training.every == 1 and sorted(seen) != sorted(weights):
                self.found.wrong.append(f"{step}: layers {sorted(seen)}, and not {sorted(weights)}")

    def layer(self, where: str, own: dict[str, float], weight: Moved | None, moved: dict[str, Moved]) -> None:
        if weight is None:
            self.found.wrong.append(f"{where}: nothing moved")
            return
        self.found.layer_steps += 1
        parts = self.parts(own, weight, moved)
        weight_sq, truth = sum(p.weight_sq for p in parts), sum(p.increment for p in parts)
        rounding = 1e-12 * (sum(p.size for p in parts) + 1e-3 * weight_sq)
        expect = self.found.expect
        expect(f"{where} weight_norm²", own["weight_norm"] ** 2, weight_sq, 1e-12 * weight_sq)
        expect(f"{where} increment", own["increment"], truth, rounding)
        if "predicted" in own:
            predicted = sum(p.predicted for p in parts)
            expect(f"{where} predicted", own["predicted"], predicted, 1e-12 * predicted)
        terms = [own[f"term_{t}"] for t in TERMS if f"term_{t}" in own]
        identity = [own[f"identity_{part}"] for part in PARTS if f"identity_{part}" in own]
        if bool(terms) == bool(identity) or ("residual" in own) != bool(terms):
            self.found.wrong.append(f"{where}: keys {sorted(own)}")
        tolerance = 1e-12 * (sum(map(abs, terms or identity)) + 1e-2 * weight_sq) + rounding
        expect(f"{where} {'terms' if terms else 'identity'}", sum(terms or identity), truth, tolerance)
        if terms:
            expect(f"{where} explained", own["explained"], truth, tolerance)
            expect(f"{where} residual", own["residual"], 0.0, tolerance)

    def parts(self, own: dict[str, float], weight: Moved, moved: dict[str, Moved]) -> list[Moved]:
        """Return the weight, and also the bias if both are joint units; the logged numbers show which."""
        bias = moved.get(f"{layer(weight.name)}.bias")
        if bias is None:
            return [weight]

        def off(parts: list[Moved]) -> float:
            norm, increment = sum(p.weight_sq for p in parts), sum(p.increment for p in parts)
            return abs(own["weight_norm"] ** 2 - norm) + abs(own["increment"] - increment)

        return min([weight], [weight, bias], key=off)

    def cosines(self, step: int, group: str, here: dict[str, Any], weights: dict[str, Moved]) -> None:
        for name, own in self.rows.by_layer(step, group.replace("norm_growth", "orthogonality")).items():
            if name not in here or name not in weights:
                continue
            if group.endswith("control"):
                truth = float(weights[name].cosines.max())
                found = own.get("max_abs_cos", 0.0)  # there is none where no row has a gradient
                self.found.expect(f"{step} {name} max_abs_cos", found, truth, 1e-12)
            elif not self.training.turned:
                self.found.largest_cos = max(self.found.largest_cos, own["max_abs_cos"])
                self.found.expect(f"{step} {name} cos of an invariant unit", own["max_abs_cos"], 0.0, INVARIANT)

    def sums(self, step: int, group: str, layers: dict[str, dict[str, float]]) -> None:
        history = self.witness.history[step]
        by_layer = {
            layer(n): sums for n, sums in history.items() if n.endswith(("weight", "_orig", "original", "nal1"))
        }
        for name, own in layers.items():
            if "cumulative_increment" not in own:
                if "weight_norm" in own:
                    self.found.wrong.append(f"{step} {name}: no sums")
                continue
            if name not in by_layer:
                self.found.wrong.append(f"{step} {name}: sums of nobody")
                continue
            bias = history.get(f"{name}.bias")
            choices = [[by_layer[name]], [by_layer[name], bias]] if bias and group == GROUPS[0] else [[by_layer[name]]]
            chosen = min(choices, key=lambda parts: _off(own, parts))
            self.added(f"{step} {group} {name} cumulative", own, chosen)

    def added(self, where: str, own: dict[str, float], parts: list[Sums]) -> None:
        largest = sum(one.size + one.start + one.now for one in parts)
        expect, tolerance, truth = self.found.expect, 1e-13 * largest, sum(one.increment for one in parts)
        expect(f"{where} increment", own["cumulative_increment"], _grown(parts), tolerance)
        if "cumulative_predicted" in own:
            predicted = sum(one.predicted for one in parts)
            expect(f"{where} predicted", own["cumulative_predicted"], predicted, 1e-12 * predicted)
        if "cumulative_explained" in own:
            terms = [own[f"cumulative_term_{t}"] for t in TERMS]
            tolerance += 1e-12 * sum(map(abs, terms))
            expect(f"{where} explained", own["cumulative_explained"], truth, tolerance)
            expect(f"{where} terms", sum(terms), truth, tolerance)
            expect(f"{where} residual", own["cumulative_residual"], _grown(parts) - truth, tolerance)

    def totals(self, step: int, group: str, scalars: dict[str, float]) -> None:
        for key in ADDITIVE:
            by_layer = self.rows.layers[step].get(f"{group}/{key}")
            if by_layer:
                norms = self.rows.layers[step].get(f"{group}/weight_norm", {}).values()
                size = sum(map(abs, by_layer.values())) + 1e-3 * sum(norm**2 for norm in norms)
                self.found.expect(
                    f"{step} {group} {key}", scalars[f"{group}/{key}"], sum(by_layer.values()), 1e-12 * size
                )


def _off(own: dict[str, float], parts: list[Sums]) -> float:
    predicted = sum(one.predicted for one in parts)
    return abs(own["cumulative_increment"] - _grown(parts)) + abs(
        own.get("cumulative_predicted", predicted) - predicted
    )


def _grown(parts: list[Sums]) -> float:
    return sum(one.now - one.start for one in parts)


def report(seeds: range, folder: Path) -> Compared:
    """Return the results of several trainings, with a sentence for each wrong value."""
    whole = Compared()
    for seed in seeds:
        one = run(seed, folder)
        whole.layer_steps += one.layer_steps
        whole.numbers += one.numbers
        whole.largest_cos = max(whole.largest_cos, one.largest_cos)
        whole.wrong += [f"seed {seed}: {text}" for text in one.wrong]
    return whole


def assert_right(compared: Compared, layer_steps: int) -> None:
    assert not compared.wrong, "\n".join(compared.wrong[:30])
    assert compared.layer_steps >= layer_steps
    print(f"{compared.layer_steps} layer-steps, {compared.numbers} numbers, |cos| up to {compared.largest_cos:.1e}")


@pytest.mark.parametrize("first", range(0, 16, 4))
def test_some_trainings_at_random(first: int, tmp_path: Path) -> None:
    assert_right(report(range(first, first + 4), tmp_path), 20)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1480, 40))
def test_many_trainings_at_random(first: int, tmp_path: Path) -> None:
    assert_right(report(range(first, first + 40), tmp_path), 600)


def test_the_comparison_notices_what_is_wrong() -> None:
    compared = Compared()
    compared.expect("this", 1.0, 1.0 + 1e-9, 1e-12)
    compared.expect("that", float("nan"), 1.0, 1e-12)
    assert len(compared.wrong) == 2
