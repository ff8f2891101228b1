"""The tutorials run, and their outputs are those of a run."""

from __future__ import annotations

import io
import logging
import re
import runpy
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo.__main__ import main
from lightning_normgeo.study import runner
from support.in_process import InProcess

nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: install the extra `docs`")
from support.pages import DOCS, NOTEBOOKS, named  # noqa: E402


def cells(notebook: Path) -> list[Any]:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture
def _own_loggers() -> Iterator[None]:
    """Give loggers their levels back: tutorials ask Lightning for silence."""
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    levels = [(logger, logger.level) for logger in known]
    yield
    for logger, level in levels:
        logger.setLevel(level)


_run = subprocess.run


def command(words: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m lightning_normgeo …`` without a process, and return what it prints; run others as they are."""
    if list(words[1:3]) != ["-m", "lightning_normgeo"]:
        return _run(words, **settings)
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main(words[3:])
    assert stopped.value.code == 0
    return subprocess.CompletedProcess(words, 0, printed.getvalue())


@pytest.fixture
def _without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands of a tutorial and the runs of a study do without processes, which take seconds to start."""
    monkeypatch.setattr(subprocess, "run", command)
    monkeypatch.setattr(runner, "RunProcess", InProcess)


@pytest.mark.usefixtures("_own_loggers", "_without_processes")
@pytest.mark.filterwarnings("ignore::lightning_normgeo.errors.MeasurementWarning")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_cells_run(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported torch already; the slow test uses a kernel."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(notebook):
        exec(compile(cell.source, str(notebook), "exec"), scope)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_notebooks_execute(notebook: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient is missing: install the extra `docs`")
    runpy.run_path(str(DOCS / "notebooks.py"))["execute"](notebook)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_outputs_are_clean(notebook: Path) -> None:
    nbformat.validate(nbformat.read(notebook, as_version=4))
    found = [output for cell in cells(notebook) for output in cell.outputs]
    assert found
    assert {output.output_type for output in found} == {"stream"}
    for output in found:
        assert not re.search(r"\x1b|/tmp/|/home/|/root/|Traceback", output.text), output.text
