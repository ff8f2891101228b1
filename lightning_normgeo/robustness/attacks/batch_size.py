"""How many samples go through the model at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.robustness.attacks.projected_gradient import Logits, ascent

_CPU_BYTES = 2**30
"""What activations may take on a CPU: more are fresh pages with every pass, and no faster."""
_GPU_SHARE = 0.25
"""Of the free memory of a GPU: what a library takes for itself needs room as well."""
_MOST = {"cpu": 256, "cuda": 1024}


def fitting_batch(logits: Logits, images: Tensor, labels: Tensor) -> int:
    """Return how many samples a pass takes best: large batches are faster, as long as memory has room for them.

    Args:
        logits: the model.
        images: the first batch of the loader; no answer is smaller, except where there is only one image to look at.
        labels: likewise.

    Returns:
        A power of two times what the loader gives, so that rounding does not depend on how much memory is free now.

    Cost: two passes of one and two images.
    """
    if len(images) < 2:
        return len(images)
    each = saved_bytes(logits, images[:2], labels[:2]) - saved_bytes(logits, images[:1], labels[:1])
    device = images.device
    room = _GPU_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _CPU_BYTES
    size, most = len(images), _MOST.get(device.type, len(images))
    while 2 * size <= most and 2 * size * each <= room:
        size *= 2
    return size


def saved_bytes(logits: Logits, images: Tensor, labels: Tensor) -> int:
    """Return the memory that a forward pass keeps for the way back, each tensor once."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ascent(logits, images, labels)
    return sum(seen.values())
