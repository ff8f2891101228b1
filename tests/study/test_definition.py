"""The study's file: values of all kinds, options by their full names, files in any folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.study import Study, load_study
from lightning_normgeo.study.definition import arguments_of
from lightning_normgeo.study.validation import checked_cases

# Lightning's LightningCLI calls what jsonargparse 4.49 renamed
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

BASE = """
trainer: {callbacks: [{class_path: lightning_normgeo.RobustnessEvaluation}]}
model: {arch: resnet18}
data: {class_path: lightning_normgeo.DigitsDataModule}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}
"""
ADAM = "{class_path: torch.optim.Adam, init_args: {lr: 1e-3}}"
STEP = "{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}"
MONITOR = "{class_path: lightning_normgeo.NormGrowthMonitor}"


def study_of(grid: str, settings: str = "") -> Study:
    Path("base.yaml").write_text(BASE)
    text = f"name: s\nconfigs: [base.yaml]\nsettings: {{{settings}}}\ngrid: {{{grid}}}"
    Path("study.yaml").write_text(text)
    return load_study("study.yaml")


# Values.


def test_an_optimizer_of_the_grid_is_what_is_written_of_it() -> None:
    study = study_of(f"optimizer: [{ADAM}]")
    assert study.grid == {"optimizer": [{"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}}]}
    assert list(study.runs()) == ["optimizer=class_path_torch.optim.Adam_init_args_lr_0.001"]
    optimizer = checked_cases(study)[0].settings.optimizer
    assert (optimizer.class_path, optimizer.init_args.lr) == ("torch.optim.Adam", 0.001)


def test_a_schedule_of_the_grid() -> None:
    study = study_of(f"lr_scheduler: [{STEP}, null]")
    assert list(study.runs()) == ["lr_scheduler=StepLR_step_size_3-c991569", "lr_scheduler=null"]
    assert checked_cases(study)[0].settings.lr_scheduler.init_args.step_size == 3


def test_callbacks_of_the_grid() -> None:
    study = study_of(f"trainer.callbacks: [[{MONITOR}], []]")
    assert list(study.runs()) == ["callbacks=class_path_lightning_normgeo.NormGrowthMonitor", "callbacks="]
    assert [callback.class_path for callback in checked_cases(study)[0].settings.trainer.callbacks] == [
        "lightning_normgeo.NormGrowthMonitor"
    ]


def test_classes_among_the_settings() -> None:
    study = study_of("model.norm: [bn]", settings=f"optimizer: {ADAM}, trainer.callbacks+: {MONITOR}")
    found = checked_cases(study)[0].settings
    assert found.optimizer.class_path == "torch.optim.Adam"
    assert len(found.trainer.callbacks) >= 2


def test_long_names_tell_classes_of_several_modules_apart() -> None:
    study = study_of(f"a: [{{class_path: {'x.' * 30}Adam}}, {{class_path: {'y.' * 30}Adam}}]")
    first, second = study.runs()
    assert first != second
    assert first.startswith("a=Adam-")
    assert second.startswith("a=Adam-")


def test_text_stays_text() -> None:
    study = study_of("a: ['1e-3', 'x: y', 1e-3]", settings="b: '[1]'")
    assert study.grid == {"a": ["1e-3", "x: y", 0.001]}
    assert study.settings == {"b": "[1]"}


def test_settings_may_be_left_empty() -> None:
    Path("study.yaml").write_text("name: s\nsettings:\ngrid: {a: [1]}")
    assert load_study("study.yaml").settings == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("inf"), ".inf"),
        (float("-inf"), "-.inf"),
        (float("nan"), ".nan"),
        ([1.0, float("-inf")], "[1.0, -.inf]"),
        ({"NaN": [float("nan"), '"Infinity', "Infinity"]}, '{"NaN": [.nan, "\\"Infinity", "Infinity"]}'),
    ],
)
def test_numbers_that_are_not_finite_are_written_as_yaml_has_them(value: Any, text: str) -> None:
    assert arguments_of({"x": value}) == [f"--x={text}"]


def test_gradients_that_are_never_clipped() -> None:
    study = study_of("trainer.gradient_clip_val: [.inf, 1.0]")
    assert list(study.runs()) == ["gradient_clip_val=.inf", "gradient_clip_val=1.0"]
    assert checked_cases(study)[0].settings.trainer.gradient_clip_val == float("inf")


# Names of options.


@pytest.mark.parametrize(
    ("grid", "settings", "reason"),
    [
        ("seed: [0, 1]", "", "^s.yaml: seed is short for 'seed_everything'; write it in full.$"),
        ("trainer.max_epoch: [1]", "", "^s.yaml: trainer.max_epoch is short for 'trainer.max_epochs'; write"),
        (
            "seed_everything: [0]",
            "trainer.limit_t: 1",
            r"limit_t is short for 'trainer.limit_test_b.*'trainer.limit_tr",
        ),
        ("model.norm: [gn]", "model.nor: bn", "model.nor is short for 'model.norm'"),
    ],
)
def test_options_are_written_in_full(grid: str, settings: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        checked_cases(study_of(grid, settings), "s.yaml")


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ("optimizer.init_args.lr: [1], optimizer.lr: [2]", ""),
        ("optimizer.init_args.lr: [1]", "optimizer.lr: 2"),
        ("a: [1]", "optimizer.init_args.lr: 1, optimizer.lr: 2"),
    ],
)
def test_an_option_under_two_names(grid: str, settings: str) -> None:
    with pytest.raises(ConfigurationError, match=r"optimizer\.(init_args\.)?lr and .* are the same option; leave one"):
        study_of(grid, settings)


def test_options_of_all_kinds_are_known() -> None:
    Path("gn.yaml").write_text("model: {norm: gn}")
    found = checked_cases(
        study_of(
            "config: [gn.yaml], optimizer.lr: [0.25], data.init_args.batch_size: [8], trainer.devices: [1], "
            f"trainer.callbacks.init_args.eps: [[0.5]], model: [{{stem: imagenet}}], trainer.callbacks+: [{MONITOR}]",
            settings="trainer: {max_epochs: 2}, wandb: disabled",
        )
    )[0].settings
    assert (found.model.norm, found.model.stem, found.trainer.max_epochs) == ("gn", "imagenet", 2)
    assert (found.optimizer.init_args.lr, found.data.init_args.batch_size) == (0.25, 8)


# The settings that a run gets.


def digest_from(folder: str) -> str:
    """Return the digest of a run, for a command given in a folder."""
    here, path = Path.cwd(), Path("study.yaml").absolute()
    os.chdir(folder)
    try:
        study = load_study(path)
        (options,) = study.runs().values()
        return study.digest(options)
    finally:
        os.chdir(here)


def test_a_digest_is_of_what_files_say_not_of_where_they_are() -> None:
    Path("gn.yaml").write_text("model: {norm: gn}")
    study_of("config: [gn.yaml], seed_everything: [0]")
    Path("elsewhere").mkdir()
    before = digest_from(".")
    assert digest_from("elsewhere") == before
    Path("gn.yaml").write_text("model: {norm: ln}")
    assert digest_from(".") != before


def test_a_digest_stays_what_it_was_for_finished_studies() -> None:
    study = Study("s", {"model.norm": ["bn"]}, settings={"trainer.max_epochs": 2})
    assert study.digest({"model.norm": "bn"}) == "88b57777756e"
