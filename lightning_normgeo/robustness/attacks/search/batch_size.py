"""Batch sizes that memory allows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.search.projected_gradient import Logits, ascent

_CPU_BYTES = 2**30
"""Bytes that activations may take on a CPU: more memory is mapped anew in every pass, so it makes nothing faster."""
_GPU_SHARE = 0.25
"""Fraction of a GPU's free memory that activations may take: workspaces of cuDNN and others need memory too."""
_MOST = {"cpu": 256, "cuda": 1024}
"""Largest batch size by type of device."""


def fitting_batch(logits: Logits, images: Tensor, labels: Tensor) -> int:
    """Return the largest batch size that memory allows, since large batches are faster.

    Args:
        logits: maps images to logits.
        images: the first batch of the loader, in the threat model's space.
        labels: its class indices.

    Returns:
        A power of two times the size of the loader's batch, up to 256 on a CPU and 1024 on a GPU. Few sizes are
        possible, so that rounding, which depends on the batch size, seldom depends on the memory that is free now.

    Cost: two forward and backward passes, of one and of two images.
    """
    if len(images) < 2:
        return len(images)
    each = saved_bytes(logits, images[:2], labels[:2]) - saved_bytes(logits, images[:1], labels[:1])
    room = _room(images.device)
    size, most = len(images), _MOST.get(images.device.type, len(images))
    while 2 * size <= most and 2 * size * each <= room:
        size *= 2
    return size


def _room(device: torch.device) -> float:
    """Return the bytes that activations may take; memory that torch holds and does not use now is free too."""
    if device.type != "cuda":
        return _CPU_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + unused)


def saved_bytes(logits: Logits, images: Tensor, labels: Tensor) -> int:
    """Return the bytes that a forward pass saves for the backward pass; tensors with the same storage count once."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ascent(logits, images, labels)
    return sum(seen.values())
