"""Settings that differ between runs are found under any name and nesting; equal settings are not listed."""

from __future__ import annotations

import argparse
import enum
import itertools
import json
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_normgeo import RecordLogger, read_record
from lightning_normgeo.report.compared_runs import Run, compare_runs
from lightning_normgeo.report.run_labels import LONGEST
from lightning_normgeo.report.run_settings import MISSING, flat
from lightning_normgeo.report.setting_roles import is_norm, is_seed, is_weight_decay, short, titles
from lightning_normgeo.runs.records.record import Record

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
OWN = {"trainer": {"max_epochs": 1, "logger": [{"init_args": {"version": "a"}}]}, "test_after_fit": True}
KEYS = st.sampled_from(
    ["config", "lr", "norm", "seed", "a", "b", "a.b", "wandb", "run", "ckpt_path", "trainer", "1", "–"]
)
LEAVES = st.one_of(
    st.integers(-3, 3), st.booleans(), st.sampled_from(["bn", "–", "1", "x, b 2", "\x1b[31m", "\u2028", ""])
)
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3))
PARAMETERS = st.dictionaries(KEYS, NESTED, max_size=4)


def compared(*parameters: Any) -> list[Run]:
    return compare_runs([Record(Path(f"r{k}"), settings=given) for k, given in enumerate(parameters)])


def logged(*parameters: Any, version: str = "one") -> Record:
    """Return the record of a run that logs hyperparameters one after another."""
    logger = RecordLogger("out", version=version)
    for given_ in parameters:
        logger.log_hyperparams(given_)
    logger.finalize("success")
    return read_record(logger.folder)


def same_kind(runs: list[Run]) -> bool:
    return len({run.group for run in runs}) == 1


def canonical(value: Any) -> Any:
    """Return nested settings in the report's form: scalars as displayed, without None and empty containers."""
    if isinstance(value, dict):
        return {k: c for k, v in value.items() if (c := canonical(v)) is not None}
    if isinstance(value, list):
        return [canonical(v) for v in value]
    return value if isinstance(value, str) else json.dumps(value)


@PROPERTY
@given(PARAMETERS, PARAMETERS)
def test_runs_are_repetitions_only_if_nothing_differs(one: dict[str, Any], other: dict[str, Any]) -> None:
    seeds = ("seed",)
    kinds = [{k: v for k, v in given_.items() if k not in seeds} for given_ in (one, other)]
    runs = compared(one, other)
    if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
        assert same_kind(runs)
        assert runs[0].differing == {}
    elif canonical(kinds[0]) != canonical(kinds[1]) and not any("wandb" in kind for kind in kinds):
        assert not same_kind(runs) or _differ_in_seeds_only(runs)
    assert len({run.name for run in runs}) == 2


def _differ_in_seeds_only(runs: list[Run]) -> bool:
    return bool(runs[0].seed_settings) and runs[0].kind == {} and runs[0].seeds != runs[1].seeds


@PROPERTY
@given(st.lists(PARAMETERS, min_size=1, max_size=6))
def test_groups_are_exactly_the_kinds(parameters: list[dict[str, Any]]) -> None:
    runs = compared(*parameters)
    for one, other in itertools.combinations(runs, 2):
        assert (one.group == other.group) == (one.kind == other.kind)
        assert one.name != other.name
    assert all(len(run.panel) <= LONGEST + 5 and len(run.series) <= LONGEST + 5 for run in runs)
    assert all(text.isprintable() for run in runs for text in (run.name, run.group))


@pytest.mark.parametrize("config", ["configs/a.yaml", {"x": 1}, {"trainer": {"x": 1}, "model": 2}, [1], None, 3])
def test_a_hyperparameter_called_config_hides_no_other(config: Any) -> None:
    runs = compared({"config": config, "lr": 0.1}, {"config": config, "lr": 0.2})
    assert [run.differing for run in runs] == [{"lr": "0.1"}, {"lr": "0.2"}]
    assert [run.series for run in runs] == ["lr 0.1", "lr 0.2"]


def test_a_hyperparameter_called_config_is_compared_itself() -> None:
    runs = compared({"config": "a.yaml", "lr": 0.1}, {"config": "b.yaml", "lr": 0.1})
    assert [run.series for run in runs] == ["config a.yaml", "config b.yaml"]
    for name in ("run", "ckpt_path", "wandb"):
        assert not same_kind(compared({name: 1}, {name: 2})), name


