"""A study's runner: signals, kills, failures, CPU and GPU shares, with real processes that do not train."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.study import study_command
from lightning_normgeo.study.definition import Study
from lightning_normgeo.study.resources import resource_share
from lightning_normgeo.study.run_progress import RunProgress
from lightning_normgeo.study.runner import Runner
from lightning_normgeo.study.study_index import Index, IndexEntry
from support.isolation import SUPPORT

PROGRAM = (sys.executable, "-S", str(SUPPORT / "study_stand_in.py"))
Shown = list[tuple[str, str]]


class Recorder:
    """A display that records each change of status, and acts on request."""

    def __init__(self, act: Callable[[IndexEntry, RunProgress], None] = lambda entry, watch: None) -> None:
        self.shown: Shown = []
        self._act = act

    def update(self, entry: IndexEntry, watch: RunProgress) -> None:
        if (entry.name, entry.status) not in self.shown[-1:]:
            self.shown.append((entry.name, entry.status))
        self._act(entry, watch)

    def stopping(self, count: int) -> None:
        self.shown.append(("stopping", str(count)))


def study_of(*behaviours: str, seeds: int = 0, **settings: Any) -> Study:
    grid: dict[str, list[Any]] = {"behave": list(behaviours), **({"seed_everything": [*range(seeds)]} if seeds else {})}
    return Study("s", grid, settings=settings)


def run(study: Study, jobs: int = 1, display: Recorder | None = None, **settings: Any) -> tuple[Index, Shown]:
    index, display = Index(study), display or Recorder()
    study.folder.mkdir(parents=True, exist_ok=True)
    Runner(index, display, jobs, program=PROGRAM, **settings).run(every=0.02)
    return index, display.shown


def statuses(study: Study) -> dict[str, str]:
    """Return the status of each run from the study's index."""
    return {run["name"]: run["status"] for run in json.loads((study.folder / "study.json").read_text())["runs"]}


def starts(study: Study, name: str) -> list[dict[str, Any]]:
    """Return the start messages of each process of a run."""
    path = study.folder / name / "starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_one_after_another() -> None:
    study = study_of("finish", seeds=2)
    index, shown = run(study)
    first, second = "behave=finish,seed=0", "behave=finish,seed=1"
    assert shown == [(first, "running"), (first, "finished"), (second, "running"), (second, "finished")]
    assert [entry.status for entry in index.entries] == ["finished", "finished"]
    assert statuses(study) == {first: "finished", second: "finished"}
    assert all(entry.seconds > 0 for entry in index.entries)


def test_several_at_a_time_and_never_more() -> None:
    study = study_of("wait", seeds=3)
    together: list[int] = []

    def act(entry: IndexEntry, watch: RunProgress) -> None:
        waiting = [path for path in study.folder.glob("*/waits") if not (path.parent / "run.json").exists()]
        together.append(len(waiting))
        if len(waiting) == 2:
            Path("go").touch()

    run(study, jobs=2, display=Recorder(act))
    assert max(together) == 2
    assert set(statuses(study).values()) == {"finished"}


def test_finished_runs_are_not_repeated() -> None:
    study = study_of("finish", seeds=2)
    run(study)
    _, shown = run(study)
    assert shown == []
    assert [len(starts(study, name)) for name in study.runs()] == [1, 1]


def test_a_study_that_grew_runs_what_is_new() -> None:
    run(study_of("finish", seeds=1))
    grown = study_of("finish", seeds=3)
    assert [entry.status for entry in Index(grown).entries] == ["finished", "waiting", "waiting"]
    run(grown)
    assert [len(starts(grown, name)) for name in grown.runs()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        ("fail", "RuntimeError: out of cheese"),
        ("refuse", "normgeo: error: norm='gnn' is unknown."),
        ("die", "ended by SIGKILL, as when memory runs out"),
        ("end", "ended with exit status 0, but did not finish"),
    ],
)
def test_a_run_that_fails_is_reported_and_the_others_go_on(behave: str, error: str) -> None:
    study = study_of(behave, "finish")
    index, _ = run(study)
    assert statuses(study) == {f"behave={behave}": "failed", "behave=finish": "finished"}
    assert index.entries[0].error == error
    again = Index(study)  # the failure is stored
    assert (again.entries[0].status, again.entries[0].error) == ("failed", error)
    run(study)  # and tried again
    assert [len(starts(study, name)) for name in study.runs()] == [2, 1]


