"""Studies: definition, refused files, display; and a real study that is killed twice and ends as if it never was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import pytest
import torch
import yaml
from rich.console import Console

from lightning_normgeo import ResNetClassifier, read_record
from lightning_normgeo.__main__ import main
from lightning_normgeo.cli import run
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.study import Study, load_study
from lightning_normgeo.study.definition import arguments_of
from lightning_normgeo.study.display import ProgressDisplay, failures, listing, outdated
from lightning_normgeo.study.run_progress import RunProgress
from lightning_normgeo.study.runner import Runner
from lightning_normgeo.study.study_index import Index, IndexEntry
from lightning_normgeo.study.validation import checked_cases
from lightning_normgeo.terminal.safe_streams import PipeSafeStream
from lightning_normgeo.terminal.shipped_configs import shipped_configs
from lightning_normgeo.utilities.files import read_lines
from support.isolation import REPOSITORY, isolated

# Lightning's LightningCLI calls what jsonargparse 4.49 renamed
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

BASE = """
trainer:
  max_epochs: 3
  accelerator: cpu
  limit_train_batches: 4
  limit_val_batches: 2
  limit_test_batches: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_normgeo.NormGrowthMonitor
      init_args: {cumulative: true}
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {monitor: val/accuracy, mode: max}
model: {arch: resnet18, stem: imagenet}
data:
  class_path: lightning_normgeo.DigitsDataModule
  init_args: {batch_size: 8, crop_padding: 2}
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.02, momentum: 0.9}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.CosineAnnealingLR
  init_args: {T_max: 3}
