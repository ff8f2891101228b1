"""Attacks that search in bfloat16 and decide in float32: what is guaranteed, what is measured, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import RobustnessEvaluation, evaluate_robustness
from lightning_normgeo.errors import MeasurementWarning, UnsuitableError
from lightning_normgeo.robustness import RobustnessReport, load_decisions
from lightning_normgeo.robustness.attacks.batch_attacks import BatchAttacks
from lightning_normgeo.robustness.attacks.verification import AUDIT, BAND, reach, repeated
from lightning_normgeo.robustness.results.logged_results import detail_tables
from lightning_normgeo.robustness.results.verified_decisions import (
    AUDITED,
    CHANGED,
    NEAR,
    VerifiedDecisions,
    verification_note,
    verification_warnings,
)
from support.projects import ConvNet, Project, images, trainer

SEMANTICS = ["final", "any"]
evaluate = partial(evaluate_robustness, progress=False)


def loader(x: Tensor, y: Tensor, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def levels(*shape: int, seed: int = 0) -> Tensor:
    """Return random 8-bit images, whose normalization is confirmed."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)) / 255


def wrong(report: RobustnessReport, other: RobustnessReport, attack: str) -> int:
    """Return the number of samples that only one of two evaluations gets right."""
    return int((report.decisions.of(attack).correct != other.decisions.of(attack).correct).sum())


# --- decisions --------------------------------------------------------------------------------------------------------