def test_the_configuration_of_the_command_line_has_no_prefix_and_hides_nothing() -> None:
    def own(norm: str, **more: Any) -> dict[str, Any]:
        model = {"arch": "resnet18", "norm": norm}
        return {"config": {**OWN, "run": more.pop("run", "x"), "model": model}, **model, "num_classes": 10, **more}

    runs = compared(own("bn", wandb={"id": "a"}, run="runs/s/a"), own("gn", wandb={"id": "b"}, run="runs/s/b"))
    assert runs[0].differing == {"model.norm": "bn"}
    assert "norm" not in runs[0].settings, "what the model logs of itself is not repeated"
    assert runs[0].settings["num_classes"] == "10"
    runs = compared(own("bn", extra={"lr": 1}), own("bn", extra={"lr": 2}))
    assert runs[0].differing == {"extra.lr": "1"}
    runs = compared({**own("bn"), "norm": "other"}, own("bn"))
    assert runs[0].differing == {"norm": "other"}, "a hyperparameter that differs from the configuration counts"


def test_later_hyperparameters_go_over_earlier_ones() -> None:
    record = logged({"lr": 1, "a": 1}, {"lr": 2}, argparse.Namespace(b=3))
    assert record.settings == {"lr": 2, "a": 1, "b": 3}


class Kind(enum.Enum):
    GROUP = 1


@dataclass
class Optimizer:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


Pair = namedtuple("Pair", "x y")


class Mapped(dict[str, Any]):
    """A dictionary that is also an object, like DictConfig and Lightning's AttributeDict."""


NESTINGS = {
    "dict": lambda lr: {"optim": {"lr": lr}},
    "list of dicts": lambda lr: {"optim": [{"name": "sgd"}, {"lr": lr}]},
    "list": lambda lr: {"optim": [1, [2, lr]]},
    "tuple": lambda lr: {"optim": (1, lr)},
    "namespace": lambda lr: argparse.Namespace(optim=argparse.Namespace(lr=lr)),
    "simple": lambda lr: {"optim": SimpleNamespace(lr=lr)},
    "dataclass": lambda lr: {"optim": Optimizer(lr)},
    "top dataclass": lambda lr: Optimizer(lr),
    "named tuple": lambda lr: {"optim": Pair(1, lr)},
    "mapping": lambda lr: Mapped(optim=Mapped(lr=lr)),
    "set": lambda lr: {"optim": {lr, 7.0}},
    "numpy": lambda lr: {"optim": np.float32(lr)},
    "array": lambda lr: {"optim": np.array([lr])},
    "tensor": lambda lr: {"optim": torch.tensor(lr)},
    "keys": lambda lr: {"optim": {1: lr, "1": 2, None: 3, (1, 2): 4}},
    "dotted": lambda lr: {"optim.lr": 1, "optim": {"lr": lr}},
    "deep": lambda lr: json.loads('{"a":' * 300 + str(lr) + "}" * 300),
    "function": lambda lr: {"f": lambda: None, "optim": {"lr": lr, "act": torch.relu}},
}


