"""Models that are random, depend on the batch, write buffers or are not finite, detected on the first batch."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import evaluate_robustness
from lightning_normgeo.errors import MeasurementWarning, UnsuitableError
from lightning_normgeo.robustness import RobustnessSettings
from lightning_normgeo.robustness.inputs import class_logits
from lightning_normgeo.robustness.model.assumptions import check_assumptions
from support.projects import ConvNet, Project, images

X = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.arange(24) % 4


class Random(nn.Module):
    """Model with dropout that stays active in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x.flatten(1), 0.5, training=True))


class Mates(nn.Module):
    """Model that normalizes over the batch in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(192, 4)
        nn.init.normal_(self.net.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.net((x - x.mean(0)) / (x.std(0, correction=0) + 0.1))


class KeptTraining(nn.Module):
    """Batch normalization that a project keeps in training mode, so that it writes its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.net[1].train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Counting(nn.Module):
    """Model that observes the range of its inputs, as in quantization-aware training, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(192, 4)
        self.register_buffer("largest", torch.tensor(0.1))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.copy_(torch.maximum(self.largest, x.detach().max()))
        self.seen.resize_(len(x)).fill_(1)
        return self.net(x.flatten(1) / self.largest)


def looked_at(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Any:
    return check_assumptions(model.eval(), model, x, y, gradients=True)


def test_ordinary_models_have_nothing_to_say() -> None:
    for model in (ConvNet(), ConvNet().double(), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))):
        dtype = next(model.parameters()).dtype
        found = looked_at(model, X.to(dtype))
        assert (found.deterministic, found.independent, found.no_gradient, found.said) == (True, True, "", [])
        assert looked_at(model, X[:1].to(dtype), Y[:1]).said == []


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_randomness_and_batch_mates_are_told_apart(count: int) -> None:
    found = looked_at(Random(), X[:count], Y[:count])
    assert (found.deterministic, found.independent) == (False, False)
    assert "random in evaluation mode" in found.said[0]
    for model in (Mates(), KeptTraining(), Counting()):
        brightness = torch.linspace(0.1, 1.0, count)[:, None, None, None]
        found = looked_at(model, X[:count] * brightness, Y[:count])
        if count > 1 or isinstance(model, Mates):
            assert (found.deterministic, found.independent) == (True, False), type(model).__name__
            assert "depend on the other images of its batch" in found.said[0]


def test_the_test_leaves_buffers_and_random_numbers_alone() -> None:
    for model in (KeptTraining(), Counting(), Random()):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        objects = {name: id(value) for name, value in model.named_buffers()}
        looked_at(model)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert objects == {name: id(value) for name, value in model.named_buffers()}


@pytest.mark.parametrize("model", [KeptTraining, Counting])
@pytest.mark.parametrize("semantics", ["final", "any"])
def test_buffers_that_evaluation_writes_are_restored_bit_by_bit(model: Any, semantics: Any) -> None:
    network = model()
    if isinstance(network, Counting):
        network(X[:5])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that logits depend on the batch
        evaluate_robustness(network, loader(8), steps=2, progress=False, semantics=semantics)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def loader(size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=size)


def bim_of_batches(model: nn.Module, size: int, steps: int, any_iterate: bool) -> list[bool]:
    """Return a boolean for each sample: robust or not, in float64 and in the loader's batches."""
    model, robust = model.double(), []
    for x, y in zip(X.double().split(size), Y.split(size), strict=True):
        adversarial, stands = x.clone(), torch.ones(len(y), dtype=torch.bool)
        for _ in range(steps):
            adversarial.requires_grad_()
            scores = model(adversarial)
            stands &= scores.argmax(1) == y
            (slope,) = torch.autograd.grad(F.cross_entropy(scores, y, reduction="sum"), adversarial)
            moved = adversarial.detach() + 0.01 * slope.sign()
            adversarial = torch.min(torch.max(moved, x - 0.04), x + 0.04).clamp(0, 1)
        last = model(adversarial).argmax(1) == y
        robust += (stands & last if any_iterate else last).tolist()
    model.float()
    return robust


@pytest.mark.parametrize("semantics", ["final", "any"])
@pytest.mark.parametrize("size", [5, 8, 24])
def test_batches_stay_as_the_loader_gives_them_where_logits_depend_on_them(semantics: Any, size: int) -> None:
    torch.manual_seed(4)
    model = Mates()
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in X.split(size)])
    right[::5] = (right[::5] + 1) % 4
    global Y
    labels, Y = Y, right
    try:
        with pytest.warns(MeasurementWarning, match="accuracies hold for these batches only"):
            report = evaluate_robustness(
                model, loader(size), attacks=["bim"], eps=0.04, step_size=0.01, steps=6, semantics=semantics,
                progress=False, batch_size=16,
            )  # fmt: skip
        expected = bim_of_batches(model, size, 6, semantics == "any")
    finally:
        Y = labels
    assert report.decisions.of("bim").correct.tolist() == expected
    assert 0 < sum(expected) < 24
    assert report.settings["independent_of_batch"] is False


