"""Optimizers under the changes that trainings make, end to end: every increment is explained, or not claimed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import pytorch_optimizer
import timm.optim
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor
from support.named_optimizers import EXPLAINED, MATRICES_ONLY
from support.own_optimizers import Quantized, SignOfRoot
from support.projects import SAM, Fingerprint, same, trainer
from support.tensors import draw
from support.witness import Layers, Moved, Witness, is_weight, layer

TERMS = ("gradient", "momentum", "weight_decay", "quadratic")
PARTS = ("direction", "weight_decay", "quadratic")
STEPS = 5


KNOWN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD plain": torch.optim.SGD,
    "SGD decay": partial(torch.optim.SGD, weight_decay=0.1),
    "SGD momentum": partial(torch.optim.SGD, momentum=0.9, dampening=0.3, weight_decay=0.1, maximize=True),
    "Adam plain": torch.optim.Adam,
    "AdamW plain": partial(torch.optim.AdamW, foreach=True),
    "NAdam plain": torch.optim.NAdam,
    "RAdam plain": torch.optim.RAdam,
    "RMSprop plain": torch.optim.RMSprop,
    **EXPLAINED,
    **MATRICES_ONLY,
}
UNKNOWN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "LBFGS": partial(torch.optim.LBFGS, max_iter=3),
    "SAM": SAM,
    "Quantized": Quantized,
    "SignOfRoot": SignOfRoot,
    "SOAP": partial(pytorch_optimizer.SOAP, precondition_frequency=2),
    "ScheduleFreeAdamW": partial(pytorch_optimizer.ScheduleFreeAdamW, weight_decay=0.1),
    "ScheduleFreeSGD": pytorch_optimizer.ScheduleFreeSGD,
    "Prodigy": partial(pytorch_optimizer.Prodigy, weight_decay=0.1),
    "pytorch-optimizer LAMB": pytorch_optimizer.Lamb,
    "timm Adan": partial(timm.optim.Adan, weight_decay=0.1),
    "timm AdaBelief": timm.optim.AdaBelief,
    "timm RMSpropTF": partial(timm.optim.RMSpropTF, momentum=0.9),
    "timm NvNovoGrad": timm.optim.NvNovoGrad,
}
ALL = KNOWN | UNKNOWN


class Net(nn.Module):
    """Layers invariant by batch and layer normalization, and a control; ``late`` is trained once it has a group."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6, eps=1e-30)
        self.second, self.ln = nn.Linear(6, 5), nn.LayerNorm(5, eps=1e-30)
        self.late, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.first(x)).tanh()
        y = self.ln(self.second(y)).tanh()
        return self.head(y + self.late(y).tanh())


class Automatic(pl.LightningModule):
    """Automatic optimization of all but ``late``, or of matrices only, by one optimizer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.optimizer = Net().double(), name

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.made(self.chosen())

    def chosen(self) -> list[nn.Parameter]:
        only = 2 if self.optimizer in MATRICES_ONLY else 1
        return [p for n, p in self.net.named_parameters() if "late" not in n and p.ndim >= only]

    def made(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        lr = 1.0 if self.optimizer == "Prodigy" else 0.02
        optimizer = ALL[self.optimizer](parameters, lr=lr)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer


class WarmUp(Automatic):
    """Warm-up with η = 0 in the first step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Joining(Automatic):
    """Another parameter group from the third batch on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            (optimizer,) = self.trainer.optimizers
            optimizer.add_param_group({"params": [self.net.late.weight], "lr": 0.01})


class ByHand(Automatic):
    """Manual optimization with two backward passes of half a batch, and a closure if the optimizer needs one."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                losses = [Automatic.training_step(self, half, batch_idx) for half in self._halves(batch)]
                for loss in losses:
                    self.manual_backward(loss)
                return sum(losses)

            if self.optimizer in ("LBFGS", "SAM") and optimizer is not self.other:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

    other: Any = None

    def _halves(self, batch: Any) -> list[Any]:
        return list(zip(*(part.chunk(2) for part in batch), strict=True))


class Mixture(ByHand):
    """The tested optimizer for matrices, beside AdamW for the other parameters."""

    def configure_optimizers(self) -> Any:
        chosen = [p for p in self.chosen() if p is not self.net.head.weight][:3]
        ids = {id(p) for p in chosen}
        rest = [p for p in self.net.parameters() if id(p) not in ids]
        return self.made(chosen), torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)


SITUATIONS: dict[str, tuple[type[Automatic], dict[str, Any]]] = {
    "plain": (Automatic, {}),
    "clipped": (Automatic, {"gradient_clip_val": 0.05}),
    "accumulated": (Automatic, {"accumulate_grad_batches": 2}),
    "by hand": (ByHand, {}),
    "mixture": (Mixture, {}),
    "warm-up": (WarmUp, {}),
    "joining": (Joining, {}),
}


def batches(n: int) -> DataLoader[Any]:
    x, labels = draw(n * 12, 8, seed=3), torch.arange(n * 12) % 3
    return DataLoader(TensorDataset(x, labels), batch_size=12)


def train(name: str, situation: str, *callbacks: Any, **more: Any) -> Automatic:
    kind, settings = SITUATIONS[situation]
    module = kind(name)
    n = STEPS * settings.get("accumulate_grad_batches", 1)
    torch.manual_seed(3)
    trainer(*callbacks, steps=-1, max_epochs=1, **settings, **more).fit(module, batches(n))
    return module


