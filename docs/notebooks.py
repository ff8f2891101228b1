"""Executes the tutorials, each in an empty folder, and writes their outputs into them: ``python docs/notebooks.py``.

Messages of other libraries, colors and the names of temporary folders are removed from the outputs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "tutorials"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def execute(file: Path) -> Any:
    """Return a notebook with the outputs of its execution in an empty folder, on one core.

    Raises:
        CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    variables = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    before = {name: os.environ.get(name) for name in variables}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(variables)
        try:
            resources = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=120, record_timing=False, resources=resources).execute()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for one in cell.outputs for output in cleaned(one, folder)]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def cleaned(output: Any, folder: str) -> Sequence[Any]:
    """Return an output without the messages of other libraries; nothing if no line is left."""
    if output.output_type == "display_data":  # tables of rich
        output = nbformat.v4.new_output("stream", name="stdout", text=output.data["text/plain"])
    if output.output_type != "stream":
        return [output]
    lines = _ESCAPE.sub("", output.text).replace(f"{folder}/", "").splitlines()
    if output.name == "stderr":
        lines = [line for line in lines if line.startswith("normgeo ")]
    output.text = "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"
    return [output] if output.text.strip() else []


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            nbformat.write(execute(path), path)
            print(path.name, flush=True)
