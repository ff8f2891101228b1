"""FSDP2 with two real processes that share every weight: results equal those of one process up to rounding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normgeo import AffineConvergenceMonitor, NormGrowthMonitor, OrthogonalityMonitor
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.sharded.reader import ShardedIncrements
from lightning_normgeo.probes.sharded.shards import Shards
from lightning_normgeo.probes.step_in_progress import ELSEWHERE
from lightning_normgeo.symmetries.units.discovery import search
from support.fsdp_models import BATCH, SAME_AS_ONE, Divided, Zoo, batch_norms, divided_trainer, samples
from support.fsdp_training import observed
from support.isolation import SUPPORT
from support.processes import reports_of
from support.projects import Rows
from support.sharded_rows import KINDS, assert_close

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 does not run on CPUs"
)
SCRIPT = SUPPORT / "fsdp_training.py"
Ranks = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, reports_of(SCRIPT, folder)


@pytest.mark.parametrize("name", SAME_AS_ONE)
def test_two_processes_find_what_one_finds(two: Ranks, name: str) -> None:
    _, ranks = two
    alone = observed(1, name)
    for found in ranks:
        assert_close(found[name]["rows"], alone["rows"])
        assert found[name]["watched"].keys() == alone["watched"].keys()
    assert ranks[0][name] == ranks[1][name], "every process knows the same, bit for bit"
    assert ranks[0][name]["left_out"] == alone["left_out"]
    row = ranks[0][name]["rows"][0][1]
    for group, layers in KINDS.items():
        assert sorted(key for key in row if key.startswith(f"{group}/weight_norm/")) == [
            f"{group}/weight_norm/net.{layer}" for layer in layers
        ]


def test_cosines_are_those_of_autograd(two: Ranks) -> None:
    """The first step of plain SGD, computed from the definition for every kind of unit."""
    _, ranks = two
    torch.manual_seed(0)
    net = Zoo().double()
    x, y = samples()
    nn.functional.cross_entropy(net(x[:BATCH]), y[:BATCH]).backward()
    units = {
        "group.0": lambda t: t.reshape(3, -1),
        "up_filters.0": lambda t: t.transpose(0, 1).flatten(1),
        "one_row.0": lambda t: t.flatten(1),
        "head": lambda t: t,
    }
    for name, by_unit in units.items():
        weight = net.get_submodule(name).weight
        pairs = zip(by_unit(weight.detach()), by_unit(weight.grad), strict=True)
        cosines = torch.stack([w.flatten() @ g.flatten() / w.norm() / g.norm() for w, g in pairs])
        row = ranks[0]["sgd"]["rows"][0][1]
        group = "orthogonality_control" if name == "head" else "orthogonality"
        largest, size = float(cosines.abs().max()), float(cosines.square().mean().sqrt())
        assert row[f"{group}/max_abs_cos/net.{name}"] == pytest.approx(largest, rel=1e-8, abs=1e-12)
        assert row[f"{group}/rms_cos/net.{name}"] == pytest.approx(size, rel=1e-8, abs=1e-12)
    joint = torch.cat([p.detach().flatten() for p in net.joint.parameters()])
    gradient = torch.cat([p.grad.flatten() for p in net.joint.parameters()])
    inner = float(joint @ gradient / joint.norm() / gradient.norm())
    assert row["orthogonality/max_abs_cos/net.joint"] == pytest.approx(abs(inner), rel=1e-8, abs=1e-12)


def test_one_collective_more_per_measured_step_and_none_otherwise(two: Ranks) -> None:
    """Gradients are accumulated over two batches, and every second step is measured: once in four batches."""
    for found in two[1]:
        counts = found["collectives"]
        bare = counts.pop("bare")
        assert counts.pop("statistics") == bare
        assert set(counts) == {"observed", "cumulative"}
        for batches in counts.values():
            more = [
                (all_ - without, calls - before) for (all_, calls), (without, before) in zip(batches, bare, strict=True)
            ]
            assert more == [(0, 0)] * 3 + [(1, 1)] * 4 + [(2, 2)]


def test_training_is_the_same_bit_for_bit_and_explained_to_the_storage_floor(two: Ranks) -> None:
    for found in two[1]:
        assert found["unchanged"]["same"]
        rows = [row for _, row in found["unchanged"]["rows"]]
        assert len(rows) == 6
        for row in rows:
            for prefix in ("norm_growth/", "norm_growth/cumulative_", "norm_growth_control/"):
                assert abs(row[f"{prefix}residual"]) <= row[f"{prefix}storage_floor"] < 1e-5
            assert row["orthogonality/max_abs_cos"] < 1e-3 < row["orthogonality_control/max_abs_cos"]


def test_weights_in_float32_may_be_computed_with_in_bfloat16(two: Ranks) -> None:
    for found in two[1]:
        rows = [row for _, row in found["mixed_precision"]["rows"]]
        assert len(rows) == 4
        for row in rows:
            assert abs(row["norm_growth/residual"]) <= row["norm_growth/storage_floor"]
            assert row["orthogonality/rms_cos"] < 5e-3 < row["orthogonality_control/rms_cos"]


@pytest.mark.parametrize("name", ["copies", "parts"])
def test_copies_of_a_divided_model_count_once(two: Ranks, name: str) -> None:
    """HSDP, both with several copies of one shard and with one copy of several shards."""
    for found in two[1]:
        assert_close(found["replicated"][name], found["sgd"]["rows"])


def test_batch_statistics_are_those_of_each_process(two: Ranks) -> None:
    first, second = (found["batch_statistics"] for found in two[1])
    for report in (first, second):
        assert len(report["found"]) == 8
        for found, seen in zip(report["found"], report["seen"], strict=True):
            assert found == pytest.approx(seen, rel=1e-12)
    assert first["found"] != second["found"]


def test_units_are_found_whichever_way_modules_are_called(two: Ranks) -> None:
    for found in two[1]:
        report = found["found_by"]
        assert report["forward"] == report["classify"]
        assert report["forward"] == [
            "norm_growth/weight_norm/net.inputs",
            "norm_growth_control/weight_norm/net.heads.in_proj_weight",
            "norm_growth_control/weight_norm/net.heads.out_proj",
            "norm_growth_control/weight_norm/net.out",
        ]


@pytest.mark.parametrize(
    ("name", "layers", "counted"),
    [
        ("branches", [1, 1, 1, 1], {"not every process saw it in its graph or could measure it": 8}),
        ("grouped", [2, 2, 2, 2],
         {"it is a grouped transposed convolution, whose output channels are spread over its groups": 4}),
        ("reading", [3, 3, 3], {"not every process saw it in its graph or could measure it": 3}),
        ("sending", [3, 3, 3], {"not every process saw it in its graph or could measure it": 3}),
        ("not finite", [3, 3], {"its gradients are not finite": 2}),
        ("skipped", [3, 3, 3], {"no optimizer took a step": 1}),
    ],
)  # fmt: skip
def test_gaps_are_the_same_on_all_processes_and_none_waits(two: Ranks, name: str, layers: Any, counted: Any) -> None:
    for found in two[1]:
        report = found["left_out"][name]
        assert [len(row) for row in report["layers"]] == layers
        assert report["left_out"] == counted


@pytest.mark.parametrize("name", ["one file", "distributed"])
def test_sums_go_on_exactly_where_a_checkpoint_was_taken(two: Ranks, name: str) -> None:
    for found in two[1]:
        *_, last = found[name]["whole"]
        assert len(found[name]["whole"]) == 2
        assert_close(found[name]["resumed"], [last], rel=1e-13)
        assert any("cumulative" in key for key in last[1])
    assert two[1][0][name] == two[1][1][name]


def test_one_process_goes_on_with_what_two_have_added_up(two: Ranks) -> None:
    rows, monitor = Rows(), NormGrowthMonitor(3, layers="*", cumulative=True)
    run = divided_trainer(1, monitor, limit_train_batches=4, max_epochs=2, steps=-1, logger=rows)
    run.fit(Divided(optimizers=SAME_AS_ONE["momentum"][0]), ckpt_path=two[0] / "one_file" / "first.ckpt")
    assert_close(rows.rows, two[1][0]["one file"]["whole"][1:])


def counted(account: CumulativeIncrements, weight: torch.Tensor, gradients: torch.Tensor) -> Any:
    """Return the cumulative increments of SGD on (a part of) a weight."""
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
    account.follow({"weight": parameter})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        account.open(optimizer)
        account.begin(optimizer, False)
        optimizer.step()
        account.commit([], explained=True)
    return account


@pytest.mark.parametrize("shape", [(5, 3), (2, 4), (5,)])
def test_the_sums_of_all_parts_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    """All sums agree except the floors, which depend on norms of whole vectors and become larger."""
    weight, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(4, *shape, dtype=torch.float64)
    shards = [Shards({}, torch.device("cpu"), 3, 3, rank) for rank in range(3)]
    row_range = [one.row_range(weight) for one in shards]
    parts = [
        counted(ShardedIncrements(one), weight[at.start : at.stop], gradients[:, at.start : at.stop])
        for one, at in zip(shards, row_range, strict=True)
    ]
    found = parts[0].whole(sum(part.table() for part in parts)).entry("weight")
    expected = counted(CumulativeIncrements(), weight, gradients).entry("weight")
    if len(shape) == 1:
        assert 1 <= float(found.rounding / expected.rounding) < 10
        expected = expected._replace(rounding=found.rounding)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_weights_that_one_process_edits_after_the_backward_pass_have_no_cosines_on_any(two: Ranks) -> None:
    first, second = (found["edited"] for found in two[1])
    assert first == second
    before, then, *after = first["cosines"]
    assert after == [before, before]
    assert len(before) > 5
    assert then == ["net.one_row.0"]  # of which the other process has the only row
    assert first["left_out"] == {ELSEWHERE: 1}


def test_what_cannot_be_observed_is_refused_before_training(two: Ranks) -> None:
    assert [found["refused"] for found in two[1]] == [{"refused": 5}] * 2


@pytest.mark.parametrize("monitor", [OrthogonalityMonitor, NormGrowthMonitor, AffineConvergenceMonitor])
@pytest.mark.parametrize(
    ("name", "why"),
    [("FSDPStrategy", "fully_shard, or ddp"), ("XLAFSDPStrategy", "shards weights"), ("DeepSpeedStrategy", "engine")],
)
def test_strategies_that_cut_weights_anywhere_are_refused_with_what_is_derived_from_them(
    monitor: Any, name: str, why: str
) -> None:
    derived = type("Mine", (type(name, (), {}),), {})
    run = SimpleNamespace(strategy=derived(), optimizers=[], world_size=2)
    with pytest.raises(ConfigurationError, match=f"{monitor.__name__} cannot observe training with {name}: .*{why}"):
        monitor().on_fit_start(run, Divided())


def test_units_are_guessed_where_nothing_of_the_graph_has_a_name() -> None:
    """As under torch.compile, the numbers then have to confirm the units."""
    net = batch_norms()
    loss = net(torch.randn(4, 3, 8, 8)).sum()
    symmetries, found = search(net, Graph(loss, unsharded={}))
    assert symmetries is None
    assert [units.kind for units in found] == ["filter", "filter", "none"]
    named = Graph(loss, unsharded={id(parameter): name for name, parameter in net.named_parameters()})
    assert search(net, named)[1] == search(net, Graph(loss))[1]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_rows_are_where_torch_puts_them(parts: int) -> None:
    for rows in range(1, 12):
        chunks = torch.arange(rows).chunk(parts)
        for rank in range(parts):
            shards = Shards({}, torch.device("cpu"), parts, parts, rank)
            row_range = shards.row_range(torch.empty(rows, 4))
            mine = chunks[rank] if rank < len(chunks) else torch.empty(0)
            assert list(range(row_range.start, row_range.stop)) == mine.tolist()
            assert shards.row_range(torch.empty(rows, 4), dim=1) == (parts, 4 * parts, 4 * rank, 4 * rank + 4)