class Offset(nn.Module):
    """Two logits w·x + 1000 ∓ b: in bfloat16, whose numbers near 1000 are 4 apart, margins below 2 are ties."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[-0.01], [0.01]]).expand(2, 48))
            self.linear.bias.copy_(torch.tensor([1000.24, 999.76]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]


def brightness(count: int = 40) -> tuple[Tensor, Tensor]:
    """Return uniform images, those above one half of class 1: their margins are at most 0.48."""
    shade = torch.linspace(0.05, 0.95, count).mul(255).round() / 255
    return shade.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone(), (shade > 0.5).long()


@pytest.mark.filterwarnings("ignore:.*does not raise the loss")
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_margin_that_bfloat16_cannot_tell_is_decided_by_float32(semantics: Any) -> None:
    x, y = brightness()
    run = partial(evaluate, Offset(), loader(x, y), eps=0.2, noise_std=1e-4, semantics=semantics, attacks=ROWS)
    full, half, verified = (run(autocast=name) for name in (None, "bf16", "bf16-verified"))
    assert half["clean"].correct == int((y == 0).sum()), "ties go to class 0"
    assert full["clean"].correct == verified["clean"].correct == len(y)
    robust = (x[:, 0, 0, 0] - 0.5).abs() > 0.2
    assert 10 < int(robust.sum()) < 30
    for name in ("bim", "pgd", "bim_l2"):
        assert wrong(full, half, name) > 5
    for name in ("bim", "apgd", "square"):
        assert torch.equal(verified.decisions.of(name).correct, full.decisions.of(name).correct), name
    assert torch.equal(verified.decisions.of("bim").correct, robust)


ROWS = ["gaussian", "bim", "pgd", "bim_l2", {"name": "apgd", "steps": 5}, {"name": "square", "queries": 20}]


def sensitive(seed: int, convolutions: bool = True) -> nn.Module:
    """Return a network with mixed predictions whose margins are small."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ConvNet() if convolutions else nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        net.eval()
        with torch.no_grad():
            x = torch.rand(32, 3, 8, 8)
            last = net[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(20.0 if convolutions else 3.0)
            last.bias.sub_(net(x).mean(0))
    return net


@settings(deadline=None, derandomize=True, max_examples=5)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(SEMANTICS), st.integers(1, 2))
def test_every_decision_is_float32s_at_its_point(seed: int, convolutions: bool, semantics: Any, restarts: int) -> None:
    net = sensitive(seed, convolutions)
    x = levels(24, 3, 8, 8, seed=seed)
    y = net(x).argmax(1)
    y[::9] = (y[::9] + 1) % 4
    points: dict[str, dict[int, tuple[Tensor, Tensor, Tensor]]] = {}
    keep = BatchAttacks._keep

    def kept(self: BatchAttacks, name: str, ended: Any, *rest: Any) -> None:
        found = zip(ended.indices.tolist(), ended.adversarial, ended.images, ended.labels, strict=True)
        points.setdefault(name, {}).update({key: others for key, *others in found})  # type: ignore[misc]
        keep(self, name, ended, *rest)

    given_ = {"eps": 0.02, "steps": 4, "semantics": semantics, "restarts": restarts, "attacks": ROWS, "batch_size": 8}
    full = evaluate(net, loader(x, y), **given_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchAttacks, "_keep", kept)
        verified = evaluate(net, loader(x, y), autocast="bf16-verified", **given_)
    for name in ("clean", "gaussian"):
        for one, other in zip(verified.decisions.of(name), full.decisions.of(name), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "bit for bit"
    for name, found in points.items():
        rows = verified.decisions.of(name)
        attacked, originals, labels = (torch.stack([found[key][k] for key in rows.sample.tolist()]) for k in range(3))
        scores = net(attacked)
        assert torch.equal(rows.prediction, scores.argmax(1)), "of float32 at the very point"
        torch.testing.assert_close(rows.loss, cross_entropy(scores, labels, reduction="none"), rtol=1e-4, atol=1e-4)
        if name in ("bim", "pgd", "apgd", "square"):
            assert (attacked - originals).abs().max() <= 0.02 + 1e-6
        assert wrong(full, verified, name) <= 1 if name != "square" else 3


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_float32_breaks_is_broken_and_hardly_anything_else(seed: int, semantics: Any) -> None:
    """A search in bfloat16 may find a point that float32's search missed, and that float32 confirms."""
    net = sensitive(seed)
    x = levels(64, 3, 8, 8, seed=seed)
    y = net(x).argmax(1)
    run = partial(evaluate, net, loader(x, y), eps=0.01, steps=4, semantics=semantics, attacks=["bim", "pgd"])
    full, verified = run(), run(autocast="bf16-verified")
    assert 5 < full["bim"].correct < 59
    for name in ("bim", "pgd"):
        assert not (verified.decisions.of(name).correct & ~full.decisions.of(name).correct).any()
        assert wrong(full, verified, name) <= (1 if semantics == "any" else 0)
    assert sum(one.near for one in verified.verified.values()) > 0


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_neither_batches_nor_order_decide_what_is_checked(semantics: Any) -> None:
    net = sensitive(4)
    x = levels(60, 3, 8, 8, seed=4)
    y, order = net(x).argmax(1), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    run = partial(evaluate, net, eps=0.01, steps=4, semantics=semantics, attacks=["bim"], autocast="bf16-verified")
    one = run(loader(x, y), batch_size=60).decisions.of("bim")
    other = run(loader(x[order], y[order], 7), batch_size=13).decisions.of("bim")
    first, second = torch.argsort(one.sample), torch.argsort(other.sample)
    assert torch.equal(one.sample[first], other.sample[second])
    assert torch.equal(one.checked[first], other.checked[second])
    assert torch.equal(one.prediction[first], other.prediction[second])


KINDS: list[tuple[Any, dict[str, Any]]] = [
    (["transfer"], {}),
    (["torchattacks.PGD", "torchattacks.FGSM"], {}),
    (["bim", "pgd"], {"rescale": 3.0}),
    (["bim"], {"fold": False}),
    ([{"name": "nearest", "attack": "bim", "bisections": 3}], {}),
    ([{"name": "targeted", "attack": "pgd", "targets": 2}], {}),
    ([{"name": "corruptions", "kinds": ["noise"], "severities": [3]}], {}),
]
SLOW = pytest.param(["sanity"], {}, marks=pytest.mark.slow)


@pytest.mark.parametrize(("attacks", "changes"), [*KINDS, SLOW], ids=str)
def test_all_kinds_of_attacks_are_verified(attacks: Any, changes: dict[str, Any]) -> None:
    net = sensitive(5)
    x = levels(24, 3, 8, 8, seed=5)
    y = net(x).argmax(1)
    other = sensitive(6) if attacks == ["transfer"] else None
    given_ = {"eps": 0.01, "steps": 3, "attacks": attacks, "surrogate": other, **changes}
    full, verified = (evaluate(net, loader(x, y), autocast=name, **given_) for name in (None, "bf16-verified"))
    assert list(full) == list(verified)
    assert not verified.not_evaluated
    assert sum(wrong(full, verified, name) for name in full) <= 1
    if not verified.settings["verification"]["attacks"]:
        assert verified.verified == {}
    else:
        followers = {name.removesuffix("_rescaled") for name in verified.verified}
        assert followers == set(verified.settings["verification"]["attacks"])


# --- which samples ----------------------------------------------------------------------------------------------------


def test_reach_is_relative_to_what_the_attack_achieved() -> None:
    clean, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0], [torch.nan, 0.0]]), torch.zeros(3, dtype=torch.long)
    found = reach(torch.tensor([-1.0, 0.5, 0.5]), clean, labels)
    assert found[:2].tolist() == pytest.approx([-1.0, 0.2])
    assert found[2].isnan()
    scaled = reach(torch.tensor([-7.0, 3.5, 0.5]), 7 * clean, labels)
    torch.testing.assert_close(found, scaled, equal_nan=True)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.integers(0, 10**6), st.integers(0, 20))
