"""What removing channels costs: masks, accuracies, intervals, and an unchanged model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import evaluate_robustness, masking
from lightning_normgeo.channels import MaskingReport, channel_table, masked_channels
from lightning_normgeo.channels.criteria import CRITERIA, DEFAULT
from lightning_normgeo.channels.masked_model import Partners
from lightning_normgeo.errors import ConfigurationError, UnsuitableError
from support.module_states import equal, fingerprint
from support.small_models import worn
from support.tensors import draw


def network(seed: int = 0) -> nn.Sequential:
    """Return a sensitive classifier of four classes, with channels of very different γ."""
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    )
    net = worn(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))).eval()
    with torch.no_grad():
        net[-1].weight.mul_(8)
        net[-1].bias.sub_(net(draw(200, 3, 6, 6).float()).mean(0))
    return net  # type: ignore[return-value]


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    x = draw(count, 3, 6, 6, seed=5).float()
    with torch.no_grad():
        y = network()(x).argmax(1)
    y[::5] = (y[::5] + 1) % 4  # a fifth of the labels is wrong
    return x, y


def loader(count: int = 40, size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(count)), batch_size=size)


def evaluated(**options: Any) -> MaskingReport:
    return masking(network(), loader(), progress=False, **options)


@pytest.mark.parametrize("replace", ["zero", "mean"])
def test_a_masked_model_is_a_zeroed_copy_bit_by_bit(replace: str) -> None:
    net, x = network(), images()[0]
    table = channel_table(net, x)
    keep = {
        name: torch.rand(8, generator=torch.Generator().manual_seed(k)) > 0.4 for k, name in enumerate(table.layers)
    }
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in keep.items():
            copied.get_submodule(name).weight[~mask] = 0
            if replace == "zero":
                copied.get_submodule(name).bias[~mask] = 0
        before = net(x)
        with masked_channels(net, keep, replace):
            assert torch.equal(net(x), copied(x))
            assert not torch.equal(net(x), before)
        assert torch.equal(net(x), before)


def zeroed(report: MaskingReport, criterion: str, ratio: float, replace: str) -> nn.Module:
    net = network()
    with torch.no_grad():
        for name, mask in report.keep(criterion, ratio).items():
            net.get_submodule(name).weight[~mask] = 0
            if replace == "zero":
                net.get_submodule(name).bias[~mask] = 0
    return net


def test_accuracies_are_those_of_zeroed_copies() -> None:
    report, (x, y) = evaluated(ratios=[0.1, 0.4]), images()
    assert len(report.results) == len(DEFAULT) * 2 * 2
    found = set()
    for result in report.results:
        net = zeroed(report, result.criterion, result.ratio, result.replace)
        with torch.no_grad():
            right = torch.cat([net(x[k : k + 16]).argmax(1) for k in range(0, 40, 16)]) == y
        assert (result.correct, result.n) == (int(right.sum()), 40)
        assert result.accuracy == result.correct / 40
        found.add(result.correct)
    assert report.clean is not None
    assert report.clean.correct == 32
    assert len(found) > 5, "the masks make a difference"


def test_intervals_are_wilsons() -> None:
    for result in evaluated(ratios=0.2).results:
        p, n, z = result.accuracy, result.n, 1.959963984540054
        middle = (p + z * z / 2 / n) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
        assert (result.ci_low, result.ci_high) == pytest.approx(
            (max(0, middle - half), min(1, middle + half)), abs=1e-12
        )
        assert result.accuracy_drop == pytest.approx(32 / 40 - p)


def test_masks_by_gamma_are_those_of_network_slimming() -> None:
    report, net = evaluated(ratios=[0.25], criteria="gamma"), network()
    gamma = torch.cat([net[1].weight, net[4].weight]).abs().detach()
    threshold = sorted(gamma.tolist())[int(16 * 0.25)]
    keep = torch.cat(list(report.keep("gamma", 0.25).values()))
    assert keep.tolist() == [value > threshold for value in gamma.tolist()]
    assert report.results[0].removed == 5
    assert report.results[0].removed_share == 5 / 16


def test_all_criteria_remove_the_same_number_of_the_same_channels() -> None:
    report = evaluated(ratios=[0.3])
    assert {result.removed for result in report.results} == {5}
    assert (report.settings["channels"], report.settings["candidates"]) == (16, 16)


def test_the_model_the_random_numbers_and_the_mode_are_unchanged() -> None:
    net = nn.Sequential(*network(), nn.Dropout(0.4)).train()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = fingerprint(net)
    masking(net, loader(), replace=["zero", "mean", "partner"], progress=False)
    assert equal(before, fingerprint(net))


def test_partners_take_the_place_of_copies_at_no_cost() -> None:
    """With every channel of the first layer doubled, half of them can be removed without any effect."""
    net = network()
    with torch.no_grad():
        for k in range(4):
            net[0].weight[k + 4], net[0].bias[k + 4] = 2 * net[0].weight[k], 2 * net[0].bias[k]
            net[1].weight[k + 4], net[1].bias[k + 4] = 3 * net[1].weight[k], 3 * net[1].bias[k]
            net[1].running_mean[k + 4] = 2 * net[1].running_mean[k]
            net[1].running_var[k + 4] = 4 * net[1].running_var[k]
        net[1].eps = 1e-12
    report = masking(
        net, loader(), ratios=[0.2], criteria=["pairs", "similar"], replace=["zero", "partner"], progress=False
    )
    assert report.clean is not None
    by_name = {(result.criterion, result.replace): result for result in report.results}
    kept = report.keep("pairs", 0.2)["1"]
    assert int((~kept).sum()) == 4
    assert all(bool(kept[k]) != bool(kept[k + 4]) for k in range(4))
    assert by_name["pairs", "partner"].correct == report.clean.correct
    assert by_name["pairs", "zero"].correct != report.clean.correct
    assert report.keep("similar", 0.2)["1"].tolist() != kept.tolist()


def test_partner_reads_a_multiple_of_another_output() -> None:
    net, x = network(), images()[0]
    partners = {"1": Partners(torch.tensor([0, 0, 2, 3, 4, 5, 6, 2]), torch.tensor([1.0, 3, 1, 1, 1, 1, 1, -0.5]))}
    with torch.no_grad():
        before = net[:2](x)
        with masked_channels(net, {"1": torch.ones(8, dtype=torch.bool)}, "partner", partners):
            after = net[:2](x)
        assert torch.equal(net[:2](x), before)
    assert torch.equal(after[:, 1], 3 * before[:, 0])
    assert torch.equal(after[:, 7], -0.5 * before[:, 2])
    assert torch.equal(after[:, 2:7], before[:, 2:7])


def test_before_training_gamma_has_no_order() -> None:
    """All |γ| are 1: the published rule removes all of them, and the report says so."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    report = masking(net, loader(), ratios=0.25, criteria=["gamma", "share"], replace="zero", progress=False)
    by_gamma, by_share = report.results
    assert (by_gamma.removed, by_gamma.emptied) == (8, 1)
    assert (by_share.removed, by_share.emptied) == (3, 0)