def test_the_error_is_that_of_the_last_attempt() -> None:
    study = study_of("fail")
    run(study)
    (study.folder / "behave=fail" / "starts").unlink()
    (study.folder / "behave=fail" / "starts").mkdir()  # the next attempt fails on it before it prints anything
    index, _ = run(study)
    assert index.entries[0].error.startswith("IsADirectoryError")
    assert "out of cheese" in (study.folder / "behave=fail" / "output.log").read_text()


def test_a_run_that_cannot_be_started_does_not_stop_the_others() -> None:
    study = study_of("fail", "finish")
    study.folder.mkdir(parents=True)
    (study.folder / "behave=fail").write_text("in the way")
    index, shown = run(study)
    assert [entry.status for entry in index.entries] == ["failed", "finished"]
    assert index.entries[0].error.startswith("cannot be started: ")
    assert shown[:2] == [("behave=fail", "running"), ("behave=fail", "failed")]


def test_nothing_is_left_of_a_run_that_died() -> None:
    study = study_of("leave")
    run(study)
    left = int((study.folder / "behave=leave" / "left").read_text())
    eventually(lambda: not alive(left))
    assert statuses(study) == {"behave=leave": "failed"}  # no other process is writing, perhaps after a moment


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_progress_is_that_of_the_record() -> None:
    study = study_of("wait")
    seen: list[tuple[str, float]] = []

    def act(entry: IndexEntry, watch: RunProgress) -> None:
        seen.append((watch.text, watch.fraction))
        if watch.epoch:
            Path("go").touch()

    run(study, display=Recorder(act))
    assert seen[0] == ("starting", 0.0)
    assert ("epoch 3/4, step 9, val 50.0 %", 0.5) in seen
    assert seen[-1] == ("testing", 1.0)


def test_an_unreadable_index_is_made_anew_from_the_runs() -> None:
    study = study_of("finish", "fail")
    run(study)
    for text in ('{"version": "0.1.0", "na', "[]", '{"runs": [7]}', '{"runs": {}}', "\ufeff\x00"):
        (study.folder / "study.json").write_text(text)
        assert [entry.status for entry in Index(study).entries] == ["finished", "interrupted"]


def test_changed_settings_are_told_from_the_run(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {arch: resnet18}\n")
    study = Study("s", {"behave": ["finish", "fail"]}, ["base.yaml"], {"report": False})
    run(study)
    assert [Index(study).is_outdated(entry) for entry in Index(study).entries] == [False, False]
    (tmp_path / "base.yaml").write_text("# the same\nmodel: {arch: resnet18}\n")
    same = Study("s", study.grid, ["base.yaml"], {"report": True, "wandb": "disabled"})
    assert not any(map(Index(same).is_outdated, Index(same).entries))
    (tmp_path / "base.yaml").write_text("model: {arch: resnet34}\n")
    assert all(map(Index(study).is_outdated, Index(study).entries))
    run(study)  # the finished run is kept, the other one starts with the current settings
    assert [Index(study).is_outdated(entry) for entry in Index(study).entries] == [True, False]


def left_half(study: Study, behave: str) -> Path:
    """Create an unfinished run of a study with a checkpoint, and return its folder."""
    run(study)
    folder = study.folder / f"behave={behave}"
    (folder / "checkpoints").mkdir()
    torch.save({"optimizer_states": []}, folder / "checkpoints" / "last.ckpt")
    return folder


def test_a_run_with_a_checkpoint_of_other_settings_does_not_go_on() -> None:
    before, changed = study_of("fail", lr=0.02), study_of("fail", "finish", lr=0.7)
    folder = left_half(before, "fail")
    for _ in range(2):  # it stays in the index
        index, _ = run(changed)
        assert [entry.status for entry in index.entries] == ["failed", "finished"]
        assert (
            index.entries[0].error
            == f"began with other settings; remove {folder} to begin anew, or restore the settings"
        )
        assert len(starts(changed, "behave=fail")) == 1
    run(before)
    assert len(starts(before, "behave=fail")) == 2
    shutil.rmtree(folder)
    index, _ = run(changed)
    assert index.entries[0].error == "RuntimeError: out of cheese"
    assert not index.is_outdated(index.entries[0])


def checkpoint_in(folder: Path) -> Path:
    """Create a checkpoint with optimizer states in the folder of a run, and return its path."""
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"optimizer_states": [torch.ones(99)], "state_dict": {}}, folder / "checkpoints" / "best.ckpt")
    return folder / "checkpoints" / "best.ckpt"


