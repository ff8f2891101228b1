"""Joint units in monitors, and weights whose measured cosines contradict the autograd graph."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo import (
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    read_record,
    scale_invariant_units,
    swap_norm,
)
from lightning_normgeo.callbacks._monitors.units import unit_tracker
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.geometry import joined_products, split_update, update_products
from lightning_normgeo.normalization.autograd.graph import Graph
from support.projects import ConvNet, Project, images, trainer


def group_net(eps: float = 1e-40) -> nn.Module:
    """Convolutions with biases in front of group and layer normalizations."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(3, 6, eps=eps),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.GroupNorm(1, 8, eps=eps),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def decayed_apart(module: nn.Module) -> torch.optim.Optimizer:
    """Optimizer groups in which biases have another learning rate and no weight decay, as is usual."""
    weights = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim == 1]
    groups = [
        {"params": weights, "lr": 0.1, "weight_decay": 0.05},
        {"params": others, "lr": 0.3, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, momentum=0.9)


def observe(tmp_path: Path, project: Project, *callbacks: Any, **settings: Any) -> dict[str, list[float]]:
    logger = RecordLogger(str(tmp_path))
    data = images(160, dtype=torch.float64)
    trainer(*callbacks, logger=logger, **{"precision": "64-true", **settings}).fit(project.double(), data)
    return {key: [value for _, value in points] for key, points in read_record(logger.folder).metrics.items()}


def test_joint_units_are_measured_with_their_biases(tmp_path: Path) -> None:
    project = Project(decayed_apart, group_net())

    def squared_length() -> float:
        return sum(float(p.detach().square().sum()) for i in (0, 3) for p in project.net[i].parameters())

    project.double()
    start = squared_length()
    metrics = observe(tmp_path, project, OrthogonalityMonitor(), NormGrowthMonitor(layers="*"), steps=10)
    growth = squared_length() - start
    assert max(metrics["orthogonality/max_abs_cos"]) < 1e-12
    assert metrics["norm_growth/weight_norm"][0] == pytest.approx(start**0.5, rel=1e-12)
    assert sum(metrics["norm_growth/increment"]) == pytest.approx(growth, rel=1e-9)
    assert sum(metrics["norm_growth/explained"]) == pytest.approx(growth, rel=1e-9)
    # ⟨(W, b), g⟩ = 0, but with two learning rates the parts do not cancel in the increment
    assert max(map(abs, metrics["norm_growth/term_gradient"])) > 1e-6


def test_equation_16_holds_for_joint_units_with_two_learning_rates(tmp_path: Path) -> None:
    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [
                {"params": [p for p in module.parameters() if p.ndim > 1]},
                {"params": [p for p in module.parameters() if p.ndim == 1], "lr": 0.1},
            ],
            lr=0.1,
        )

    metrics = observe(tmp_path, Project(optimizer, group_net()), NormGrowthMonitor(layers="*"))
    for layer in ("net.0", "net.3"):
        assert metrics[f"norm_growth/increment/{layer}"] == pytest.approx(
            metrics[f"norm_growth/predicted/{layer}"], rel=1e-9
        )


def test_products_of_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    new_weight, new_bias = 1.3 * weight + 1e-6 * torch.randn_like(weight), 1.3 * bias + 1e-6 * torch.randn_like(bias)
    joint = joined_products(update_products(weight, new_weight), update_products(bias, new_bias))
    whole = update_products(torch.cat([weight, bias], 1), torch.cat([new_weight, new_bias], 1))
    torch.testing.assert_close(joint, whole, rtol=1e-10, atol=0)
    torch.testing.assert_close(split_update(joint).angle, split_update(whole).angle, rtol=1e-10, atol=0)


def test_units_of_parametrized_weights_are_measured(tmp_path: Path) -> None:
    net = ConvNet()
    swap_norm(net, "wn")
    metrics = observe(tmp_path, Project(net=net), OrthogonalityMonitor(layers="*"), NormGrowthMonitor(layers="*"))
    assert max(metrics["orthogonality/max_abs_cos"]) < 1e-12
    assert set(metrics) >= {f"orthogonality/max_abs_cos/net.{i}" for i in (0, 3)}
    assert metrics["norm_growth/increment/net.0"] == pytest.approx(metrics["norm_growth/predicted/net.0"], rel=1e-9)


