"""Scripts that start in no time: a process has imported what takes long, and forks a child for each of them."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


class ForkServer:
    """A process that has imported these modules, and runs scripts in children of its own, one after another."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def run(
        self, script: Path, *arguments: str, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script as ``python script *arguments`` does, in the folder and the environment of now and this one."""
        with TemporaryDirectory() as place:
            files = Path(place, "output"), Path(place, "errors")
            request = {
                "script": str(script),
                "arguments": arguments,
                "folder": str(Path.cwd()),
                "environment": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
                "files": list(map(str, files)),
            }
            print(json.dumps(request), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise TimeoutError(f"{script.name} took longer than {timeout} s: {files[1].read_text()[-2000:]}")
            status = int(self._process.stdout.readline())
            said, complained = (file.read_text() for file in files)
        return subprocess.CompletedProcess([script.name, *arguments], status, said, complained)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@cache
def lightning_server() -> ForkServer:
    """Return a process that has imported Lightning and the callbacks; all tests of this process share it."""
    server = ForkServer(
        "pytorch_lightning", "lightning_normgeo.callbacks", "lightning_normgeo.runs.records.record_logger"
    )
    atexit.register(server.close)
    return server


@cache
def torch_server() -> ForkServer:
    """Return a process that has imported torch alone, and neither Lightning nor this package."""
    server = ForkServer("torch")
    atexit.register(server.close)
    return server


def _serve(modules: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(script: str, arguments: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    """Do what a new process would, and end."""
    status: Any = 0
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1:])