def test_indices_are_those_that_torch_pruning_takes() -> None:
    report = evaluated(ratios=[0.3], criteria=["share", "random"])
    for criterion in ("share", "random"):
        idxs, keep = report.pruning_idxs(criterion, 0.3), report.keep(criterion, 0.3)
        assert idxs == {name: [k for k in range(8) if not mask[k]] for name, mask in keep.items() if not mask.all()}
        assert sum(map(len, idxs.values())) == 5
    with pytest.raises(ConfigurationError, match=r"no mask of criterion='gamma', ratio=0\.3; known are share 0\.3"):
        report.pruning_idxs("gamma", 0.3)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(6, 10, 3, padding=1),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 6, 3, padding=1),
            nn.BatchNorm2d(6),
        )
        self.head = nn.Linear(6, 4)
        worn(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head((y + self.block(y)).relu().mean((2, 3)))


def test_channels_of_a_stream_are_masked_in_one_layer_and_pruned_in_none() -> None:
    report = masking(Residual(), loader(), ratios=0.5, criteria="random", replace="zero", progress=False)
    assert report.settings["candidates"] == 22
    assert not all(mask.all() for name, mask in report.keep("random", 0.5).items() if name != "block.1")
    assert list(report.pruning_idxs("random", 0.5)) == ["block.1"]
    alone = masking(Residual(), loader(), 0.5, "random", "zero", streams=False, progress=False)
    assert alone.settings["candidates"] == 10
    assert all(mask.all() for name, mask in alone.keep("random", 0.5).items() if name != "block.1")


def test_a_criterion_that_few_channels_have_is_left_out() -> None:
    net = network()
    net[2], net[5] = nn.ReLU6(), nn.ReLU6()
    report = masking(net, loader(), ratios=0.2, replace="zero", progress=False)
    assert set(report.left_out) == {"product", "share", "share_shuffled"}
    assert report.left_out["share"].startswith("known for 0 of 16 channels only: its scale does not pass: Hardtanh")
    assert [result.criterion for result in report.results] == ["gamma", "similar", "pairs", "random"]
    assert "share is not compared" in str(report)
    with pytest.raises(UnsuitableError, match="No channel can be ranked"):
        masking(net, loader(), criteria="share", progress=False)


@pytest.mark.parametrize(("label", "message"), [(-100, "A label below 0"), (9, "an output for each class")])
def test_a_label_that_is_no_class_is_refused_in_any_batch(label: int, message: str) -> None:
    images, labels = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    labels[-1] = label
    with pytest.raises(UnsuitableError, match=message):
        masking(network(), DataLoader(TensorDataset(images, labels), 16), criteria="gamma", progress=False)


class Several(nn.Module):
    """A network that returns further tensors beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Any:
        return self.net(x), x, x


@pytest.mark.parametrize(
    ("net", "batch", "method"),
    [
        (Several(), [images(8)[0].sigmoid(), images(8)[1]], "logits"),
        (network(), (images(8)[0], images(8)[1] + 0.5), "unpack"),
        (network(), (images(8)[0], images(8)[1][:, None, None]), "unpack"),
        (network(), {"x": images(8)[0], "more": images(8)[0]}, "unpack"),
    ],
    ids=["outputs", "no whole numbers", "masks", "no labels"],
)
def test_advice_names_the_function_that_was_called(net: nn.Module, batch: Any, method: str) -> None:
    message = rf"Override ChannelEvaluation\.{method}, or give masking\({method}=…\),"
    with pytest.raises(UnsuitableError, match=message) as raised:
        masking(net, [batch], progress=False)
    assert "obustness" not in str(raised.value)
    with pytest.raises(UnsuitableError, match=rf"Override RobustnessEvaluation\.{method}, or give evaluate_robustness"):
        evaluate_robustness(net, [batch], progress=False)


def test_the_random_control_follows_its_seed() -> None:
    one, same, other = (evaluated(ratios=0.4, criteria="random", seed=seed) for seed in (1, 1, 2))
    masks = [torch.cat(list(report.keep("random", 0.4).values())).tolist() for report in (one, same, other)]
    assert masks[0] == masks[1] != masks[2]


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name.endswith("_shuffled")])
def test_the_shuffled_control_removes_as_many_channels_of_each_layer(criterion: str) -> None:
    base = criterion.removesuffix("_shuffled")
    report = evaluated(ratios=[0.2, 0.5], criteria=[base, criterion])
    for ratio in (0.2, 0.5):
        kept, drawn = report.keep(base, ratio), report.keep(criterion, ratio)
        assert {name: int(mask.sum()) for name, mask in kept.items()} == {n: int(m.sum()) for n, m in drawn.items()}
    assert any(not torch.equal(report.keep(base, 0.5)[name], report.keep(criterion, 0.5)[name]) for name in ("1", "4"))


def test_text_frame_and_document() -> None:
    report = evaluated(ratios=[0.1, 0.3], criteria=["gamma", "random"])
    text = str(report)
    assert "whole network" in text
    assert "16 of 16 channels; 40 images" in text
    assert len(report.to_frame()) == 8
    document = report.as_dict()
    assert document["clean"]["correct"] == 32
    assert document["pairs"]["pairs"] == 56
    assert document["layers"]["1"]["channels"] == 8
    assert repr(report) == "MaskingReport(80.00 % of 40, 8 conditions)"
    assert "<table" in report._repr_html_()


def test_batches_can_be_limited_and_samples_count_once() -> None:
    assert evaluated(ratios=0.2, criteria="gamma", limit_batches=1).results[0].n == 16
    (x, y) = images()
    again = [(x[:16], y[:16]), (x[16:], y[16:]), (x[:16], y[:16])]
    assert masking(network(), again, ratios=0.2, criteria="gamma", progress=False).results[0].n in (40, 56)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [0.1, 1.0]}, r"ratios=\[1\.0\] must be shares of channels to remove, between 0 and 1"),
        ({"ratios": []}, "ratios=.* must be shares"),
        ({"ratios": "half"}, "ratios='half' must be a number between 0 and 1"),
        ({"criteria": "gama"}, "criteria='gama' is unknown; did you mean 'gamma'"),
        ({"criteria": []}, r"criteria=\[\] names nothing"),
        ({"replace": "median"}, "replace='median' is unknown"),
        ({"replace": "partner", "criteria": ["gamma"]}, "possible for the criteria 'similar' and 'pairs' only"),
        ({"seed": -1}, "seed=-1 must be an integer, at least 0"),
        ({"limit_batches": 0}, "limit_batches=0 must be an integer, at least 1"),
        ({"streams": "no"}, "streams='no' must be True or False"),
        ({"progress": 3}, "progress=3 must be True or False"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        masking(network(), loader(), **{"progress": False, **options})


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(UnsuitableError, match="no batch normalization"):
        masking(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), loader(), progress=False)
    with pytest.raises(UnsuitableError, match="not whole numbers"):
        masking(network(), [(images()[0], torch.rand(40))], progress=False)
    with pytest.raises(UnsuitableError, match="there are no samples"):
        masking(network(), [], progress=False)
    with pytest.raises(ConfigurationError, match="yields no batches"):
        masking(network(), 3, progress=False)  # type: ignore[arg-type]


def test_masks_that_do_not_fit_are_refused() -> None:
    mask = torch.ones(8, dtype=torch.bool)
    for keep, message in (
        ({"7": mask}, "'7', which is no batch normalization"),
        ({"1": mask[:3]}, "one bool for each of its 8 channels"),
        ({"1": mask.float()}, "one bool for each of its 8 channels"),
    ):
        with pytest.raises(ConfigurationError, match=message), masked_channels(network(), keep):
            pass
    with (
        pytest.raises(ConfigurationError, match="needs the partners"),
        masked_channels(network(), {"1": mask}, "partner"),
    ):
        pass