def test_observing_spectral_normalization_runs_no_power_iteration(tmp_path: Path) -> None:
    """Reading ``layer.weight`` in training would change u and v, and with them the training."""
    states = []
    for callbacks in ([], [OrthogonalityMonitor(), NormGrowthMonitor()]):
        torch.manual_seed(0)
        net = ConvNet()
        swap_norm(net, "sn")
        project = Project(net=net)
        trainer(*callbacks, steps=6).fit(project, images(64))
        states.append(project.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class Leak(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Opaque(nn.Module):
    """The identity, written as an autograd function that no rule knows."""

    def forward(self, x: Tensor) -> Tensor:
        return Leak.apply(x)


def test_a_layer_whose_gradient_is_changed_is_named(tmp_path: Path) -> None:
    project = Project()
    weight = project.net[0].weight
    weight.register_hook(lambda gradient: gradient + 10 * weight.detach())
    with pytest.warns(
        MeasurementWarning, match=r"^net\.0\.weight: controls from here on.*something that changes gradients"
    ) as seen:
        metrics = observe(tmp_path, project, OrthogonalityMonitor(layers="*"))
    assert sum("controls from here on" in str(entry.message) for entry in seen) == 1
    assert "orthogonality/max_abs_cos/net.0" not in metrics
    assert len(metrics["orthogonality_control/max_abs_cos/net.0"]) == 4, "the first step is not lost"
    assert max(metrics["orthogonality/max_abs_cos"]) < 1e-3
    assert "net.3" not in str(seen[0].message)


def test_a_layer_that_is_invariant_for_an_unknown_reason_is_named(tmp_path: Path) -> None:
    net = ConvNet(eps=1e-30)
    net.insert(4, Opaque())
    with pytest.warns(
        MeasurementWarning, match=r"net\.3\.weight: orthogonal to their gradients.*controls all the same"
    ):
        metrics = observe(tmp_path, Project(net=net), OrthogonalityMonitor())
    assert metrics["orthogonality_control/max_abs_cos"]


class BackwardByHand(Project):
    """Project whose backward pass Lightning does not see, so that no graph is read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        nn.functional.cross_entropy(self(batch[0]), batch[1]).backward()
        optimizer.step()


def test_of_weights_in_no_graph_nobody_says_what_the_graph_shows(tmp_path: Path) -> None:
    with pytest.warns(MeasurementWarning, match="no backward pass of Lightning's was seen") as said:
        metrics = observe(tmp_path, BackwardByHand(net=ConvNet(eps=1e-30)), OrthogonalityMonitor(layers="*"))
    assert len([one for one in said if issubclass(one.category, MeasurementWarning)]) == 1
    assert min(metrics["orthogonality_control/rms_cos/net.3"]) < 1e-6, "it would have been said"


def test_agreement_and_clipping_by_value_are_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        observe(tmp_path / "a", Project(), OrthogonalityMonitor())
        clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
        observe(tmp_path / "b", Project(), OrthogonalityMonitor(), **clip)


@pytest.mark.parametrize("training", [True, False])
def test_finding_units_leaves_no_trace(training: bool) -> None:
    net = ConvNet()
    swap_norm(net, "sn", layers="1")
    net.insert(3, nn.Dropout(0.5))
    net.train(training)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    batch = torch.rand(2, 3, 8, 8)
    random = torch.get_rng_state()
    units = scale_invariant_units(net, batch)
    assert units["0"].kind == "matrix"
    assert units["4"].invariant is training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(module.training is training for module in net.modules())


def test_finding_units_leaves_a_module_with_two_names_alone() -> None:
    norm = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), norm)
    kept, before = norm.running_mean, {key: value.clone() for key, value in net.state_dict().items()}
    scale_invariant_units(net, torch.rand(3, 4, 8, 8))
    assert norm.running_mean is kept
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        return {"logits": self.linear(x * scale), "other": [3, "text"]}


def test_batches_of_several_arguments() -> None:
    x, scale = torch.rand(2, 4), torch.ones(4)
    units = scale_invariant_units(TwoInputs(), {"x": x, "scale": scale})
    assert units["linear"].reason == "it reaches the loss"
    assert scale_invariant_units(nn.Bilinear(4, 3, 2), (x, torch.rand(2, 3))).kinds == {"none": 1}


def test_frozen_and_unused_weights_are_listed_with_the_reason() -> None:
    net = nn.ModuleDict({"frozen": nn.Linear(4, 4), "idle": nn.Linear(4, 4), "used": nn.Linear(4, 4)})
    net["frozen"].requires_grad_(False)
    net.forward = lambda x: net["used"](net["frozen"](x))  # type: ignore[method-assign]
    units = scale_invariant_units(net, torch.rand(2, 4))
    assert units["frozen"].reason == "frozen: it has no gradient"
    assert units["idle"].reason == "no output depends on it"
    assert len(units) == 3
    assert "frozen" in str(units)
    with pytest.raises(KeyError, match="'nope' is none of the 3 weights; known are 'frozen'"):
        _ = units["nope"]


@pytest.mark.parametrize(
    ("module", "batch", "message"),
    [
        (
            ConvNet(),
            torch.rand(2, 5, 8, 8),
            r"ConvNet cannot take the example batch \(shape \(2, 5, 8, 8\)\): ",
        ),
        (ConvNet(), (torch.rand(2, 3, 8, 8), 1), r"ConvNet cannot take the example batch .*positional argument"),
        (ConvNet(), "images", r"ConvNet cannot take the example batch \(str\)"),
        (nn.Flatten(), torch.rand(2, 3), r"Flatten returned shape \(2, 3\), which depends on no trainable parameter"),
    ],
    ids=["shape", "arguments", "type", "no-parameters"],
)
def test_bad_batches(module: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        scale_invariant_units(module, batch)


def test_compiled_models_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot look into a compiled model\. Give it the model itself"):
        scale_invariant_units(torch.compile(ConvNet()), torch.rand(2, 3, 8, 8))


def test_a_graph_is_searched_once_and_recognized_after_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two alternating heads and a layer that is frozen half of the time: four graphs in eight measured steps."""
    searched: list[Any] = []
    original = unit_tracker.search
    monkeypatch.setattr(
        unit_tracker, "search", lambda module, graph, joint: (searched.append(graph), original(module, graph, joint))[1]
    )

    class Alternating(Project):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net[0].weight.requires_grad_(batch_idx % 4 < 2)
            y = nn.Sequential(*list(self.net)[:-1])(batch[0])
            return nn.functional.cross_entropy((self.net[-1] if batch_idx % 2 else self.other)(y), batch[1])

    logger = RecordLogger(str(tmp_path))
    trainer(NormGrowthMonitor(layers="*"), logger=logger, steps=8).fit(Alternating(), images(64))
    metrics = read_record(logger.folder).metrics
    assert len(searched) == 4
    assert [step for step, _ in metrics["norm_growth_control/increment/other"]] == [0, 2, 4, 6]
    assert [step for step, _ in metrics["norm_growth_control/increment/net.8"]] == [1, 3, 5, 7]
    assert [step for step, _ in metrics["norm_growth/increment/net.0"]] == [0, 1, 4, 5]


def test_a_graph_with_another_parameter_is_another_graph() -> None:
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    x = torch.rand(2, 3)
    first, again, other = (Graph(layers[i](x).sum()).signature for i in (0, 0, 1))
    assert first == again != other
    norm = nn.BatchNorm1d(3)
    training, evaluating = (Graph(norm.train(mode)(layers[0](x)).sum()).signature for mode in (True, False))
    assert training != evaluating


def test_of_what_no_graph_showed_weights_with_several_elements_in_a_unit_are_controls() -> None:
    net = nn.ModuleDict({"wide": nn.Linear(6, 1), "single": nn.Linear(1, 6), "gain": nn.LayerNorm(6)})
    found = unit_tracker.UnitTracker().unseen(net, list(net.parameters()), "of a gradient from elsewhere")
    assert [(one.units.name, one.units.count, one.units.invariant) for one in found] == [("wide.weight", 1, False)]