def test_samples_that_do_not_count_keep_their_batch_company() -> None:
    """Half of a batch is beyond the limit, but its statistics are those of the whole batch."""
    model = Mates()
    with pytest.warns(MeasurementWarning, match="other images"):
        few = evaluate_robustness(model, loader(8), attacks=["bim"], steps=2, max_samples=4, progress=False)
    with pytest.warns(MeasurementWarning, match="other images"):
        all_of_them = evaluate_robustness(model, loader(8), attacks=["bim"], steps=2, progress=False)
    for attack in ("clean", "bim"):
        assert few.results[attack].n == 4
        assert torch.equal(few.decisions.of(attack).loss, all_of_them.decisions.of(attack).loss[:4])


@pytest.mark.parametrize("fold", [True, False])
def test_a_random_model_has_one_result_for_one_seed(fold: bool) -> None:
    model, found = Random(), []
    for seed in (0, 1, 0):
        torch.manual_seed(100 + len(found))  # for any random state before
        with pytest.warns(MeasurementWarning, match="random in evaluation mode"):
            report = evaluate_robustness(
                model, loader(), attacks=["gaussian", "bim", "pgd"], steps=2, seed=seed, fold=fold, progress=False
            )
        found.append(report.decisions.of("bim").loss)
        assert report.settings["deterministic"] is False
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


# --- what is not finite -----------------------------------------------------------------------------------------------


class NotFinite(nn.Module):
    """Model with NaN for dark images, in the logits or only in the gradient."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.net, self.where = nn.Linear(192, 4), where

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x.flatten(1))
        dark = x.flatten(1).mean(1) < 0.5
        found = scores.clone()
        if self.where == "logits":
            found[dark] = scores[dark] * torch.nan
        else:
            level = x[dark].flatten(1).sum(1, keepdim=True)
            found[dark] = scores[dark] + 0 * (level - level).sqrt()
        return found


def test_predictions_that_are_not_finite_are_wrong_and_counted() -> None:
    model = NotFinite("logits")
    with torch.no_grad():
        scores = model(X)
    good = scores.isfinite().all(1)
    assert 3 < int(good.sum()) < 21
    with pytest.warns(MeasurementWarning) as seen:
        report = evaluate_robustness(model, loader(), attacks=["gaussian", "bim", "bim_l2"], progress=False)
    clean = report.results["clean"]
    assert clean.correct == int((good & (scores.argmax(1) == Y)).sum())
    assert clean.not_finite == int((~good).sum())
    assert math.isfinite(clean.loss)
    assert report.decisions.of("clean").prediction.tolist() == torch.where(good, scores.argmax(1), -1).tolist()
    assert any(
        f"clean: {clean.not_finite} of 24 images have logits that are not finite" in str(w.message) for w in seen
    )
    json.dumps(report.as_dict(), allow_nan=False)


class WithMaskedClass(nn.Module):
    """A classifier with one more class, which it masks with −∞, as models that learn classes one after another do."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.classifier(x), (0, 1), value=-math.inf)


@pytest.mark.parametrize("semantics", ["final", "any"])
def test_a_masked_class_changes_nothing(semantics: Any) -> None:
    model = ConvNet()
    attacks = ["gaussian", "bim", {"name": "margin", "attack": "bim", "loss": "margin"}, "pgd_l2"]
    masked, plain = (
        evaluate_robustness(net, loader(), attacks=attacks, steps=3, semantics=semantics, progress=False)
        for net in (WithMaskedClass(model), model)
    )
    assert masked.results == plain.results


def test_all_logits_nan_have_no_loss_and_no_accuracy_of_class_zero() -> None:
    model = ConvNet()
    with torch.no_grad():
        model[-1].weight.fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = evaluate_robustness(model, loader(), attacks=["bim"], steps=2, progress=False)
    for result in report.results.values():
        assert (result.correct, result.not_finite) == (0, 24)
        assert math.isnan(result.loss)
    assert [row["loss"] for row in report.as_dict()["results"]] == [None, None]


