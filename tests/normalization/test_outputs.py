"""Models that return records: their tensors are found whatever holds them."""

from __future__ import annotations

import argparse
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo import channel_table, effective_weights, scale_invariant_units, scale_symmetries, swap_norm
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.outputs import tensors_in
from support.small_models import conv_bn, x2d


@dataclass
class Output:
    logits: Any
    loss: Any = None
    more: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    logits: Any


@attrs.define
class Attributes:
    logits: Any


class Pair(NamedTuple):
    logits: Any
    name: str = "pair"


class ModelOutput(OrderedDict[str, Any]):
    """A dictionary of a class of its own, as the outputs of Hugging Face models."""


class Sequence(list[Any]):
    """A list of a class of its own."""


class Own:
    def __init__(self, logits: Any) -> None:
        self.logits = logits


class Cache:
    def __init__(self, keys: Any) -> None:
        self.keys = keys


RECORDS: dict[str, Callable[[Any], Any]] = {
    "dataclass": Output,
    "slots": Slotted,
    "attrs": Attributes,
    "namespace": lambda found: SimpleNamespace(logits=found),
    "argparse": lambda found: argparse.Namespace(logits=found),
    "dict": lambda found: {"logits": found},
    "dict subclass": lambda found: ModelOutput(logits=found),
    "mapping": lambda found: UserDict(logits=found),
    "named tuple": Pair,
    "list subclass": lambda found: Sequence([found]),
    "own class": Own,
    "nested": lambda found: Output([SimpleNamespace(deep={"deeper": Slotted(found)})], loss=3.0),
}
record = pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)


class Returns(nn.Module):
    """A network that returns its result in a record."""

    def __init__(self, record: Callable[[Any], Any]) -> None:
        super().__init__()
        self.network, self._record = nn.Sequential(conv_bn(), nn.ReLU(), nn.Conv2d(6, 3, 1)), record

    def forward(self, x: Tensor) -> Any:
        return self._record(self.network(x))


@record
def test_tensors_are_found_in_any_record(record: Callable[[Any], Any]) -> None:
    tensor = torch.ones(2)
    assert tensors_in(record(tensor))[0] is tensor


def test_tensors_are_found_in_their_order_and_once() -> None:
    tensors = [torch.ones(1) for _ in range(6)]
    circle = SimpleNamespace(first=tensors[1])
    circle.itself = circle
    output = Output(tensors[0], circle, [deque([tensors[2]]), {"b": tensors[3], "a": Pair(tensors[4])}, tensors[5]])
    assert [id(tensor) for tensor in tensors_in(output)] == [id(tensor) for tensor in tensors]


def test_objects_inside_an_output_are_no_results() -> None:
    """A cache of keys and values, which language models return beside their logits, is nothing that a loss reads."""
    tensor = torch.ones(1)
    assert tensors_in(Output(tensor, Cache(torch.ones(1)))) == [tensor]
    assert tensors_in(nn.Linear(2, 2)) == tensors_in(Output) == tensors_in("text") == tensors_in(None) == []


@record
def test_measurements_are_those_of_the_model_that_returns_tensors(record: Callable[[Any], Any]) -> None:
    x, plain, other = x2d(4, size=8), Returns(lambda found: found), Returns(record)
    other.load_state_dict(plain.state_dict())
    models = plain, other
    found: Any = [scale_invariant_units(one, x) for one in models]
    assert str(found[0]) == str(found[1])
    found = [scale_symmetries(one, x) for one in models]
    assert str(found[0]) == str(found[1])
    found = [effective_weights(one, x).as_dict() for one in models]
    assert found[0] == found[1]
    found = [channel_table(one, x, logits=one) for one in models]
    assert torch.equal(found[0].joined("product"), found[1].joined("product"))
    assert torch.equal(found[0].joined("share"), found[1].joined("share"))
    found = [str(swap_norm(one, "none", example_batch=x)) for one in models]
    assert found[0] == found[1]


def test_an_output_without_tensors_is_named_as_such() -> None:
    message = r"Returns returned SimpleNamespace, in which no tensor is found\. Return tensors, alone or in a tuple"
    with pytest.raises(ConfigurationError, match=message):
        scale_invariant_units(Returns(lambda found: SimpleNamespace(logits=3)), x2d(2, size=8))


def test_a_model_that_is_called_by_a_function_keeps_its_name() -> None:
    model = Returns(lambda found: Output(found.detach()))
    table = channel_table(model, x2d(2, size=8), logits=model)
    assert all(layer.reason.startswith("Returns returned shape (2, 3, ") for layer in table.layers.values())
