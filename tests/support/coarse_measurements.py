"""Everything that the package measures, on the CPU and on an emulated device without float64, as one JSON document.

A script, since the device cannot be taken back: ``python coarse_measurements.py FILE`` writes for each measurement the
numbers of both, or the error of the device.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_normgeo as normgeo
from lightning_normgeo import geometry
from lightning_normgeo.symmetries import epsilon_charges, quantity_terms
from support import device_without_float64 as coarse
from support.plain_values import plain, tried
from support.projects import ConvNet, Optimizers, Project, Rows, images, sgd, trainer
from support.small_models import worn
from support.symmetric_networks import VisionTransformer

To = Callable[[Any], Any]
"""Moves a module or a tensor to the device in question."""
WITHOUT_MOMENTUM = {"lr": 0.01, "weight_decay": 0.1}
OPTIMIZERS: dict[str, Optimizers] = {
    "SGD": sgd(momentum=0.9, weight_decay=0.01),
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), **WITHOUT_MOMENTUM),
    "AdamW, rate in a tensor": lambda module: torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.01)),
    "Adafactor": lambda module: torch.optim.Adafactor(module.parameters(), **WITHOUT_MOMENTUM),
}


class AllRows(Rows):
    """A logger that stores all metrics."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return worn(ConvNet()).eval()


def transformer() -> nn.Module:
    network = VisionTransformer()
    network.patch, network.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 4)
    return network


def batch() -> Tensor:
    return next(iter(images(16, 16)))[0]


def settings(to: To) -> dict[str, Any]:
    return {} if to(torch.ones(1)).is_cpu else {"strategy": coarse.strategy(), "accelerator": "auto"}