def test_optimizer_states_are_dropped_when_a_run_has_finished_and_only_then() -> None:
    study = study_of("finish", "fail")
    finished, failed = (checkpoint_in(study.folder / name) for name in study.runs())
    Runner(Index(study), Recorder(), program=PROGRAM).run(every=0.02)
    assert torch.load(finished) == {"state_dict": {}}
    assert "optimizer_states" in torch.load(failed)


def test_optimizer_states_are_kept_where_the_study_says_so_and_dropped_later() -> None:
    study = replace(study_of("finish"), keep_optimizer_states=True)
    kept = checkpoint_in(study.folder / "behave=finish")
    runner = Runner(Index(study), Recorder(), program=PROGRAM)
    runner.run(every=0.02)
    assert runner.freed == 0
    assert "optimizer_states" in torch.load(kept)
    before = kept.stat().st_size
    runner = Runner(Index(study_of("finish")), Recorder(), program=PROGRAM)
    runner.run(every=0.02)  # as after a run that finished when its runner had been killed
    assert runner.freed == before - kept.stat().st_size > 0
    assert torch.load(kept) == {"state_dict": {}}
    assert len(starts(study, "behave=finish")) == 1


def test_a_configuration_that_disappears_fails_its_run_alone(forked: Any) -> None:
    study = Study("s", {"config": ["a.yaml", "b.yaml", "c.yaml"], "behave": ["wait"]})
    for name in study.grid["config"]:
        Path(name).write_text("{}")
    runner = forked(study)
    with waiting_run(study):
        Path("b.yaml").unlink()
        Path("go").touch()
        assert exit_status(runner) == 1
    assert list(statuses(study).values()) == ["finished", "failed", "finished"]
    assert "failed: cannot be started: [Errno 2] No such file or directory: 'b.yaml'" in Path("said").read_text()