def test_what_is_repeated_depends_on_the_sample_alone(margins: list[float], seed: int, cut: int) -> None:
    closest = torch.tensor(margins)
    clean, labels = torch.tensor([[1.0, 0.0]]).repeat(len(margins), 1), torch.zeros(len(margins), dtype=torch.long)
    samples = list(range(seed, seed + len(margins)))
    whole = repeated(closest, clean, labels, samples, seed)
    parts = [
        repeated(closest[part], clean[part], labels[part], samples[part], seed)
        for part in (slice(cut), slice(cut, None))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole == NEAR, ~(reach(closest, clean, labels).abs() > BAND))
    assert set(whole.tolist()) <= {0, NEAR, AUDITED}


def test_the_audited_share_is_the_one_that_is_said() -> None:
    count = 20_000
    closest, clean = torch.full((count,), -5.0), torch.tensor([[9.0, 0.0]]).expand(count, 2)
    keys = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    for samples in (range(count), keys):
        found = repeated(closest, clean, torch.zeros(count, dtype=torch.long), list(samples), 3)
        assert float((found == AUDITED).double().mean()) == pytest.approx(AUDIT, abs=0.004)
    other = repeated(closest, clean, torch.zeros(count, dtype=torch.long), keys, 4)
    assert not torch.equal(found, other), "another seed draws others"


# --- what is said -----------------------------------------------------------------------------------------------------


def test_changed_decisions_are_counted() -> None:
    codes = torch.tensor([0] * 5 + [NEAR] * 4 + [NEAR + CHANGED] * 3 + [AUDITED] * 2 + [AUDITED + CHANGED])
    found = VerifiedDecisions.of(codes)
    assert found == VerifiedDecisions(15, 7, 3, 3, 1)
    assert verification_note({}) == ""
    assert verification_note({"bim": found, "pgd": found}) == (
        "bf16, verified: 66.7 % of 30 attacks repeated in full: 14 near the boundary (6 decisions changed), 6 others "
        "at random (2 changed)"
    )
    assert verification_warnings("bim", VerifiedDecisions(15, 7, 3, 3, 0)) == []
    (said,) = verification_warnings("bim", found)
    assert said.startswith("bim: 1 of 3 samples that were drawn at random")


