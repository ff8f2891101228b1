"""The table of many layers: the rows dropped in long runs, and the table at W&B after real trainings."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hypothesis import given
from hypothesis import strategies as st
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from torch import nn

from lightning_normgeo import (
    AffineConvergenceMonitor,
    NormGrowthMonitor,
    OrthogonalityMonitor,
    RecordLogger,
    read_record,
)
from lightning_normgeo.callbacks._monitors.geometry_monitor import LAYER_LIMIT
from lightning_normgeo.callbacks._readings.publication import publisher
from lightning_normgeo.callbacks._readings.publication.layer_table import KEY, LayerTable
from lightning_normgeo.runs.records.record import Record
from support.isolation import REPOSITORY
from support.projects import Project, images, sgd, trainer
from support.wandb_log import WandbRun, read_finished

MONITORS = [OrthogonalityMonitor, NormGrowthMonitor, AffineConvergenceMonitor]
KEYS_PAGE = " ".join((REPOSITORY / "docs" / "callbacks" / "keys.md").read_text().split())
(DOCUMENTED_KEYS, DOCUMENTED_SITES, DOCUMENTED_ROWS) = (
    int(re.search(text, KEYS_PAGE)[1].replace(",", ""))
    for text in (r"fewer than (\d+), however large", r"at most (\d+) layers", r"at most ([\d,]+) rows")
)

Curves = dict[str, list[tuple[int, dict[str, float]]]]


# dropped rows


def filled(table: LayerTable, steps: list[int], layers: int) -> LayerTable:
    names = [f"net.{i}" for i in range(layers)]
    for step in steps:
        table.add(step, {"a/x": {name: step + i / 64 for i, name in enumerate(names)}}, [{"a": frozenset(names)}])
    return table


def steps_of(table: LayerTable) -> list[int]:
    return sorted({row[0] for row in table.rows()})


@given(
    cadence=st.integers(1, 130), measured=st.integers(1, 300), layers=st.integers(1, 9), max_rows=st.integers(18, 99)
)
def test_kept_are_the_ends_and_as_many_of_the_steps_between_as_fit(
    cadence: int, measured: int, layers: int, max_rows: int
) -> None:
    def kept(count: int, stride: int) -> set[int]:
        return {1, count, *range(stride, count + 1, stride)}

    stride = 1
    for count in range(1, measured + 1):
        while layers * len(kept(count, stride)) > max_rows:
            stride *= 2
    table = filled(LayerTable(max_rows), [n * cadence - 1 for n in range(1, measured + 1)], layers)
    assert steps_of(table) == sorted(n * cadence - 1 for n in kept(measured, stride))
    rows = table.rows()
    assert len(rows) == layers * len(steps_of(table)) <= max_rows
    assert all(value == step + int(layer.removeprefix("net.")) / 64 for step, layer, value in rows)
    assert rows == sorted(rows)


@given(cadences=st.lists(st.integers(1, 12), min_size=2, max_size=3), start=st.integers(0, 50))
def test_no_cadence_starves_another(cadences: list[int], start: int) -> None:
    """Wherever training was resumed, each monitor keeps its own steps on one common grid."""
    table, measured = LayerTable(60), defaultdict(set)
    for number in range(start + 1, start + 400):
        layers = {f"g{i}/x": {"net": 1.0} for i, cadence in enumerate(cadences) if number % cadence == 0}
        table.add(number - 1, layers, [{f"g{i}": frozenset(["net"])} for i in range(len(cadences))])
        for key in layers:
            measured[key].add(number)
    columns, rows = table.columns(), table.rows()
    assert len(rows) <= 60
    kept = {row[0] + 1 for row in rows}
    everything = set().union(*measured.values())
    grids = [2**k for k in range(9)]
    assert any(
        kept == {n for n in everything if n % grid == 0 or n in (min(everything), max(everything))} for grid in grids
    )
    for i, cadence in enumerate(cadences):
        column = columns.index(f"g{i}/x")
        own = [row[0] + 1 for row in rows if row[column] is not None]
        assert own == sorted(kept & measured[f"g{i}/x"])
        assert len(own) >= 30 // (2 * cadence), "about its share of at least thirty steps"


def test_a_table_fills_up_before_anything_is_dropped() -> None:
    steps = [*range(DOCUMENTED_ROWS // 20 + 1)]
    assert len(filled(LayerTable(), steps[:-1], 20).rows()) == DOCUMENTED_ROWS
    assert len(filled(LayerTable(), steps, 20).rows()) == DOCUMENTED_ROWS // 2 + 2 * 20


def test_a_long_run_stays_small() -> None:
    table = filled(LayerTable(), list(range(20_000)), 20)
    assert DOCUMENTED_ROWS / 2 < len(table.rows()) <= DOCUMENTED_ROWS
    assert len(table._steps) <= DOCUMENTED_ROWS / 20, "nor does it keep what it will not log"
    assert steps_of(table)[:3] == [0, 63, 127]
    assert steps_of(table)[-1] == 19_999


def test_the_last_step_of_a_giant_is_cut_to_the_limit() -> None:
    table = filled(LayerTable(20), [0, 1, 2], 30)
    assert [row[:2] for row in table.rows()] == [[2, f"net.{i}"] for i in range(10, 30)]


def test_layers_lack_quantities_and_come_and_go() -> None:
    table, tabled = LayerTable(), [{"a": frozenset("uv"), "b": frozenset("u")}, {"b": frozenset("w")}]
    table.add(1, {"a/x": {"u": 1.0, "v": 2.0, "w": 3.0}, "b/y": {"w": 4.0, "v": 5.0}, "c/z": {"u": 6.0}}, tabled)
    table.add(3, {"c/z": {"u": 7.0}}, tabled)
    table.add(5, {"b/y": {"u": 8.0}}, tabled)
    assert table.columns() == ["step", "layer", "a/x", "b/y"]
    assert table.rows() == [[1, "u", 1.0, None], [1, "v", 2.0, None], [1, "w", None, 4.0], [5, "u", None, 8.0]]


def test_other_ranks_than_zero_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert filled(LayerTable(), [0, 1], 3).rows() == []


# loggers


class Tables(Logger):
    """A logger that keeps only its tables."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Any] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    log_hyperparams = log_metrics

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        if not key.startswith("about/"):
            self.tables.append((key, columns, data))