# Interrupts and kills: the runner is a process as well, forked, as it takes seconds to start one.


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Study], int]]:
    """Run ``normgeo study`` in a process of its own and return its process id; it ends with the test."""
    monkeypatch.setattr(study_command, "Runner", partial(Runner, program=PROGRAM, patience=1.0))
    monkeypatch.setattr(study_command, "checked_cases", lambda *args: [])
    runners: list[int] = []

    def start(study: Study) -> int:
        monkeypatch.setattr(study_command, "load_study", lambda path: study)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about threads: the child starts none
            pid = os.fork()
        if pid == 0:
            code = 99
            with suppress(BaseException), (tmp_path / "said").open("w") as said, redirect_stdout(said):
                code = study_command.main(["study.yaml", "--report", "false"])
            os._exit(code)
        runners.append(pid)
        return pid

    yield start
    (tmp_path / "go").touch()
    for pid in runners:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Enable signals that background jobs and nohup ignore: a forked runner would inherit that."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def waiting_run(study: Study) -> Iterator[int]:
    """Wait until a run of the study waits for its file, and return its process id."""
    eventually(lambda: list(study.folder.glob("*/waits")))
    (waits,) = study.folder.glob("*/waits")
    yield starts(study, waits.parent.name)[-1]["pid"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_runs_and_the_same_command_goes_on(number: signal.Signals, forked: Any) -> None:
    study = study_of("wait", "finish")
    runner = forked(study)
    with waiting_run(study) as run_pid:
        os.kill(runner, number)
        assert exit_status(runner) == 128 + number
        assert not alive(run_pid)
    assert statuses(study) == {"behave=wait": "interrupted", "behave=finish": "waiting"}
    assert "interrupted; the same command resumes it" in Path("said").read_text()
    Path("go").touch()
    run(study)
    assert statuses(study) == {"behave=wait": "finished", "behave=finish": "finished"}
    assert len(starts(study, "behave=wait")) == 2


@pytest.mark.parametrize("twice", [False, True], ids=["after a while", "at once, when asked twice"])
def test_a_run_that_does_not_end_is_made_to(twice: bool, forked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_command, "Runner", partial(Runner, program=PROGRAM, patience=600 if twice else 0.2))
    study = study_of("stubborn")
    runner = forked(study)
    with waiting_run(study) as run_pid:
        os.kill(runner, signal.SIGINT)
        if twice:
            eventually(lambda: "stopping 1 run" in Path("said").read_text())
            os.kill(runner, signal.SIGINT)
        assert exit_status(runner) == 130
        assert not alive(run_pid)
    assert statuses(study) == {"behave=stubborn": "interrupted"}


def test_signals_that_are_ignored_stay_so(forked: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        study = study_of("wait")
        runner = forked(study)
        with waiting_run(study):
            os.kill(runner, signal.SIGHUP)
            Path("go").touch()
            assert exit_status(runner) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_outlives_its_runner_is_waited_for(forked: Any) -> None:
    study = study_of("finish", "wait", "end")
    runner = forked(study)
    with waiting_run(study):
        os.kill(runner, signal.SIGKILL)
        assert exit_status(runner) == -signal.SIGKILL
        assert [entry.status for entry in Index(study).entries] == ["finished", "running", "waiting"]
        _, shown = run(study, display=Recorder(lambda entry, watch: Path("go").touch()))
    assert shown[:3] == [("behave=wait", "running"), ("behave=wait", "finished"), ("behave=end", "running")]
    assert len(starts(study, "behave=wait")) == 1


def test_a_run_that_outlives_its_runner_and_then_dies_is_run_again(forked: Any) -> None:
    study = study_of("wait")
    runner = forked(study)
    with waiting_run(study) as run_pid:
        os.kill(runner, signal.SIGKILL)
        exit_status(runner)

        def act(entry: IndexEntry, watch: RunProgress) -> None:
            if len(starts(study, "behave=wait")) == 1:
                with suppress(ProcessLookupError):
                    os.kill(run_pid, signal.SIGKILL)
            else:
                Path("go").touch()

        _, shown = run(study, display=Recorder(act))
    assert [status for _, status in shown] == ["running", "interrupted", "running", "finished"]
    assert len(starts(study, "behave=wait")) == 2


def test_a_run_that_was_only_starting_when_its_runner_was_killed_is_waited_for(forked: Any) -> None:
    study, name = study_of("late", "finish"), "behave=late"
    runner = forked(study)
    eventually(lambda: starts(study, name))
    os.kill(runner, signal.SIGKILL)
    exit_status(runner)
    looks: list[bool] = []

    def act(entry: IndexEntry, watch: RunProgress) -> None:
        looks.append(not alive(starts(study, name)[-1]["pid"]))
        if sum(looks) > 3 and len(starts(study, name)) == 2:  # the second command was refused, with a message
            Path("go").touch()

    index, shown = run(study, display=Recorder(act))
    assert shown[:2] == [(name, "running"), (name, "finished")]
    assert [entry.status for entry in index.entries] == ["finished", "finished"]
    assert len(starts(study, name)) == 2


@pytest.fixture
def reader(forked: Any) -> Callable[[Study], tuple[int, int]]:
    """Run a study whose output goes to a pipe; return the study's process and the reading end."""

    def start(study: Study) -> tuple[int, int]:
        os.mkfifo("said")
        return forked(study), os.open("said", os.O_RDONLY | os.O_NONBLOCK)  # this order keeps the end from the child

    return start


def test_a_signal_ends_the_runs_where_nobody_reads(reader: Any) -> None:
    study = study_of("stubborn")
    runner, end = reader(study)
    with waiting_run(study) as run_pid:
        os.close(end)
        os.kill(runner, signal.SIGHUP)
        assert exit_status(runner) == 128 + signal.SIGHUP
        assert not alive(run_pid)
    assert statuses(study) == {"behave=stubborn": "interrupted"}


def test_a_study_goes_on_where_nobody_reads(reader: Any) -> None:
    study = study_of("wait", "finish")
    runner, end = reader(study)
    with waiting_run(study):
        os.close(end)
        Path("go").touch()
        assert exit_status(runner) == 0
    assert statuses(study) == {"behave=wait": "finished", "behave=finish": "finished"}


def test_runs_end_even_if_that_cannot_be_shown() -> None:
    class Broken(Recorder):
        def stopping(self, count: int) -> None:
            raise OSError("no terminal")

    study = study_of("stubborn")
    display = Broken(lambda entry, watch: runner.interrupt() if list(study.folder.glob("*/waits")) else None)
    study.folder.mkdir(parents=True)
    runner = Runner(Index(study), display, program=PROGRAM, patience=0.2)
    with pytest.raises(OSError, match="no terminal"):
        runner.run(every=0.02)
    assert not alive(starts(study, "behave=stubborn")[0]["pid"])


def test_an_interrupt_leaves_the_runs_of_others_alone(forked: Any) -> None:
    study = study_of("wait")
    first = forked(study)
    with waiting_run(study) as run_pid:
        os.kill(first, signal.SIGKILL)
        exit_status(first)
        Path("said").unlink()
        second = forked(study)
        eventually(lambda: Path("said").exists() and "behave=wait: begins" in Path("said").read_text())
        os.kill(second, signal.SIGTERM)
        assert exit_status(second) == 128 + signal.SIGTERM
        assert alive(run_pid)
        assert statuses(study) == {"behave=wait": "running"}


def test_two_runners_at_once(forked: Any) -> None:
    study = study_of("wait")
    forked(study)
    with waiting_run(study), pytest.raises(ConfigurationError, match=r"runs/s is being run by another process"):
        study_command.main(["study.yaml", "--report", "false"])
    assert len(starts(study, "behave=wait")) == 1


@pytest.mark.usefixtures("forked")
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("runs").write_text("")
    monkeypatch.setattr(study_command, "load_study", lambda path: study_of("finish"))
    with pytest.raises(ConfigurationError, match=r"runs/s: cannot write there \(Not a directory\)"):
        study_command.main(["study.yaml"])


def test_exit_status_and_what_is_said_of_failures(forked: Any) -> None:
    assert exit_status(forked(study_of("fail", "finish"))) == 1
    said = Path("said").read_text()
    log = Path("runs/s/behave=fail/output.log")
    assert f"behave=fail failed: RuntimeError: out of cheese (all of it: {log})" in said.splitlines()
    assert said.splitlines()[-1] == f"index:  {Path('runs/s/study.json').absolute()}"
    assert exit_status(forked(study_of("finish"))) == 0


# Shares of CPU threads and GPUs.


@pytest.mark.parametrize(
    ("jobs", "gpus", "visible", "shares"),
    [
        (1, 4, None, [{}]),
        (2, 0, None, [{"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3"}]),
        (2, 4, None, [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "1,3"}]),
        (2, 3, None, [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        (3, 2, None, [{"CUDA_VISIBLE_DEVICES": device} for device in ("0", "1", "0")]),
        (2, 8, "5, GPU-7a", [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "GPU-7a"}]),
        (2, 8, "", [{}, {}]),
    ],
)
def test_share_of_the_machine(
    jobs: int, gpus: int, visible: str | None, shares: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    found = [resource_share(slot, jobs) for slot in range(jobs)]
    assert [{**({"OMP_NUM_THREADS": str(6 // jobs)} if jobs > 1 else {}), **expected} for expected in shares] == found


def test_threads_that_are_given_stay_and_one_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert resource_share(0, 2)["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert resource_share(0, 9)["OMP_NUM_THREADS"] == "1"


def test_runs_get_their_share_and_a_group_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    study = study_of("wait", seeds=2)

    def act(entry: IndexEntry, watch: RunProgress) -> None:
        if len(list(study.folder.glob("*/waits"))) == 2:
            Path("go").touch()

    run(study, jobs=2, display=Recorder(act))
    told = [starts(study, name)[0] for name in study.runs()]
    assert [process["CUDA_VISIBLE_DEVICES"] for process in told] == ["0", "1"]
    assert {process["WANDB_RUN_GROUP"] for process in told} == {"s"}
