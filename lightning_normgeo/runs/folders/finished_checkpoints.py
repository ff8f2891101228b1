"""Checkpoints of a finished run without the state of its optimizer, which only a longer training would need."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_normgeo.errors import warn_once
from lightning_normgeo.runs.folders.run_folder import CHECKPOINTS, holds_optimizer_states
from lightning_normgeo.utilities.checked_values import first_line
from lightning_normgeo.utilities.files import replacing

_OF_THE_OPTIMIZER = ("optimizer_states", "lr_schedulers")
"""Entries that Lightning restores only where training resumes. Weights, loops and the states of callbacks stay."""


def drop_optimizer_states(folder: Path) -> int:
    """Rewrite the checkpoints of a finished run without optimizer states and learning rate schedules.

    Each file is replaced atomically and keeps its times; links to it, such as ``last.ckpt``, stay valid. A checkpoint
    without tensors in these states, as under plain SGD, stays as it is. So do sharded ones, which are folders, and one
    that cannot be read or written, with a warning.

    Args:
        folder: Folder of the run.

    Returns:
        Number of bytes that were freed; 0 if there was nothing to drop. The cost is then that of reading the index of
        each checkpoint, otherwise that of reading and writing its weights.
    """
    freed = 0
    for path in sorted((folder / CHECKPOINTS).glob("*.ckpt")):
        if path.is_symlink() or path.is_dir() or not holds_optimizer_states(path):
            continue
        before = path.stat().st_size
        try:
            _rewrite(path)
        except Exception as error:  # of the file system, or of an entry that is not a plain value
            warn_once(f"{path} keeps its optimizer states: it could not be rewritten ({first_line(error)}).")
        freed += max(before - path.stat().st_size, 0)
    return freed


def _rewrite(path: Path) -> None:
    """Replace a checkpoint by one without the entries of the optimizer, if they have tensors."""
    import torch  # takes seconds, which the command's help need not wait for
    from torch.utils._pytree import tree_leaves

    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not any(isinstance(value, torch.Tensor) for value in tree_leaves(content["optimizer_states"])):
        return
    for key in _OF_THE_OPTIMIZER:
        content.pop(key, None)
    times = path.stat()
    with replacing(path) as draft:
        torch.save(content, draft)
        os.utime(draft, ns=(times.st_atime_ns, times.st_mtime_ns))