report: false
"""


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base.yaml").write_text(BASE)
    return "base.yaml"


def written(text: str) -> str:
    Path("study.yaml").write_text(text)
    return "study.yaml"


def loaded(text: str) -> Study:
    return load_study(written(text))


# Definition of a study.


def test_runs_are_the_product_and_the_last_option_varies_fastest() -> None:
    study = loaded("name: s\ngrid: {model.norm: [bn, gn], seed_everything: [0, 1]}")
    assert list(study.runs()) == ["norm=bn,seed=0", "norm=bn,seed=1", "norm=gn,seed=0", "norm=gn,seed=1"]
    assert study.runs()["norm=gn,seed=0"] == {"model.norm": "gn", "seed_everything": 0}


@pytest.mark.parametrize(
    ("option", "values", "names", "arguments"),
    [
        ("optimizer.init_args.lr", "[1.0e-05, 5e-4]", ["lr=1e-05", "lr=0.0005"], ["1e-05", "0.0005"]),
        ("model.groups", "[null, 8]", ["groups=null", "groups=8"], ["null", "8"]),
        ("model.unbiased", "[true, false]", ["unbiased=true", "unbiased=false"], ["true", "false"]),
        ("a.eps", "[[0.1, 2], []]", ["eps=0.1_2", "eps="], ["[0.1, 2]", "[]"]),
        ("data.init_args.data_dir", "['/a b/c', ../d]", ["data_dir=a_b_c", "data_dir=.._d"], ["/a b/c", "../d"]),
        ("lr_scheduler", "[{class_path: a.B}]", ["lr_scheduler=class_path_a.B"], ['{"class_path": "a.B"}']),
        ("model.norm", "[gn+ws, 'größe']", ["norm=gn+ws", "norm=größe"], ["gn+ws", "größe"]),
        ("x.shift", "[-1, -0.5]", ["shift=-1", "shift=-0.5"], ["-1", "-0.5"]),
    ],
)
def test_names_and_arguments(option: str, values: str, names: list[str], arguments: list[str]) -> None:
    study = loaded(f"name: s\ngrid: {{{option}: {values}}}")
    assert list(study.runs()) == names
    assert [arguments_of(options) for options in study.runs().values()] == [[f"--{option}={a}"] for a in arguments]


def test_names_are_as_long_as_it_takes_to_tell_options_apart() -> None:
    study = loaded("name: s\ngrid: {model.x.lr: [1], data.x.lr: [2], data.y.lr: [3], lr: [4], a.seed: [5], b.eps: [6]}")
    assert list(study.runs()) == ["model.x.lr=1,data.x.lr=2,y.lr=3,lr=4,seed=5,eps=6"]
    study = loaded("name: s\ngrid: {a.seed: [5], seed_everything: [0]}")
    assert list(study.runs()) == ["seed=5,seed_everything=0"]


def test_long_values_are_cut_and_still_told_apart() -> None:
    study = loaded(f"name: s\ngrid: {{model.x: [{'a' * 300}, {'a' * 299}b]}}")
    first, second = study.runs()
    assert first != second
    assert max(len(first), len(second)) < 60


def test_files_are_relative_to_the_study_and_come_first(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("base.yaml", "sub/gn_wd.yaml"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "sub/study.yaml").write_text(
        "name: s\nconfigs: [../base.yaml]\nsettings: {a.b: [1, 2]}\ngrid: {x: [1], config: [gn_wd.yaml]}"
    )
    study = load_study("sub/study.yaml")
    assert study.shared == ["--config=base.yaml", "--a.b=[1, 2]"]
    assert list(study.runs()) == ["x=1,config=gn_wd"]
    assert arguments_of(study.runs()["x=1,config=gn_wd"]) == ["--config=sub/gn_wd.yaml", "--x=1"]


def test_configurations_that_come_with_the_package_go_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/bn.yaml").write_text("{}")
    (tmp_path / "sub/study.yaml").write_text(
        "name: s\nconfigs: [quickstart, callbacks.yaml]\ngrid: {config: [norm/gn_wd, bn.yaml]}"
    )
    study = load_study("sub/study.yaml")
    known = shipped_configs()
    assert study.configs == [str(known["quickstart"]), str(known["callbacks"])]
    assert study.grid == {"config": [str(known["norm/gn_wd"]), "sub/bn.yaml"]}
    assert list(study.runs()) == ["config=gn_wd", "config=bn"]


REFUSED = {
    "name: s\ngrid: {}": "the grid is empty. Give options with their values",
    "grid: {a: [1]}": r"is not a study.*name.*It needs name and grid",
    "name: s": r"is not a study.*grid.*It needs name and grid",
    "": r"is not a study.*It needs name and grid",
    "name: s\ngrid: {a: [1]}\nseeds: 3": r"is not a study.*seeds.*may have configs, settings, save_dir, keep_opt",
    "name: s\ngrid: {a: 1}": r"is not a study.*grid.*list",
    "name: s\ngrid: {a: [1": r"is not a study",
    "name: s\ngrid: {a: [1]}\nkeep_optimizer_states: perhaps": r"is not a study.*keep_optimizer_states",
    "name: s\ngrid: {a: []}": r"grid.a has no values",
    "name: s\ngrid: {a: [1, 2, 1]}": r"grid.a has the values 1, 1, which name one run",
    "name: s\ngrid: {a: ['x/y', x y]}": r"grid.a has the values x/y, x y, which name one run",
    "name: a/b\ngrid: {a: [1]}": r"name='a/b' has to be a folder's name",
    "name: ..\ngrid: {a: [1]}": r"name='\.\.' has to be a folder's name",
    "name: s\nsettings: {a: 2}\ngrid: {a: [1]}": r"a is in settings and in the grid",
    "name: s\nsettings: {run: x/y}\ngrid: {a: [1]}": r"run is what the study itself gives each run",
    "name: s\ngrid: {ckpt_path: [x]}": r"ckpt_path is what the study itself gives",
    "name: s\nsettings: {config: x.yaml}\ngrid: {a: [1]}": r"settings.config belongs into configs",
    "name: s\nconfigs: [no.yaml]\ngrid: {a: [1]}": r": configs /.*/no.yaml does not exist, and no .* has this name",
    "name: s\ngrid: {config: [no.yaml]}": r": grid.config /.*/no.yaml does not exist, and no configuration that comes",
    "name: s\nconfigs: [quickstar]\ngrid: {a: [1]}": r"Nearest: 'quickstart'; normgeo configs lists all",
    "name: s\ngrid: {config: [gn_wd, norm/gn_wd]}": r"grid.config has the values .*, which name one run",
    f"name: s\ngrid: {{{', '.join(f'a{i}: [{i}{40 * chr(120)}]' for i in range(8))}}}": r"is too long for a folder",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_files_that_are_no_study(text: str) -> None:
    with pytest.raises(ConfigurationError, match=REFUSED[text]):
        loaded(text)


def test_a_file_of_another_kind_is_not_shown() -> None:
    with pytest.raises(ConfigurationError, match="is not a study") as refused:
        loaded("\n".join(f"user{k}:x:{k}:{k}::/home:/bin/sh" for k in range(500)))
    assert len(str(refused.value)) < 600


def test_no_file() -> None:
    with pytest.raises(ConfigurationError, match=r"normgeo study no.yaml does not exist, .* normgeo configs lists all"):
        load_study("no.yaml")


# Errors found before the first run.


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ("model.norms: [bn]", r"^s.yaml: --model.norms is no option of normgeo fit\. Nearest: --model.norm,"),
        ("model.norm: [bn, gnn]", "^s.yaml: model.norm=gnn: norm='gnn' is unknown; did you mean 'gn' "),
        ("model.arch: [resnet18, resnet19]", "^s.yaml: model.arch=resnet19: arch='resnet19' is unknown"),
        ("model.groups: [32, 48], model.norm: [gn]", "^s.yaml: model.groups=48: .*groups=48 does not divide 64"),
        (
            "trainer.max_epochs: [1, many]",
            "^s.yaml: trainer.max_epochs=many: --trainer.max_epochs many cannot be used. It has to be an integer",
        ),
        ("optimizer.lr: [0.1, -1]", r"^s.yaml: optimizer.lr=-1: optimizer torch.optim.SGD.lr=-1.0.*Invalid learning"),
        ("config: [good.yaml, bad.yaml]", "^s.yaml: config=bad.yaml: .*depth"),
    ],
)
def test_a_value_that_cannot_work(grid: str, reason: str, base: str) -> None:
    Path("good.yaml").write_text("model: {norm: gn}")
    Path("bad.yaml").write_text("model: {depth: 3}")
    study = loaded(f"name: s\nconfigs: [{base}]\ngrid: {{{grid}}}")
    with pytest.raises(ConfigurationError, match=reason):
        checked_cases(study, "s.yaml")
    assert not Path("runs").exists()


def test_settings_go_over_configs_and_the_grid_over_both(base: str) -> None:
    Path("overlay.yaml").write_text("model: {norm: gn, label_smoothing: 0.5}\ntrainer: {max_epochs: 8}")
    study = loaded(
        f"name: s\nconfigs: [{base}]\nsettings: {{trainer.max_epochs: 7, optimizer: {{init_args: {{lr: 0.5}}}}}}\n"
        "grid: {model.label_smoothing: [0.25], config: [overlay.yaml]}"
    )
    found = checked_cases(study)[0].settings
    assert (found.model.norm, found.model.label_smoothing, found.trainer.max_epochs) == ("gn", 0.25, 8)
    assert (found.optimizer.init_args.lr, found.optimizer.init_args.momentum) == (0.5, 0.9)


def test_the_study_of_the_documentation(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "guides" / "studies.md").read_text(), re.DOTALL)
    shutil.copytree(REPOSITORY / "configs" / "cifar10", tmp_path / "configs" / "cifar10")
    (tmp_path / "configs" / "study").mkdir()
    (tmp_path / "configs" / "study" / "mine.yaml").write_text(block)
    study = load_study("configs/study/mine.yaml")
    assert checked_cases(study)[0].settings.trainer.max_epochs == 50
    assert len(study.runs()) == 18


def test_every_key_of_the_index_is_documented() -> None:
    text = (REPOSITORY / "docs" / "guides" / "studies.md").read_text().partition("study.json")[2]
    index = Index(Study("s", {"model.norm": ["bn"]}))
    index.study.folder.mkdir(parents=True)
    index.save()
    document = json.loads(index.path.read_text())
    entries = document.pop("runs")
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for cell in table for name in re.findall(r"`(.+?)`", cell)}
    assert named == {*document, *(f"runs[].{key}" for key in entries[0])}


# Display.


def screen(**settings: Any) -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=120, **settings), text


def test_a_line_for_each_run_on_a_terminal() -> None:
    console, text = screen(force_terminal=True, color_system=None)
    entries = [IndexEntry("norm=bn", {}, "running"), IndexEntry("norm=gn", {}, "running")]
    watch = RunProgress(Path("none"))
    with ProgressDisplay(console) as display:
        for entry in entries:
            display.update(entry, watch)
        display._progress.refresh()
        shown = text.getvalue()
        assert all(f"{entry.name} " in shown for entry in entries)
        assert shown.count("starting") >= 2
        watch.epoch, watch.epochs, watch._at, watch.accuracy = 1, 4, 1, 0.75
        display.update(entries[0], watch)
        display._progress.refresh()
        assert "epoch 2/4, step 0, val 75.0 %" in text.getvalue()
        entries[0].status, entries[0].seconds = "finished", 12.4
        entries[1].status, entries[1].error = "failed", "RuntimeError: [red] is not a color"
        display.update(entries[0], watch)
        display.update(entries[1], RunProgress(Path("none")))
    assert "norm=bn: finished after 12 s, val 75.0 %" in text.getvalue()
    assert "norm=gn: failed after 0 s" in text.getvalue()
    assert "RuntimeError: [red] is not a color" in text.getvalue()


def test_lines_of_plain_text_elsewhere() -> None:
    console, text = screen()
    entry = IndexEntry("norm=bn," + 200 * "x", {}, "running")
    with ProgressDisplay(console) as display:
        for _ in range(3):
            display.update(entry, RunProgress(Path("none")))
        display.stopping(1)
        entry.status = "interrupted"
        display.update(entry, RunProgress(Path("none")))
    assert text.getvalue().rstrip().splitlines() == [
        f"{entry.name}: begins",
        "stopping 1 run; interrupt again to stop at once",
        f"{entry.name}: interrupted after 0 s",
    ]


def test_listing_and_what_is_said_of_other_settings() -> None:
    study = Study("s", {"model.norm": ["bn", "gn", "ln", "wn"]})
    names = list(study.runs())
    for name in names[:3]:
        (study.folder / name / "checkpoints").mkdir(parents=True)
        (study.folder / name / "record.jsonl").write_text("")
    (study.folder / names[0] / "run.json").write_text("{}")
    torch.save({"optimizer_states": []}, study.folder / names[1] / "checkpoints" / "last.ckpt")
    index = Index(study)
    index.entries[0].digest = "of another time"
    index.entries[2].status, index.entries[2].error = "failed", "out of cheese"
    index.save()
    console, text = screen()
    console.print(listing(Index(study)))
    rows = [line.split(maxsplit=1) for line in text.getvalue().splitlines() if "norm=" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["norm=bn", "finished, with other settings"],
        ["norm=gn", "interrupted, resumes from its checkpoint"],
        ["norm=ln", "failed, begins anew"],
        ["norm=wn", "waiting"],
    ]
    assert outdated(Index(study)).startswith("1 finished run had other settings than the study has now, and stay")
    log = study.folder / "norm=ln" / "output.log"
    assert list(failures(Index(study))) == [f"norm=ln failed: out of cheese (all of it: {log})"]
    index.entries[0].digest = study.digest(index.entries[0].options)
    assert outdated(index) == ""


def test_listing_of_half_runs_with_other_settings() -> None:
    study = Study("s", {"model.norm": ["bn", "gn"]})
    for name in study.runs():
        (study.folder / name / "checkpoints").mkdir(parents=True)
        (study.folder / name / "record.jsonl").write_text("")
    torch.save({"optimizer_states": []}, study.folder / "norm=bn" / "checkpoints" / "last.ckpt")
    index = Index(study)
    for entry in index.entries:
        entry.digest = "of another time"
    console, text = screen()
    console.print(listing(index))
    rows = [" ".join(line.split()) for line in text.getvalue().splitlines() if "norm=" in line]
    assert rows == [
        "norm=bn interrupted, began with other settings and is not resumed",
        "norm=gn interrupted, begins anew, with other settings",
    ]
    assert outdated(index) == (
        "1 unfinished run began with other settings than the study has now: not resumed. "
        "Remove their folders to begin anew, or restore the settings."
    )


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    terminal, side = os.openpty()
    with os.fdopen(side, "w") as file:
        console = Console(file=cast(TextIO, PipeSafeStream(file)), force_terminal=True)
        entry = IndexEntry("norm=bn", {}, "running")
        with ProgressDisplay(console) as display:
            display.update(entry, RunProgress(Path("none")))
            os.close(terminal)
            display.stopping(1)
            entry.status = "failed"
            display.update(entry, RunProgress(Path("none")))
        console.print("interrupted")
        assert not file.isatty()


def test_watch_of_a_run_that_was_interrupted_and_goes_on(tmp_path: Path) -> None:
    record, watch = tmp_path / "record.jsonl", RunProgress(tmp_path)

    def add(text: str) -> str:
        with record.open("a") as file:
            file.write(text)
        watch.look()
        return watch.text

    assert add("") == "starting"
    assert add('{"kind": "settings", "values": {"config": {"trainer": {"max_epochs": -1}}}}\n') == "epoch 1, step 0"
    assert watch.fraction == 0
    add('{"kind": "settings", "values": {"config": {"trainer": {"max_epochs": 2}}}}\n')
    half = '{"kind": "metrics", "step": 7, "values": {"epoch": 1.0}}\n'
    assert add(half[:20]) == "epoch 1/2, step 0"
    assert add(half[20:]) == "epoch 2/2, step 7"
    assert add('{"kind": "end", "status": "failed"}\n{"torn') == "epoch 2/2, step 7"
    assert add('\n{"kind": "end", "status": "success"}\n') == "testing"
    assert add('{"kind": "environment", "values": {}}\n') == "epoch 2/2, step 7"


# The command.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["no.yaml"], "no.yaml does not exist"),
        (["study.yaml", "--jobs", "two"], "--jobs two"),
        (["study.yaml", "--job"], "normgeo study"),
        ([], "normgeo study needs study. See normgeo study --help."),
        (["study.yaml", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["study.yaml"], "--model.norms is no option of normgeo fit"),
    ],
)
def test_what_cannot_work_ends_in_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    written("name: s\ngrid: {model.norms: [bn]}")
    with pytest.raises(SystemExit) as stopped:
        main(["study", *args])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("normgeo: error: ")
    assert said in line


def test_dry_run_lists_and_runs_nothing(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    written(f"name: s\nconfigs: [{base}]\nsettings: {{trainer.max_epochs: 2}}\ngrid: {{seed_everything: [3, 4]}}")
    with pytest.raises(SystemExit) as stopped:
        main(["study", "study.yaml", "--dry-run"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines() if line.startswith("  seed=")] == [
        ["seed=3", "waiting"],
        ["seed=4", "waiting"],
    ]
    (command,) = [line for line in shown.splitlines() if line.startswith("The first is: ")]
    options = "--config=base.yaml --trainer.max_epochs=2 --seed_everything=3 --run=runs/s/seed=3"
    assert command == f"The first is: normgeo fit {options}"
    assert not Path("runs").exists()
    assert "measured steps: 8 of 8 per run. records: about " in shown
    assert "checkpoints: 2 × 89.5 MB per run while it trains, 44.8 MB each without optimizer states" in shown
    assert re.search(r"179\.\d MB for 2 runs\ndisk: 44\d\.\d MB needed by unfinished runs, \S+ .B free\n", shown)


def test_a_disk_that_is_too_small_is_said_before_the_study(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(f"name: s\nconfigs: [{base}]\ngrid: {{seed_everything: [3, 4]}}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**7))
    with pytest.raises(SystemExit):
        main(["study", "study.yaml", "--dry-run"])
    assert "The disk of runs/s has 10.0 MB free and the study needs about 44" in capsys.readouterr().out


# A real study whose runs are killed while they train, and whose runner is killed, too.


class Killed:
    """A study of two runs that is killed twice.

    The runner is killed during the first run, which then continues alone. A second runner waits for it, and its
    second run is killed after an epoch and resumes with the third runner. ``whole`` is the second run under another
    name, which is never killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        Path("base.yaml").write_text(BASE)
        grid = {"model.norm": ["bn", "gn"]}
        Path("study.yaml").write_text(yaml.safe_dump({"name": "killed", "configs": ["base.yaml"], "grid": grid}))
        self.study = load_study("study.yaml")
        self.bn, self.gn = (self.study.folder / name for name in self.study.runs())
        self._kill_the_runner()
        self.orphan_was_listed_as = Index(self.study).entries[0].status
        self.after_the_kill = self._run(Killer())
        self.at_the_kill = (self.gn / "record.jsonl").read_text()
        self.after_all = self._run(None)

    def _kill_the_runner(self) -> None:
        command = [sys.executable, "-m", "lightning_normgeo", "study", "study.yaml", "--report", "false"]
        with Path("said").open("w") as said:
            runner = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not (self.bn / "record.jsonl").exists():
            assert time.monotonic() < deadline
            assert runner.poll() is None, Path("said").read_text()
            time.sleep(0.05)
        runner.kill()
        runner.wait()

    def _run(self, killer: Killer | None) -> dict[str, str]:
        index = Index(self.study)
        with ProgressDisplay(Console(file=StringIO())) as display:
            runner = Runner(index, killer or display)
            if killer is not None:
                killer.runner = runner
            runner.run(every=0.05)
        return {entry.name: entry.status + entry.error for entry in index.entries}