class Misled(nn.Module):
    """A network whose gradient points the other way under autocast."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = 2 * x.detach() - x
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*does not raise the loss")
def test_an_attack_that_bfloat16_misleads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_normgeo.robustness.attacks.verification.AUDIT", 0.3)
    net = Misled(sensitive(7))
    x = levels(48, 3, 8, 8, seed=7)
    y = net(x).argmax(1)
    run = partial(evaluate, net, loader(x, y), eps=0.03, steps=4, attacks=["bim"], fold=False)
    with pytest.warns(MeasurementWarning, match=r"bim: \d+ of \d+ samples that were drawn at random away from"):
        report = run(autocast="bf16-verified")
    found = report.verified["bim"]
    assert found.audited_changed > 0.5 * found.audited > 2
    assert any("Leave autocast out for this model" in text for text in report.warnings)
    assert "changed)" in str(report)


def test_a_trainer_reports_what_was_verified(tmp_path: Path) -> None:
    callback = RobustnessEvaluation(autocast="bf16-verified", eps=0.01, steps=3, attacks=["gaussian", "bim", "pgd"])
    project, x = Project(net=sensitive(8)), levels(40, 3, 8, 8, seed=8)
    data = loader(x, project(x).argmax(1))
    trainer(callback, default_root_dir=tmp_path).test(project, data, verbose=False)
    (file,) = tmp_path.rglob("robustness.json")
    document = json.loads(file.read_text())
    assert document["settings"]["precision"] == "bf16-verified"
    expected = {"precision": "fp32", "band": BAND, "audit": AUDIT, "attacks": ["bim", "pgd"]}
    assert document["settings"]["verification"] == expected
    columns, table = detail_tables(document)["verified"]
    assert table == [[name, *counts.values()] for name, counts in document["verified"].items()]
    assert len(columns) == len(table[0])
    assert set(document["verified"]) == {"bim", "pgd"}
    loaded = load_decisions(file.parent)
    for name, counts in document["verified"].items():
        assert counts == vars(VerifiedDecisions.of(loaded.of(name).checked))
        assert counts["n"] == 40
        assert counts["near"] > 0
    (report,) = callback.reports.values()
    assert "bf16, verified: " in str(report)
    assert "bf16, verified: " in report._repr_html_()


def test_other_evaluations_write_what_they_wrote(tmp_path: Path) -> None:
    report = evaluate(sensitive(8), images(16), steps=2)
    report.save(tmp_path)
    document = json.loads((tmp_path / "robustness.json").read_text())
    assert "verified" not in document
    assert "verification" not in document["settings"]
    assert not any("checked" in key for key in report.decisions.arrays())
    assert not load_decisions(tmp_path).of("bim").checked.any()


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_resumed_evaluation_knows_what_was_checked(semantics: Any, tmp_path: Path) -> None:
    net, data = sensitive(8), images(48, batch_size=16)
    run = partial(evaluate, net, data, autocast="bf16-verified", eps=0.05, steps=3, batch_size=16, semantics=semantics)
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return net(x)  # type: ignore[no-any-return]

    def killed(x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return net(x)  # type: ignore[no-any-return]

    whole = run(logits=counted)
    left = [2 * len(calls) // 3]
    with pytest.raises(KeyboardInterrupt):
        run(logits=killed, resume_dir=tmp_path)
    assert list(tmp_path.glob("*.jsonl"))
    all_calls, calls = len(calls), []
    again = run(logits=counted, resume_dir=tmp_path)
    assert len(calls) < all_calls
    assert again.verified == whole.verified
    for name in whole.decisions.attacks:
        for column in ("prediction", "checked", "sample"):
            first, second = (getattr(one.decisions.of(name), column) for one in (whole, again))
            assert torch.equal(first, second), (name, column)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_weights_in_half_precision_are_refused() -> None:
    x = levels(8, 3, 8, 8).bfloat16()
    with pytest.raises(UnsuitableError, match=r"autocast='bf16-verified' verifies .* this model computes in bf16"):
        evaluate(ConvNet().eval().bfloat16(), loader(x, torch.zeros(8).long()), autocast="bf16-verified")


def test_logits_in_half_precision_are_refused() -> None:
    def logits(x: Tensor) -> Tensor:
        return net(x).half()

    net = ConvNet().eval()
    with pytest.raises(UnsuitableError, match="this model computes in fp16"):
        evaluate(net, images(8), logits=logits, autocast="bf16-verified", attacks=["gaussian"])


class WithTestData(Project):
    def test_dataloader(self) -> DataLoader[Any]:
        return images(8)


def test_a_trainer_in_half_precision_steps_aside_before_training(tmp_path: Path) -> None:
    callback = RobustnessEvaluation(autocast="bf16-verified", after_fit=True, steps=1)
    run = trainer(callback, steps=1, default_root_dir=tmp_path, precision="bf16-true")
    project = WithTestData()
    with pytest.warns(MeasurementWarning, match=r"not evaluated after fit.*this model computes in bf16"):
        run.fit(project, images(8))
    assert run.global_step == 1


class Random(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.randn(len(x), 4)  # type: ignore[no-any-return]


class Together(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x)
        return found - found.mean(0)


@pytest.mark.filterwarnings("ignore:The model is random", "ignore:The logits of an image")
@pytest.mark.parametrize("kind", [Random, Together])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_decisions_that_are_not_single_ones_are_computed_in_float32(kind: type[ConvNet], semantics: Any) -> None:
    torch.manual_seed(0)
    run = partial(evaluate, kind().eval(), images(16), steps=2, attacks=["bim"], semantics=semantics)
    with pytest.warns(MeasurementWarning, match="cannot be verified one by one"):
        verified = run(autocast="bf16-verified")
    with pytest.warns(MeasurementWarning):
        full = run()
    assert verified.settings["precision"] == "fp32"
    assert verified.verified == {}
    for one, other in zip(verified.decisions.of("bim"), full.decisions.of("bim"), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")  # torch's own
def test_a_compiled_model_is_verified() -> None:
    net = sensitive(9)
    x = levels(32, 3, 8, 8, seed=9)
    y = net(x).argmax(1)
    run = partial(evaluate, net, loader(x, y), eps=0.01, steps=3, attacks=["bim"], autocast="bf16-verified")
    plain, compiled = run(), run(compile=True)
    assert wrong(plain, compiled, "bim") == 0
