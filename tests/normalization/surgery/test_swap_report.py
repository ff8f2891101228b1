"""The report of swap_norm describes every change."""

from __future__ import annotations

import torch
from torch import nn

from lightning_normgeo.normalization import NORMS, swap_norm
from support.projects import ConvNet
from support.small_models import conv_bn, worn


def test_hooks_that_go_are_reported() -> None:
    for to in ("gn", "wn"):
        net = conv_bn()
        net[1].register_full_backward_hook(lambda *_: None)
        assert "its hooks dropped" in swap_norm(net, to).changes[0].note
    net = conv_bn()
    net[1].register_forward_hook(lambda *_: None)
    assert "hooks" not in swap_norm(net, "bn+ws").changes[0].note


def test_the_report_as_text() -> None:
    net = nn.Sequential(ConvNet(), nn.Unflatten(1, (2, 2)), nn.LayerNorm(2, eps=1e-12))
    report = swap_norm(net, "gn", groups=2, example_batch=torch.rand(2, 3, 8, 8))
    assert report.change < 1e-3  # normalized pairs are signs, which hide the preceding layer
    assert not report.kept
    changes, lost = [change.change for change in report.changes], "running mean dropped, running variance dropped"
    assert str(report) == "\n".join(
        [
            "to gn: 2 layers changed, 1 left alone, 670 -> 670 parameters",
            f"  function in evaluation mode: changed by {report.change:.2g} of its size, its layers by up to "
            f"{max(changes):.2g}, gn does not keep it",
            f"  0.1  BatchNorm2d -> GroupNorm(2 groups) ({lost}, changed by {changes[0]:.2g} of its size)",
            f"  0.4  BatchNorm2d -> GroupNorm(2 groups) ({lost}, changed by {changes[1]:.2g} of its size)",
            "  2    left alone: it normalizes the last dimension of its input, not channels (N, C, ...)",
        ]
    )
    net[1] = nn.Module()  # a model that cannot run
    report = swap_norm(net, "cwn", layers="0.4")
    assert report.change is report.changes[0].change is report.kept is None
    assert str(report) == "\n".join(
        [
            "to cwn: 1 layer changed, 2 left alone, 670 -> 662 parameters",
            "  function in evaluation mode: not measured: pass example_batch",
            "  weights in front found by the order in Sequentials alone, since the model was not run",
            "  0.4  GroupNorm(2 groups) -> Identity, weights of 0.3 (γ and β folded into weight and bias of 0.3)",
            "  0.1  left alone: layers='0.4' does not match it",
            "  2    left alone: layers='0.4' does not match it",
        ]
    )


def test_the_report_counts_parameters() -> None:
    for to in NORMS:
        net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(2, 6))
        report = swap_norm(net, to)
        assert report.to == to
        assert report.parameters_before == 4 * 6 * 9 + 12
        assert report.parameters_after == sum(p.numel() for p in net.parameters())


def test_what_was_never_to_keep_its_function_is_named_beside_what_was() -> None:
    net = nn.Sequential(*worn(conv_bn()), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.GroupNorm(2, 4))
    report = swap_norm(net, "wn", example_batch=torch.randn(2, 4, 9, 9))
    verdict = f"changed by {report.change:.2g} of its size by 4, wn keeps that of batch normalizations alone"
    assert str(report).splitlines()[1] == f"  function in evaluation mode: {verdict}"
    assert report.changes[0].change < 1e-5
    assert not report.keeps