def observe(name: str, situation: str) -> tuple[Layers, Witness]:
    """Train with and without monitors, which has to be equal bit for bit."""
    bare, observed, rows, witness = Fingerprint(), Fingerprint(), Layers(), Witness()
    train(name, situation, bare)
    monitors = NormGrowthMonitor(1, layers="*", cumulative=True), OrthogonalityMonitor(1, layers="*")
    train(name, situation, witness, *monitors, observed, logger=rows)
    assert len(bare.states) >= STEPS
    assert same(bare.states, observed.states)
    return rows, witness


def check(rows: Layers, witness: Witness, unknown: set[str]) -> None:
    """Check every layer of every step, and the number of weights without a formula, those of ``unknown`` optimizers."""
    assert rows.layers
    assert rows.layers.keys() == witness.moved.keys()
    for step, moved in witness.moved.items():
        weights = {layer(n): one for n, one in moved.items() if is_weight(n, one.before)}
        found = {group: rows.by_layer(step, group) for group in ("norm_growth", "norm_growth_control")}
        seen = [name for layers in found.values() for name, own in layers.items() if "weight_norm" in own]
        assert sorted(seen) == sorted(weights)
        scalars = dict(rows.rows)[step]
        for group, layers in found.items():
            here = {name: own for name, own in layers.items() if "weight_norm" in own}
            for name, own in here.items():
                check_layer(own, weights[name], moved.get(f"net.{name.removeprefix('net.')}.bias"))
            without = {name for name, own in here.items() if "identity_direction" in own}
            assert scalars.get(f"{group}/weights_without_formula", 0) == len(without)
            assert {weights[name].optimizer for name in without} == {weights[name].optimizer for name in here} & unknown


def check_layer(own: dict[str, float], weight: Moved, bias: Moved | None) -> None:
    parts = [weight]
    if bias is not None and own["weight_norm"] ** 2 > weight.weight_sq * (1 + 1e-9):
        parts.append(bias)  # for joint units
    weight_sq, truth = sum(p.weight_sq for p in parts), sum(p.increment for p in parts)
    rounding = 1e-12 * (sum(p.size for p in parts) + 1e-3 * weight_sq)
    assert own["weight_norm"] ** 2 == pytest.approx(weight_sq, rel=1e-12)
    assert abs(own["increment"] - truth) <= rounding
    if "predicted" in own:
        assert own["predicted"] == pytest.approx(sum(p.predicted for p in parts), rel=1e-12)
    explained = {f"term_{t}" for t in TERMS} | {"explained", "residual"}
    if "residual" in own:
        tolerance = 1e-12 * (sum(abs(own[f"term_{t}"]) for t in TERMS) + 1e-3 * weight_sq)
        assert explained <= own.keys()
        assert not any(key.startswith("identity_") for key in own)
        assert abs(own["residual"]) <= tolerance
        assert abs(sum(own[f"term_{t}"] for t in TERMS) - truth) <= tolerance
    else:
        assert explained.isdisjoint(own)
        identity = [own[f"identity_{part}"] for part in PARTS]
        assert abs(sum(identity) - truth) <= 1e-12 * (sum(map(abs, identity)) + 1e-3 * weight_sq)


def check_sums(rows: Layers, witness: Witness) -> None:
    """Check the cumulative increments since training began."""
    last = max(rows.layers)
    for group in ("norm_growth", "norm_growth_control"):
        for name, own in rows.by_layer(last, group).items():
            weight = witness.history[last][f"{name}.weight"]
            bias = witness.history[last].get(f"{name}.bias")
            sums = [weight] if group.endswith("control") or bias is None else [weight, bias]
            tolerance = 1e-12 * (sum(one.size for one in sums) + 1e-2 * sum(one.start for one in sums))
            truth = sum(one.now - one.start for one in sums)
            assert abs(own["cumulative_increment"] - truth) <= tolerance
            assert (
                abs(own.get("cumulative_residual", 0.0))
                <= 1e-12 * sum(abs(own.get(f"cumulative_term_{t}", 0.0)) for t in TERMS) + tolerance
            )


def is_possible(name: str, situation: str) -> bool:
    """Return whether the optimizer supports the situation: this SAM has one group; LBFGS keeps its first parameters."""
    return not (name in ("SAM", "LBFGS") and situation == "joining")


def run(name: str, situation: str) -> None:
    rows, witness = observe(name, situation)
    check(rows, witness, set() if name in KNOWN else {type(Automatic(name).configure_optimizers()).__name__})
    check_sums(rows, witness)


WHOLE = [(name, situation) for name in ALL for situation in SITUATIONS if is_possible(name, situation)]
DIAGONAL = [pair for k, pair in enumerate(WHOLE) if k % 8 == 0]
SAID = pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning", "ignore::UserWarning")


@SAID
@pytest.mark.parametrize(("name", "situation"), DIAGONAL)
def test_some_optimizers_in_some_trainings(name: str, situation: str) -> None:
    run(name, situation)


@SAID
@pytest.mark.slow
@pytest.mark.parametrize(("name", "situation"), WHOLE)
def test_every_optimizer_in_every_training(name: str, situation: str) -> None:
    run(name, situation)


def test_the_sample_has_every_situation_and_the_matrix_enough_optimizers() -> None:
    assert {situation for _, situation in DIAGONAL} == set(SITUATIONS)
    assert len(ALL) >= 25