@pytest.mark.parametrize("nested", NESTINGS.values(), ids=NESTINGS)
def test_any_nesting_is_compared(nested: Any) -> None:
    one, same, other = (logged(nested(lr), version=str(k)) for k, lr in enumerate((0.25, 0.25, 0.5)))
    assert same_kind(compare_runs([one, same]))
    runs = compare_runs([one, other])
    assert not same_kind(runs)
    assert len(runs[0].differing) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"f": "<function relu at 0x7f00>"}, {"f": "<function relu at 0x7f11>"}),
        ({"f": "<bound method A.f of <m.A object at 0x1a>>"}, {"f": "<bound method A.f of <m.A object at 0x2b>>"}),
        ({"f": ["functools.partial(<function f at 0x1>, 3)"]}, {"f": ["functools.partial(<function f at 0x2>, 3)"]}),
        ({"lr": 1.0}, {"lr": 1}),
        ({"betas": [1.0, {"x": 2.0}]}, {"betas": [1, {"x": 2}]}),
        ({"a": {"b": 1}, "c": 2}, {"c": 2, "a": {"b": 1}}),
        ({"a": 1, "b": None}, {"a": 1}),
    ],
)
def test_what_says_nothing_of_a_setting_is_no_difference(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert same_kind(compared(one, other))


def test_an_address_in_a_text_of_ones_own_is_a_difference() -> None:
    assert not same_kind(compared({"note": "flashed at 0x1000"}, {"note": "flashed at 0x2000"}))


def test_large_numbers_have_no_digits_of_their_binary_form() -> None:
    assert flat({"lr": 1e30, "step": 2.0, "seed": 2**60}) == {"lr": "1e+30", "step": "2", "seed": str(2**60)}


def test_missing_is_another_value_than_its_sign() -> None:
    runs = compared({"x": MISSING}, {"y": 1, "x": None})
    assert not same_kind(runs)
    assert runs[0].differing["x"] != runs[1].differing["x"] == MISSING


def test_names_that_collide_stay_apart() -> None:
    assert flat({"a.b": 1, "a": {"b": 2}}) == flat({"a": {"b": 2}, "a.b": 1})
    assert set(flat({"a.b": 1, "a": {"b": 2}, "a.b (2)": 3}).values()) == {"1", "2", "3"}
    assert not same_kind(compared({"a.b": 1, "a": {"b": 2}}, {"a.b": 2, "a": {"b": 1}}))


@pytest.mark.parametrize(
    ("role", "yes", "no"),
    [
        (
            is_seed,
            "seed seed_everything random_seed manual_seed model.seed randomSeed random_state seed.torch data-seed",
            "seeds seed_length num_seeds use_seed seedling seed_dim",
        ),
        (
            is_norm,
            "norm normalization norm_layer model.norm model.norm.name normLayer norm-type net.normalization.class_path",
            "enorm norm_eps normal max_norm grad_norm weight_norm norm.eps",
        ),
        (
            is_weight_decay,
            "weight_decay wd optimizer.init_args.weight_decay weightDecay weight-decay",
            "decay wdir lr_decay weight_decay_steps",
        ),
    ],
)
def test_roles_are_found_by_name(role: Any, yes: str, no: str) -> None:
    assert [name for name in yes.split() if not role(name)] == []
    assert [name for name in no.split() if role(name)] == []


@pytest.mark.parametrize("seed", ["seed", "random_seed", "manual_seed", "trainer.seed", "rng"])
@pytest.mark.parametrize("norm", ["norm", "normalization", "norm_layer"])
@pytest.mark.parametrize("decay", ["wd", "weight_decay"])
def test_labels_are_the_same_whatever_settings_are_called(seed: str, norm: str, decay: str) -> None:
    runs = compared(*({seed: s, norm: n, "opt": {decay: d}} for n in ("bn", "gn") for d in (0.0, 0.01) for s in (1, 2)))
    assert runs[0].name == "bn, no weight decay, seed 1"
    assert runs[7].name == "gn, weight decay 0.01, seed 2"
    assert len({run.group for run in runs}) == 4


def test_a_seed_that_is_no_number_is_a_setting() -> None:
    runs = compared({"seed": "fixed", "x": 1}, {"seed": "random", "x": 1})
    assert [run.group for run in runs] == ["seed fixed", "seed random"]


def test_several_seeds_are_named() -> None:
    runs = compared({"seed": 1, "data_seed": 2}, {"seed": 2, "data_seed": 2}, {"seed": 2, "data_seed": 3})
    assert [run.repeat for run in runs] == ["seed 1, data_seed 2", "seed 2, data_seed 2", "seed 2, data_seed 3"]
    assert same_kind(runs)


def test_runs_of_projects_that_call_it_differently() -> None:
    runs = compared({"norm": "bn", "wd": 0.0}, {"normalization": "gn", "weight_decay": 0.1})
    assert [run.group for run in runs] == ["bn, no weight decay", "gn, weight decay 0.1"]


def test_classes_have_short_names() -> None:
    assert short("<class 'torch.nn.modules.batchnorm.BatchNorm2d'>") == "BatchNorm2d"
    assert short("torch.optim.SGD") == "SGD"
    assert short("<function relu>") == "relu"
    assert short("0.5") == "0.5"
    runs = compared(*({"optimizer": {"class_path": f"torch.optim.{name}"}} for name in ("SGD", "AdamW")))
    assert [run.series for run in runs] == ["optimizer SGD", "optimizer AdamW"]


def test_titles_are_as_short_as_they_can_be() -> None:
    assert titles(["a.lr", "b.x.class_path", "c.dim", "d.dim", "e.0.name"]) == {
        "a.lr": "lr",
        "b.x.class_path": "x",
        "c.dim": "c.dim",
        "d.dim": "d.dim",
        "e.0.name": "e",
    }


def unlike(k: int) -> dict[str, Any]:
    """Return settings of a run that shares few settings with the others."""
    return {f"setting_{k}_{i}": f"value {i} " * 9 for i in range(12)} | {"arch": f"network{k}", "width": 8 + k // 2}


def test_unlike_runs_have_short_names_of_their_own() -> None:
    runs = compared(*map(unlike, range(8)))
    assert max(len(run.name) for run in runs) <= LONGEST
    assert len({run.name for run in runs}) == len({run.group for run in runs}) == 8
    assert [run.series for run in runs] == [f"arch network{k}" for k in range(8)]
    assert len(runs[0].differing) == 8 * 12 + 2


def test_long_values_are_cut_in_their_middle() -> None:
    runs = compared({"note": "a" * 300 + "1"}, {"note": "a" * 300 + "2"}, {"note": "a" * 100 + "b" * 100 + "2"})
    assert max(len(run.name) for run in runs) <= LONGEST + 4
    assert len({run.group for run in runs}) == 3


def test_two_thousand_settings_are_compared_at_once() -> None:
    runs = compared(*({f"x{i}": (i * k) % 7 for i in range(2000)} for k in range(20)))
    assert len({run.group for run in runs}) == 7
