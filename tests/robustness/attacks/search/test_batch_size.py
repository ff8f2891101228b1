"""The batch size of attacks: as many samples at a time as memory allows."""

import pytest
import torch
from torch import nn

from lightning_normgeo.robustness.attacks.search import batch_size
from lightning_normgeo.robustness.attacks.search.batch_size import fitting_batch, saved_bytes


def dense(width=1000):
    """Return a model whose backward pass saves its input, (1 - tanh²), and ten log-probabilities for the loss."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 10)).requires_grad_(False)


def data(count):
    return torch.rand(count, 3, 2, 2), torch.zeros(count, dtype=torch.long)


def test_each_tensor_is_counted_once_and_grows_with_the_batch():
    one, two, three = (saved_bytes(dense(), *data(count)) for count in (1, 2, 3))
    assert two - one == three - two
    assert 4 * 1000 <= two - one <= 4 * 1000 + 4 * 12 + 2 * 4 * 10 + 16, "tanh, and what is small beside it"


@pytest.mark.parametrize(("room", "size"), [(0, 8), (4200 * 15, 8), (4200 * 16, 16), (4200 * 100, 64), (2**40, 256)])
def test_batches_are_doubled_while_there_is_room(monkeypatch, room, size):
    monkeypatch.setattr(batch_size, "_CPU_BYTES", room)
    assert fitting_batch(dense(), *data(8)) == size


def test_no_answer_is_smaller_than_what_the_loader_gives(monkeypatch):
    monkeypatch.setattr(batch_size, "_CPU_BYTES", 0)
    assert fitting_batch(dense(), *data(300)) == 300
    assert fitting_batch(dense(), *data(1)) == 1


def test_memory_that_torch_holds_without_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a training torch holds nearly all of a GPU, which the driver does not count as free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    assert batch_size._room(torch.device("cuda", 0)) == batch_size._GPU_SHARE * 8_000
