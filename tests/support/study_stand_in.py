"""Fake ``normgeo`` command for studies: a process that behaves as told, and starts in no time.

It locks and writes the run's folder as the real command does, without importing it. ``--behave`` selects its behavior:
``finish``, ``fail``, ``refuse``, ``end`` early without a message, ``die``, ``wait`` for a file ``go`` in the working
folder, be ``stubborn`` and ignore requests to end, ``leave`` behind a process that has the lock as well, or be
``late``: the first process takes the lock when there is a second one, which is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WANDB_RUN_GROUP")


def main() -> None:
    command, *arguments = sys.argv[1:]
    assert command == "fit"
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    folder, behave = Path(options["run"]), options["behave"]
    with (folder / "starts").open("a") as starts:
        starts.write(json.dumps({"pid": os.getpid(), **{key: os.environ.get(key) for key in ENVIRONMENT}}) + "\n")
    if behave == "late":
        be_late(folder)
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.set_inheritable(lock.fileno(), behave == "leave")
    write(folder, "environment", values={})
    write(folder, "settings", values={"config": {"trainer": {"max_epochs": 4}}})
    write(folder, "metrics", step=9, values={"epoch": 2.0, "val/accuracy": 0.5})
    if behave in ("wait", "stubborn", "leave", "late"):
        wait(folder, behave)
    if behave == "refuse":
        print("normgeo: error: norm='gnn' is unknown.")
        sys.exit(2)
    if behave == "fail":
        print("Traceback (most recent call last):\n  …\nRuntimeError: out of cheese\n\nwandb: goodbye")
        sys.exit(1)
    if behave == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if behave != "end":
        write(folder, "end", status="success")
        (folder / "run.json").write_text("{}")


def write(folder: Path, kind: str, **fields: Any) -> None:
    with (folder / "record.jsonl").open("a") as record:
        record.write(json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n")


def be_late(folder: Path) -> None:
    first = count_lines(folder / "starts") == 1
    while not (count_lines(folder / "starts") == 2 if first else (folder / "record.jsonl").exists()):
        time.sleep(0.02)


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def wait(folder: Path, behave: str) -> None:
    if behave == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behave == "leave":
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        left = subprocess.Popen(command, stdout=subprocess.DEVNULL, close_fds=False)
        (folder / "left").write_text(str(left.pid))
        sys.exit(1)
    (folder / "waits").touch()
    while not Path("go").exists():
        time.sleep(0.02)


if __name__ == "__main__":
    main()