class Broken(Tables):
    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        raise OSError("disk full")


def test_each_logger_with_tables_gets_one_and_a_broken_one_is_reported() -> None:
    table, good = filled(LayerTable(), [0, 1], 2), Tables()
    with pytest.warns(UserWarning, match=r"Broken failed to log the table geometry/layers: OSError\('disk full'\)"):
        table.publish([object(), Broken(), good])
    table.publish([good])
    rows = [[0, "net.0", 0.0], [0, "net.1", 1 / 64], [1, "net.0", 1.0], [1, "net.1", 1 + 1 / 64]]
    assert good.tables == [(KEY, ["step", "layer", "a/x"], rows)]


# real trainings


def wide(layers: int = 40) -> nn.Module:
    blocks = [(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.Flatten(), nn.Linear(192, 4))


def fit(
    *callbacks: Any, steps: int = 4, layers: int = 40, project: Any = None, **settings: Any
) -> tuple[Tables, Record]:
    tables, record = Tables(), RecordLogger("runs")
    project = project or Project(sgd(weight_decay=0.01), wide(layers))
    trainer(*callbacks, steps=steps, logger=[tables, record], **settings).fit(project, images(8 * steps))
    return tables, read_record(record.folder)


def keys_of_layers(record: Record) -> dict[str, set[str]]:
    """Return the layers that have keys, for each metric group."""
    found: dict[str, set[str]] = defaultdict(set)
    for key in record.metrics:
        group, _, rest = key.partition("/")
        if "/" in rest:
            found[group].add(rest.partition("/")[2])
    return found


def curves(columns: list[str], rows: list[list[Any]]) -> Curves:
    """Return a table's rows as the record stores them, with nine digits."""
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for step, layer, *values in rows:
        for key, value in zip(columns[2:], values, strict=True):
            if value is not None:
                found[key][step][layer] = float(f"{value:.9g}")
    return {key: list(points.items()) for key, points in found.items()}


@pytest.fixture(scope="module")
def logged(workplace: Path) -> tuple[WandbRun, Record]:
    """Train forty layers with W&B offline and the record side by side; return both logs."""
    import wandb

    record = RecordLogger(str(workplace / "runs"), version="one")
    loggers = [record, WandbLogger(project="normgeo", save_dir=str(workplace), mode="offline")]
    monitors = [OrthogonalityMonitor(layers="*"), NormGrowthMonitor(2, "*"), AffineConvergenceMonitor(3, "*")]
    run = trainer(*monitors, steps=7, logger=loggers)
    run.fit(Project(sgd(momentum=0.9, weight_decay=0.01), wide()), images())
    record.finalize("success")
    wandb.finish()
    wandb.teardown()
    return read_finished(workplace), read_record(record.folder)


def test_wandb_has_the_curves_of_all_layers_in_exactly_one_table(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    entries = [row[key] for row in run.history for key in row if isinstance(row[key], dict) and "_type" in row[key]]
    assert [entry["_type"] for entry in entries] == ["table-file"] * 3
    table = run.table(KEY)
    assert len(table["data"]) == entries[-1]["nrows"] == 7 * 41 + 2 * 40
    found = curves(table["columns"], table["data"])
    assert found == record.layers
    assert len(found["orthogonality/max_abs_cos"]) == 7
    assert len(found["norm_growth/increment"][0][1]) == len(found["affine/abs_beta_minus_mu_mean"][0][1]) == 40
    assert found["norm_growth_control/increment"][0][1].keys() == {"net.121"}


def test_wandb_has_few_keys_and_none_for_a_layer(logged: tuple[WandbRun, Record]) -> None:
    run, record = logged
    keys = {key for row in run.history for key in row if not key.startswith("_")}
    others = {KEY, "trainer/global_step", "about/training", "about/keys"}
    assert keys - others == {key for key in record.metrics if record.is_at_wandb(key)}
    assert keys_of_layers(record) == {}
    assert len(keys) <= 32
    assert len(record.layers) * 40 > 1000, "so many there would be"


@pytest.mark.parametrize("monitor", MONITORS)
def test_so_many_layers_have_keys_and_one_more_none(monitor: Any) -> None:
    assert LAYER_LIMIT == DOCUMENTED_SITES
    tables, record = fit(monitor(), layers=20)
    first = monitor.groups[0]
    quantity = next(key for key in record.layers if key.startswith(f"{first}/"))
    layers = sorted(record.layers[quantity][0][1])
    for count, has_table in ((LAYER_LIMIT, False), (LAYER_LIMIT + 1, True)):
        tables, record = fit(monitor(layers=layers[:count]), layers=20)
        assert keys_of_layers(record) == ({} if has_table else {first: set(layers[:LAYER_LIMIT])})
        assert len(tables.tables) == has_table
        assert all({row[1] for row in rows} == set(layers[:count]) for _, _, rows in tables.tables)
        assert set(record.layers[quantity][0][1]) == set(layers), "it keeps all"


def test_a_run_with_as_many_keys_as_possible_stays_within_what_is_documented() -> None:
    chosen = [f"net.{3 * i}" for i in range(LAYER_LIMIT)], [f"net.{3 * i + 1}" for i in range(LAYER_LIMIT)]
    monitors = [OrthogonalityMonitor(layers=chosen[0]), NormGrowthMonitor(layers=chosen[0], cumulative=True)]
    tables, record = fit(*monitors, AffineConvergenceMonitor(layers=chosen[1]))
    robustness = 15
    assert DOCUMENTED_KEYS * 0.7 < len(record.metrics) + robustness < DOCUMENTED_KEYS
    assert tables.tables == []


def test_monitors_that_name_no_layers_have_the_first_ones_in_the_table() -> None:
    tables, record = fit(*(monitor() for monitor in MONITORS))
    ((_, _, rows),) = tables.tables
    assert {row[1] for row in rows} == set().union(*keys_of_layers(record).values())
    assert all(len(layers) <= 3 for layers in keys_of_layers(record).values())


def test_whoever_wants_all_keys_gets_no_table_of_the_same() -> None:
    tables, record = fit(*(monitor(wandb_keys="all") for monitor in MONITORS))
    assert tables.tables == []
    assert keys_of_layers(record)


def test_a_large_first_block_is_cut_to_what_can_have_keys() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Sequential(wide(20))

        def forward(self, x: Any) -> Any:
            return self.layer1(x)

    tables, record = fit(NormGrowthMonitor(), project=Project(net=Deep()))
    assert len(keys_of_layers(record)["norm_growth"]) == LAYER_LIMIT
    ((_, _, rows),) = tables.tables
    assert {row[1] for row in rows} == keys_of_layers(record)["norm_growth"]


def test_monitors_share_the_table_and_few_layers_keep_their_keys_beside_it() -> None:
    monitors = [NormGrowthMonitor(layers="net.?"), NormGrowthMonitor(layers="*"), AffineConvergenceMonitor(layers="*")]
    tables, record = fit(*monitors, OrthogonalityMonitor(layers="net.0"))
    assert keys_of_layers(record)["norm_growth"] == {"net.0", "net.3", "net.6", "net.9"}
    ((_, columns, rows),) = tables.tables
    assert {key.partition("/")[0] for key in columns[2:]} == {"norm_growth", "norm_growth_control", "affine"}
    assert curves(columns, rows) == {key: record.layers[key] for key in columns[2:]}


@pytest.mark.parametrize("error", [KeyError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_leaves_the_table_of_what_was_measured(error: BaseException) -> None:
    class Failing(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise error
            return super().training_step(batch, batch_idx)

    tables, record = Tables(), RecordLogger("runs")
    run = trainer(*(monitor(layers="*") for monitor in MONITORS), logger=[tables, record])
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else KeyError):
        run.fit(Failing(net=wide()), images())
    ((_, columns, rows),) = tables.tables
    assert curves(columns, rows) == read_record(record.folder).layers
    assert {row[0] for row in rows} == {0, 1, 2}


def test_an_exception_before_the_first_step_leaves_none() -> None:
    class Failing(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            raise KeyError("stop")

    tables = Tables()
    with pytest.raises(KeyError, match="stop"):
        trainer(NormGrowthMonitor(layers="*"), Failing(), logger=tables).fit(Project(net=wide()), images())
    assert tables.tables == []


def test_each_fit_of_a_trainer_has_its_own_table() -> None:
    tables, project = Tables(), Project(net=wide())
    run = trainer(NormGrowthMonitor(layers="*"), logger=tables, steps=-1, max_epochs=1)
    run.fit(project, images())
    run.fit_loop.max_epochs = 2
    run.fit(project, images())
    assert [sorted({row[0] for row in rows}) for _, _, rows in tables.tables] == [[*range(8)], [*range(8, 16)]]


def test_a_long_training_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "LayerTable", lambda: LayerTable(41 * 5))
    tables, record = fit(NormGrowthMonitor(2, "*"), steps=24)
    ((_, columns, rows),) = tables.tables
    kept = [1, 7, 15, 23]
    assert curves(columns, rows) == {
        key: [(step, values) for step, values in points if step in kept] for key, points in record.layers.items()
    }
    assert [step for step, _ in record.layers["norm_growth/increment"]] == [*range(1, 24, 2)]


@pytest.mark.filterwarnings("ignore:Broken failed to log the verdicts")
def test_a_logger_whose_table_fails_does_not_stop_training() -> None:
    run = trainer(NormGrowthMonitor(layers="*"), logger=Broken())
    with pytest.warns(UserWarning, match="Broken failed to log the table"):
        run.fit(Project(net=wide()), images())
    assert run.global_step == 4


def test_without_a_logger_that_has_tables_none_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled_at: list[int] = []
    monkeypatch.setattr(LayerTable, "add", lambda self, step, *others: filled_at.append(step))
    for logger in (RecordLogger(tmp_path), [RecordLogger(tmp_path), Tables()]):
        trainer(NormGrowthMonitor(1), logger=logger, steps=2).fit(Project(net=wide()), images())
    assert filled_at == [0, 1]


def test_curves_that_no_logger_keeps_are_announced_before_training(tmp_path: Path) -> None:
    project = Project(net=wide())
    with pytest.warns(UserWarning, match=r"NormGrowthMonitor\(layers='\*'\) chooses 41 layers.*Add RecordLogger\(\)"):
        trainer(NormGrowthMonitor(layers="*"), logger=CSVLogger(tmp_path), steps=1).fit(project, images())
    trainer(NormGrowthMonitor(layers="*"), steps=1).fit(project, images())  # nothing is logged at all
    trainer(NormGrowthMonitor(layers="*"), fast_dev_run=True).fit(project, images())