class Killer:
    """A display that kills the second run once its checkpoint of the first epoch is there."""

    runner: Runner

    def update(self, entry: IndexEntry, watch: RunProgress) -> None:
        (attempt,) = self.runner._active or [None]
        if entry.name == "norm=gn" and attempt is not None and attempt.pid is not None and watch.epoch == 1:
            os.kill(attempt.pid, signal.SIGKILL)
            watch.epoch = 0  # once

    def stopping(self, count: int) -> None:
        raise AssertionError


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    with isolated(tmp_path_factory.mktemp("killed")) as folder:
        os.environ.update(WANDB_MODE="disabled", OMP_NUM_THREADS="1")
        done = Killed(folder)
        yield done
        for checkpoint in folder.glob("runs/*/*/checkpoints/*"):
            checkpoint.unlink()


@pytest.fixture
def _there(killed: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(killed.folder)
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.mark.usefixtures("_there")
def test_a_run_whose_runner_was_killed_went_on_and_was_not_run_twice(killed: Killed) -> None:
    assert killed.orphan_was_listed_as == "running"
    assert killed.after_the_kill["norm=bn"] == "finished"
    lines = list(read_lines(killed.bn / "record.jsonl"))
    assert [line["kind"] for line in lines].count("environment") == 1


@pytest.mark.usefixtures("_there")
def test_a_killed_run_was_reported_and_went_on_from_its_checkpoint(killed: Killed) -> None:
    assert killed.after_the_kill["norm=gn"] == "failedended by SIGKILL, as when memory runs out"
    assert set(killed.after_all.values()) == {"finished"}
    before = Path("before.jsonl")
    before.write_text(killed.at_the_kill)
    first = [line for line in read_lines(before) if line["kind"] == "metrics"]
    lines = list(read_lines(killed.gn / "record.jsonl"))
    again = [line for line in lines[len(killed.at_the_kill.splitlines()) :] if line["kind"] == "metrics"]
    assert max(line["values"]["epoch"] for line in first if "epoch" in line["values"]) >= 1
    assert min(line["step"] for line in again) >= 4  # the first epoch was not repeated
    record = read_record(killed.gn)
    assert record.complete
    assert [step for step, _ in record.metrics["norm_growth/increment"]] == list(range(12))
    assert all([s for s, _ in points] == sorted(s for s, _ in points) for points in record.metrics.values())


@pytest.mark.usefixtures("_there")
def test_a_killed_run_is_the_one_that_was_not_bit_for_bit(killed: Killed) -> None:
    """Compares batches and crops, and so the random numbers; momentum; the learning rate; sums over all steps."""
    main(["fit", "--config", "base.yaml", "--model.norm", "gn", "--run", "runs/whole/gn"])
    whole, parts = read_record("runs/whole/gn"), read_record(killed.gn)
    assert {"train/loss", "val/loss", "test/accuracy", "norm_growth/increment"} <= set(whole.metrics)
    assert any("cumulative" in key for key in whole.metrics)
    size = checked_cases(killed.study)[-1].size  # of the same settings
    assert (size.steps, size.measured, size.files) == (12, 12, 2)
    assert Path("runs/whole/gn/record.jsonl").stat().st_size == pytest.approx(size.record, rel=0.25)
    written = [path.stat().st_size for path in Path("runs/whole/gn/checkpoints").glob("*.ckpt")]
    assert written == pytest.approx(size.files * [size.checkpoint], rel=0.02)
    dropped = [path.stat().st_size for path in (killed.gn / "checkpoints").glob("*.ckpt")]
    assert dropped == pytest.approx(size.files * [size.weights], rel=0.02)
    assert parts.metrics == whole.metrics
    assert parts.layers == whole.layers


@pytest.mark.usefixtures("_there")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # Lightning's, wherever a run is tested
def test_checkpoints_of_finished_runs_are_tested_and_not_trained(
    killed: Killed, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (killed.bn, killed.gn):  # one finished when its runner had been killed
        found = [torch.load(path, weights_only=True) for path in folder.glob("checkpoints/*.ckpt")]
        assert found
        assert all("optimizer_states" not in one and "loops" in one for one in found)
    best = str(next(killed.gn.glob("checkpoints/epoch*.ckpt")))
    options = ["--config", "base.yaml", "--model.norm", "gn", "--ckpt_path", best, "--trainer.logger", "false"]
    cli = run(["test", *options])
    assert cli.trainer.callback_metrics["test/accuracy"] == read_record(killed.gn).metrics["test/accuracy"][-1][1]
    assert ResNetClassifier.load_from_checkpoint(best).hparams["norm"] == "gn"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *options, "--trainer.max_epochs", "9"])
    assert stopped.value.code == 2
    assert "no optimizer states, so training cannot resume from it" in capsys.readouterr().err
    assert "keep_optimizer_states: true" in read_error(lambda: run(["fit", *options]))


def read_error(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigurationError) as refused:
        call()
    return str(refused.value)


@pytest.mark.usefixtures("_there")
def test_a_finished_study_says_so_and_runs_nothing(killed: Killed, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in killed.study.folder.rglob("record.jsonl")}
    with pytest.raises(SystemExit) as stopped:
        main(["study", "study.yaml", "--report", "false"])
    assert stopped.value.code == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "norm=" in line]
    assert rows == [["norm=bn", "finished"], ["norm=gn", "finished"]]
    assert {path: path.stat().st_mtime_ns for path in before} == before
