"""Gradients that belong to other weights than those that the optimizer moves, as in SAM written by hand."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor, SymmetryMonitor
from support.projects import ConvNet, Fingerprint, Project, Rows, images, same, sgd, trainer
from support.witness import Witness, layer

ELSEWHERE = "weights were changed between the backward pass and the optimizer's step"
RAISED = "an exception ended the optimizer's step"
AT_ANOTHER_POINT = ("orthogonality", "symmetry")
PREDICTED = ("predicted", "predicted_momentum", "eq16_applies")
Edit = Callable[[nn.Parameter, Tensor], None]


def in_place(parameter: nn.Parameter, by: Tensor) -> None:
    with torch.no_grad():
        parameter.add_(by)


def replaced(parameter: nn.Parameter, by: Tensor) -> None:
    parameter.data = parameter.data + by


def through_data(parameter: nn.Parameter, by: Tensor) -> None:
    parameter.data.add_(by)


class ByHand(Project):
    """SAM without an optimizer of its own: W moves along the gradient at W + e."""

    edit: Edit = staticmethod(in_place)

    def __init__(self, edit: Edit = in_place) -> None:
        super().__init__(sgd(momentum=0.9, weight_decay=1e-3), ConvNet(1e-12))
        self.double()
        self.edit = edit

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def perturb(self) -> None:
        self.moves = [0.05 * p.grad / p.grad.norm() for p in self.parameters()]
        for parameter, move in zip(self.parameters(), self.moves, strict=True):
            self.edit(parameter, move)

    def restore(self) -> None:
        for parameter, move in zip(self.parameters(), self.moves, strict=True):
            self.edit(parameter, -move)


class Manual(ByHand):
    automatic_optimization = False
    seen = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        backward = self.manual_backward if self.seen else torch.Tensor.backward
        optimizer.zero_grad()
        backward(self.loss(batch))
        self.perturb()
        optimizer.zero_grad()
        backward(self.loss(batch))
        self.restore()
        optimizer.step()


class Unseen(Manual):
    seen = False


class Summed(Manual):
    """The gradient is the sum of those at W + e and at W."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.perturb()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.restore()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class InSteps(ByHand):
    """Automatic optimization: the training step perturbs the weights, a hook restores them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.loss(batch).backward()
        self.perturb()
        return self.loss(batch)

    def on_after_backward(self) -> None:
        self.restore()


class InBackward(ByHand):
    """Both backward passes are one of Lightning's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batch = batch
        return self.loss(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.perturb()
        self.zero_grad()
        self.loss(self.batch).backward()
        self.restore()


def observed(
    project: Callable[[], Any], data: Any = None, others: Callable[[], list[Any]] = list, **settings: Any
) -> tuple[Rows, Witness, Any, list[str]]:
    """Train bare and with all monitors; weights and random numbers have to be equal."""
    states, data = [], data or images(24, dtype=torch.float64)
    rows, witness = Rows(), Witness()
    monitors = [
        OrthogonalityMonitor(1, layers="*"),
        NormGrowthMonitor(1, layers="*", cumulative=True),
        AffineConvergenceMonitor(1),
        SymmetryMonitor(1),
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for callbacks, logger in ((), False), ((witness, *monitors), rows):
            torch.manual_seed(3)
            fingerprint = Fingerprint()
            settings = {"max_epochs": 1, **settings}
            trainer(*callbacks, *others(), fingerprint, logger=logger, steps=-1, **settings).fit(project(), data)
            states.append(fingerprint.states)
    assert states[0]
    assert same(*states)
    return rows, witness, monitors[0].left_out, [str(one.message) for one in said]


def check_increments(rows: Rows, witness: Witness) -> None:
    for step, metrics in rows.rows:
        for name, moved in witness.moved[step].items():
            for group in ("norm_growth", "norm_growth_control"):
                for quantity in ("increment", "explained"):
                    found = metrics.get(f"{group}/{quantity}/{layer(name)}", moved.increment)
                    assert found == pytest.approx(moved.increment, rel=1e-9, abs=1e-12 * moved.weight_sq)


def of_the_gradient(keys: Any) -> list[str]:
    """Return the keys that only a gradient at W can have."""
    return [
        key
        for key in keys
        if key.startswith(AT_ANOTHER_POINT) or key.split("/")[1].removeprefix("cumulative_") in PREDICTED
    ]


@pytest.mark.parametrize(
    "project",
    [
        Manual,
        lambda: Manual(replaced),
        lambda: Manual(through_data),
        Unseen,
        lambda: Unseen(through_data),
        Summed,
        InSteps,
        lambda: InSteps(through_data),
        InBackward,
    ],
    ids=["manual", "replaced", "data", "unseen", "unseen-data", "summed", "steps", "steps-data", "backward"],
)
def test_a_gradient_of_other_weights_is_not_taken_for_that_of_the_weights(project: Callable[[], Project]) -> None:
    rows, witness, left_out, said = observed(project)
    assert rows.steps == [0, 1, 2]
    assert of_the_gradient(rows.curves) == []
    assert "affine/abs_gamma2_minus_sigma2_mean" in rows.curves
    assert "norm_growth_control/cumulative_explained" in rows.curves
    check_increments(rows, witness)
    assert left_out[ELSEWHERE] == 3
    assert sum(ELSEWHERE in text for text in said) == 1


def test_in_compiled_code_a_gradient_of_other_weights_is_found_without_hooks(monkeypatch: Any) -> None:
    monkeypatch.setattr("lightning_normgeo.callbacks._monitors.observer.runs_compiled_code", lambda module: True)
    rows, _, left_out, _ = observed(InBackward)
    assert of_the_gradient(rows.curves) == []
    assert left_out[ELSEWHERE] == 3


class Part(Manual):
    """SAM that perturbs the parameters of normalizations alone."""

    def perturb(self) -> None:
        super().perturb()
        for parameter, move in zip(self.parameters(), self.moves, strict=True):
            if parameter.ndim > 1:
                self.edit(parameter, -move)


# Changes of weights that are no reason to leave anything out


class Clamped(Project):
    """A critic of WGAN: weights are clamped after the step, and gradients of several losses are summed up."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            for parameter in self.parameters():
                parameter.data.clamp_(-0.5, 0.5)
            optimizer.zero_grad()
            for half in (0, 4):
                x, y = batch[0][half : half + 4], batch[1][half : half + 4]
                self.manual_backward(nn.functional.cross_entropy(self(x), y))
            optimizer.step()


class Validated(Project):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def val_dataloader(self) -> Any:
        return images(8, dtype=torch.float64)


def double(kind: type[Project]) -> Callable[[], Project]:
    return lambda: kind(sgd(momentum=0.9), ConvNet(1e-12)).double()


@pytest.mark.parametrize(
    ("project", "settings", "others"),
    [
        (Clamped, {}, list),
        (Project, {"gradient_clip_val": 0.01}, list),
        (
            Validated,
            {"accumulate_grad_batches": 3, "val_check_interval": 2, "num_sanity_val_steps": 0},
            lambda: [EMAWeightAveraging(decay=0.9)],
        ),
    ],
    ids=["clamped", "clipped", "averaged"],
)
def test_gradients_at_the_weights_are_measured(project: type[Project], settings: Any, others: Any) -> None:
    rows, witness, left_out, _ = observed(double(project), others=others, **settings)
    assert not left_out
    assert rows.rows
    for step, metrics in rows.rows:
        for name in ("net.0.weight", "net.3.weight"):
            cosine = float(witness.moved[step][name].cosines.max())
            assert metrics[f"orthogonality/max_abs_cos/{layer(name)}"] == pytest.approx(cosine, rel=1e-6, abs=1e-14)


# Steps that an exception ended


class Raises(Project):
    """Manual optimization in which one closure raises an exception that is caught."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            if batch_idx == 1:
                raise ArithmeticError("a loss that the project does not want")
            self.manual_backward(loss)
            return loss

        with contextlib.suppress(ArithmeticError):
            optimizer.step(closure)


def test_a_step_whose_closure_raised_is_left_out() -> None:
    rows, witness, left_out, _ = observed(double(Raises))
    assert len(rows.rows) == 2
    assert all("norm_growth/increment" in metrics for _, metrics in rows.rows)
    assert left_out == {RAISED: 1}
    check_increments(rows, witness)


class Retries(Raises):
    """The step is repeated in the same batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if batch_idx == 1:
            super().training_step(batch, 7)


def test_a_step_that_is_taken_again_after_an_exception_is_measured() -> None:
    rows, _, left_out, _ = observed(double(Retries))
    assert [step for step, _ in rows.rows] == [0, 1, 2]
    assert all("norm_growth/increment" in metrics for _, metrics in rows.rows)
    assert left_out == {RAISED: 1}
