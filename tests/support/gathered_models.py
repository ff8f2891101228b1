"""Models sharded by fully_shard in every way, for tests of their whole weights; needs two processes, and no Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normgeo.callbacks._robustness.distributed.gathered_model import GatheredModel
from support.fsdp_models import Attention, Zoo, group_norms
from support.fsdp_scenarios import Collectives
from support.projects import same

Report = dict[str, Any]
CPU = torch.device("cpu")


class Tied(nn.Module):
    """Network with one weight in two layers, a frozen layer, and a method that is called in place of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 6), nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.frozen = nn.Linear(6, 4).requires_grad_(False)

    def classify(self, x: Tensor) -> Tensor:
        return self.frozen(self.third(self.second(self.first(x.flatten(1)).relu()).relu()))

    forward = classify


def _parts(net: nn.Module, *parts: Any, **settings: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for part in parts:
        fully_shard([net.get_submodule(name) for name in part] if isinstance(part, list) else part, **settings)
    return fully_shard(net, **settings)


def _zoo(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda net: _parts(net, net.group, net.up, net.lengths, ["one_row", "norm"], **settings)


def _with_method(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(_parts(net), "classify")
    return net


def _compiled(net: Any) -> nn.Module:
    net.group.compile(backend="eager")
    return _zoo()(net)


def _compiled_outside(net: nn.Module) -> Any:
    return torch.compile(_zoo()(net), backend="eager")


def _in_half(net: Any) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return _parts(net, net[0], mp_policy=MixedPrecisionPolicy(torch.bfloat16))


def _meshed(shape: tuple[int, int]) -> Callable[[nn.Module], nn.Module]:
    return _zoo(mesh=torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=("copy", "part")))


def ways() -> dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]]:
    """Return networks, and functions that shard them."""
    return {
        "parts": (Zoo, _zoo()),
        "never reshards": (Zoo, _zoo(reshard_after_forward=False)),
        "two copies": (Zoo, _meshed((2, 1))),
        "mesh of two dimensions": (Zoo, _meshed((1, 2))),
        "mixed precision": (group_norms, _in_half),
        "tied": (Tied, _parts),
        "method": (Tied, _with_method),
        "attention": (Attention, lambda net: _parts(net, net.heads)),
        "compiled in part": (Zoo, _compiled),
        "compiled": (Zoo, _compiled_outside),
    }


def _trained(net: nn.Module, optimizer: Any, call: Callable[[Tensor], Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(4)
    nn.functional.cross_entropy(call(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def _state(net: nn.Module, optimizer: Any) -> Any:
    """Return all that sharding put into a model: shards, their objects, hooks, classes, attributes; and momenta."""
    local = [(name, value.to_local().detach().clone()) for name, value in net.named_parameters()]
    hooks = [
        [hook.__qualname__ for hook in (*child._forward_pre_hooks.values(), *child._forward_hooks.values())]
        for child in net.modules()
    ]
    modules = [(type(child).__name__, child.training) for child in net.modules()]
    momenta = [state["momentum_buffer"].to_local().clone() for state in optimizer.state.values()]
    attributes = [sorted(vars(child)) for child in net.modules()]
    return [local, modules, hooks, momenta, attributes]


def gathered_while_training(make: Callable[[], nn.Module], shard: Callable[[Any], nn.Module]) -> Report:
    """Train four steps with and without whole weights in between, and compare with the network before sharding."""
    states, report = [], {}
    for observed in (False, True):
        torch.manual_seed(0)
        whole = make().double()
        net = shard(copy.deepcopy(whole))
        call = net.classify if hasattr(net, "classify") and "classify" in vars(net) else net
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        _trained(net, optimizer, call, 0)
        with torch.no_grad():
            call(torch.ones(2, 3, 8, 8, dtype=torch.float64))  # leaves unsharded weights behind, as a validation does
        if observed:
            report = _used(net, whole)
        for step in (1, 2):
            _trained(net, optimizer, call, step)
        states.append(_state(net, optimizer))
    return {"unchanged": same(*states), **report}


def _used(net: Any, before: nn.Module) -> Report:
    """Return how whole weights compare with the sharded ones, and what passes with them take."""
    net.eval()  # spectral normalization changes its buffers in every pass of the training mode
    model = GatheredModel(net, CPU)
    objects = [id(value) for value in net.parameters()]
    expected = {name.removeprefix("_orig_mod."): value.full_tensor() for name, value in net.named_parameters()}
    model.gather()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    collectives = Collectives()
    with collectives:
        for _ in range(1 + torch.distributed.get_rank()):  # an uneven number of passes
            with model.active():
                found = {name.removeprefix("_orig_mod."): value for name, value in net.named_parameters()}
                logits = [net(images), getattr(net, "classify", net)(images)]
                logits[0].sum().backward()
        with pytest.raises(RuntimeError), model.active():
            net(images[:, :1])  # a pass that fails halfway
    plain = copy.deepcopy(before).eval()
    plain.load_state_dict({**plain.state_dict(), **expected, **dict(getattr(net, "_orig_mod", net).named_buffers())})
    for value in model._whole.values():
        value.grad = None
    with model.active():
        kinds = [type(child).__name__ for child in getattr(net, "_orig_mod", net).modules()]
    net.train()
    return {
        "weights": same({**found}, expected),
        "requires_grad": {name: value.requires_grad for name, value in found.items()}
        == {name: value.requires_grad for name, value in before.named_parameters()},
        "logits": [torch.allclose(one, plain(images), rtol=1e-12, atol=1e-14) for one in logits],
        "collectives": collectives.count,
        "kinds": kinds == [type(child).__name__ for child in before.modules()],
        "objects": objects == [id(value) for value in net.parameters()],
    }


def every_way(compiled: bool = False) -> Report:
    """Return what each way finds: compiled networks take long, and are left out or alone."""
    chosen = {name: way for name, way in ways().items() if name.startswith("compiled") == compiled}
    return {name: gathered_while_training(*way) for name, way in chosen.items()}