def trained(
    to: To, optimizers: Optimizers, *callbacks: Any, network: Callable[[], nn.Module] = ConvNet, **more: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    project, rows = Project(optimizers, network()), AllRows()
    running = trainer(*callbacks, logger=rows, **settings(to), **more)
    running.fit(project, images())
    return {"rows": rows.rows, "weights": weights(project)}


def weights(module: nn.Module) -> dict[str, list[float]]:
    return {name: tensor.cpu().flatten().tolist() for name, tensor in module.state_dict().items()}


def monitors() -> list[Any]:
    return [
        normgeo.NormGrowthMonitor(1, layers="*", cumulative=True),
        normgeo.OrthogonalityMonitor(1, layers="*"),
        normgeo.AffineConvergenceMonitor(1, layers="*"),
        normgeo.SymmetryMonitor(1),
        normgeo.BatchGeometryMonitor(1),
    ]


def observed(name: str) -> Callable[[To], Any]:
    return lambda to: trained(to, OPTIMIZERS[name], *monitors())


def accumulated(to: To) -> Any:
    return trained(to, OPTIMIZERS["SGD"], *monitors(), accumulate_grad_batches=2, gradient_clip_val=0.5)


def unobserved(to: To) -> Any:
    return trained(to, OPTIMIZERS["SGD"])


def console(to: To) -> Any:
    """The lines at the start and at the end of a training."""
    lines: list[str] = []
    with mock.patch("lightning_normgeo.callbacks._monitors.session.rank_zero_info", lines.append):
        trained(to, OPTIMIZERS["SGD"], normgeo.NormGrowthMonitor())
    return lines


def residual_stream(to: To) -> Any:
    """Units of several layers together, in a transformer."""
    growth = normgeo.NormGrowthMonitor(1, layers="*", cumulative=True)
    with sdpa_kernel(SDPBackend.MATH):
        found = trained(to, OPTIMIZERS["SGD"], growth, normgeo.SymmetryMonitor(1), network=transformer)
    return found["rows"]


def on_spheres(to: To) -> Any:
    return trained(to, OPTIMIZERS["SGD"], normgeo.SphereProjection())


def summary(to: To) -> Any:
    callback = normgeo.EffectiveWeightsSummary()
    trained(to, OPTIMIZERS["SGD"], callback)
    return plain(callback.result.as_dict())


def effective(to: To) -> Any:
    return plain(normgeo.effective_weights(to(net()), to(batch())).as_dict())


def channels(to: To) -> Any:
    table = normgeo.channel_table(to(net()), to(batch()))
    return [plain(layer) for layer in table.layers.values()] + [plain(table.pair_counts())]


def masked(to: To) -> Any:
    callback = normgeo.ChannelEvaluation(criteria=["gamma", "pairs", "random"], ratios=[0.2, 0.5])
    project = Project(net=net())
    trainer(callback, inference_mode=False, **settings(to)).test(project, images(40), verbose=False)
    return plain(callback.report.results)


def inputs(to: To) -> Any:
    return plain(normgeo.batch_geometry(to(net().train()), to(batch())).layers)


def robustness(to: To) -> Any:
    attacks = ["gaussian", "bim", "pgd", "bim_l2", "pgd_l2"]
    rest: dict[str, Any] = {"attacks": attacks, "eps": 0.05, "steps": 2, "rescale": 4.0, "progress": False}
    found = {}
    for semantics in ("final", "any"):
        report = normgeo.evaluate_robustness(to(net()), images(24), semantics=semantics, **rest)
        found[semantics] = {name: [one.n, one.correct, one.loss] for name, one in report.results.items()}
    return found


def swapped(to: To) -> Any:
    module = to(net())
    report = normgeo.swap_norm(module, "wn", example_batch=to(batch()))
    return [str(report), plain(module(to(batch())))]


def symmetries(to: To) -> Any:
    """Search, charges, balance, and what ε and an optimizer do, of a transformer."""
    torch.manual_seed(0)
    module, example = to(transformer()), to(batch())
    with sdpa_kernel(SDPBackend.MATH):
        return of_symmetries(module, example)


def of_symmetries(module: nn.Module, example: Tensor) -> Any:
    found = normgeo.scale_symmetries(module, example)
    loss(module(example)).backward()
    named = dict(module.named_parameters())
    result = {
        "families": [str(family) for family in found.families],
        "charges": plain(found.charges(named)),
        "epsilon": plain(epsilon_charges(module, example, loss)[1]),
    }
    optimizer = torch.optim.AdamW(module.parameters(), **WITHOUT_MOMENTUM)
    optimizer.step()
    result["terms"] = plain(quantity_terms(found, module, optimizer))
    report = normgeo.balance(module, found)
    return result | {"balanced": str(report), "weights": weights(module)}


def loss(outputs: Tensor) -> Tensor:
    return outputs.log_softmax(-1)[:, 0].mean()


def reductions(to: To) -> Any:
    """The functions of the geometry, which compute on the device of their arguments."""
    torch.manual_seed(0)
    weight, gradient, new = (to(one) for one in torch.randn(3, 6, 20))
    rule = geometry.SGDRule(lr=0.1, weight_decay=0.01)
    activation = torch.randn(8, 4, 3, 3)
    moments = geometry.ChannelMoments()
    moments.add(to(activation))
    return {
        "update": plain(geometry.update_products(weight, new)),
        "terms": plain(geometry.norm_increment(rule, weight, gradient)),
        "moments": plain([moments.variance, moments.correlation]),
        "spectral": plain(geometry.convolution_norm(to(torch.randn(4, 3, 3, 3)), (6, 6), padding=1).value),
    }


MEASUREMENTS: dict[str, Callable[[To], Any]] = {
    **{f"monitors, {name}": observed(name) for name in OPTIMIZERS},
    "monitors, accumulated and clipped": accumulated,
    "monitors, transformer": residual_stream,
    "nothing observed": unobserved,
    "console": console,
    "spheres": on_spheres,
    "summary of effective weights": summary,
    "effective weights": effective,
    "channels": channels,
    "masked channels": masked,
    "inputs of layers": inputs,
    "robustness": robustness,
    "swapped normalization": swapped,
    "symmetries": symmetries,
    "reductions": reductions,
}


def main(file: str, *names: str) -> None:
    """Measure on the CPU, then on the device, in the folder of the file."""
    os.chdir(Path(file).parent)
    coarse.register()  # before the first backward pass, with which autograd starts a thread for each device
    chosen = {name: MEASUREMENTS[name] for name in names or MEASUREMENTS}
    found: dict[str, Any] = {name: {"cpu": tried(measure, lambda thing: thing)} for name, measure in chosen.items()}
    with coarse.device() as device:
        for name, measure in chosen.items():
            found[name]["device"] = tried(measure, lambda thing: thing.to(device))
    Path(file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