@pytest.mark.parametrize("attack", ["bim", "bim_l2", "pgd_l2"])
@pytest.mark.parametrize("semantics", ["final", "any"])
def test_a_gradient_that_is_not_finite_moves_no_image(attack: str, semantics: Any) -> None:
    model = NotFinite("gradient")
    with torch.no_grad():
        right = model(X).argmax(1)
    data = DataLoader(TensorDataset(X, right), batch_size=8)
    with pytest.warns(MeasurementWarning) as seen:
        report = evaluate_robustness(
            model, data, attacks=["bim", attack][attack == "bim" :], steps=3, semantics=semantics, progress=False
        )
    blind = int((report.decisions.of("clean").gradient == math.inf).sum())
    assert blind > 3
    assert any(f"gradient is not finite for {blind} of 24 images" in str(w.message) for w in seen)
    rows = report.decisions.of(attack)
    assert rows.prediction.ge(0).all()
    dark = X.flatten(1).mean(1) < 0.5
    if attack.startswith("bim"):
        assert (rows.linf[dark] == 0).all()
        assert rows.correct[dark].all()
    assert (rows.linf[~dark] > 0).all()


# --- outputs that are no logits of these labels -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 192)), "as many numbers as an image has"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Sigmoid()), "looks like a probability"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), r"Labels span 0…3, but the model has 3 classes"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"Expected logits \(batch, classes\)"),
        (nn.Flatten(0), r"Expected logits"),
        (nn.Linear(5, 4), "cannot be called with the images of a batch alone: RuntimeError"),
    ],
    ids=["reconstruction", "probability", "fewer classes", "map", "no batch", "other inputs"],
)
def test_outputs_that_are_no_logits_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsuitableError, match=message):
        looked_at(model, X, Y if message != "looks like a probability" else Y % 2)


def test_probabilities_are_evaluated_and_said() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(1))
    assert "returns probabilities" in looked_at(model).said[0]
    assert looked_at(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LogSoftmax(1))).said == []


def test_classes_that_no_label_has_are_said() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1000))
    data = DataLoader(TensorDataset(X.repeat(2, 1, 1, 1) * torch.rand(48, 1, 1, 1), Y.repeat(2)), batch_size=16)
    with pytest.warns(
        MeasurementWarning, match=r"of 48 clean images are given a class above the largest label .*\(3\)"
    ):
        evaluate_robustness(model, data, attacks=[], progress=False)


def test_a_logit_of_two_classes_is_attacked_as_its_own_loss_asks() -> None:
    """Compared with foolbox, and by hand with the binary cross entropy in float64."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    with torch.no_grad():
        net[1].bias.sub_(net(X).mean())
        y = (net(X)[:, 0] > 0).long()
    y[::6] = 1 - y[::6]
    x, wide, adversarial = X.double(), net.double(), X.double()
    for _ in range(10):
        adversarial = adversarial.detach().requires_grad_()
        loss = F.binary_cross_entropy_with_logits(wide(adversarial)[:, 0], y.double(), reduction="sum")
        (slope,) = torch.autograd.grad(loss, adversarial)
        moved = adversarial.detach() + 0.5 / 255 * slope.sign()
        adversarial = torch.min(torch.max(moved, x - 2 / 255), x + 2 / 255).clamp(0, 1)
    expected = ((wide(adversarial)[:, 0] > 0).long() == y).sum().item()
    net.float()
    data = DataLoader(TensorDataset(X, y.float()), batch_size=8)
    report = evaluate_robustness(net, data, attacks=["bim"], eps=2 / 255, progress=False)
    assert report.results["bim"].correct == expected
    assert 0 < expected < report.results["clean"].correct


def test_settings_without_a_gradient_attack_need_none() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvNet()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.net(x)  # type: ignore[no-any-return]

    model, data = Blind(), images(24)
    report = evaluate_robustness(model, data, attacks=["gaussian"], progress=False)
    assert report.results["gaussian"].n == 24
    with pytest.raises(UnsuitableError, match=r"bim, pgd cannot be evaluated: no gradient reaches the images"):
        evaluate_robustness(model, data, attacks=["gaussian", "bim", "pgd"], progress=False)
    with pytest.warns(MeasurementWarning, match="bim cannot be evaluated.*Clean images and noise are"):
        report = evaluate_robustness(model, data, attacks=["gaussian", "bim"], progress=False, on_unsuitable="skip")
    assert list(report.results) == ["clean", "gaussian"]
    assert list(report.not_evaluated) == ["bim"]
    assert "bim       not evaluated: no gradient reaches the images" in str(report)
    assert class_logits(model(X)).shape == (24, 4)
    assert RobustnessSettings().on_unsuitable == "raise"
    assert Project().net is not None
