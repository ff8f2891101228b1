"""Models wrapped by FullyShardedDataParallel in every way, for tests of their whole weights; needs two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import FSDPPrecision
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_normgeo.callbacks._robustness.distributed.gathered_flat_model import GatheredFlatModel
from support.fsdp_models import Zoo
from support.fsdp_scenarios import Collectives
from support.gathered_models import CPU, Tied
from support.projects import same

Report = dict[str, Any]


class FlatOnCpu(FSDPStrategy):
    """Lightning's FSDPStrategy on CPUs: its own check is for the exact class, and it names no device of FSDP's."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if not any(isinstance(child, FullyShardedDataParallel) for child in model.modules()):
            model = FullyShardedDataParallel(model, device_id=CPU, **self.kwargs)
            self.kwargs.pop("auto_wrap_policy", None)  # Lightning warns of one for a model that is wrapped
        return super()._setup_model(model)


class AnyPrecision(FSDPPrecision):
    """Leaves images and weights in float64, which Lightning's own converts to float32."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


class Normalized(nn.Sequential):
    """A network with batch normalizations, which FSDP's mixed precision wraps by themselves."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)]
        super().__init__(*layers)


class Kept(nn.Module):
    """A network that keeps a layer in a list of its own, besides the place where FSDP wraps it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 6), nn.Linear(6, 4)
        self.kept: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return (self.kept[0] if self.kept else self.second)(self.first(x.flatten(1)).relu())


def in_layers(net: nn.Module) -> nn.Module:
    """Return a network with each convolution wrapped, and the rest together."""
    return _wrapped(nn.Conv2d)(net)


def _wrapped(*kinds: type[nn.Module], **settings: Any) -> Callable[[nn.Module], nn.Module]:
    policy = ModuleWrapPolicy(set(kinds)) if kinds else None
    given = {"use_orig_params": True, "device_id": CPU, "auto_wrap_policy": policy, **settings}
    return lambda net: FullyShardedDataParallel(net, **given)


def _without_parameters(net: Any) -> nn.Module:
    """Wrap a network and its frozen layer, whose parameters are none while they are sharded."""
    net.frozen = _wrapped(use_orig_params=False)(net.frozen)
    return _wrapped(use_orig_params=False)(net)


def _in_parts(net: Any) -> nn.Module:
    """Wrap two layers and nothing around them, and store one of the wrapped ones in a list too."""
    net.second = _wrapped()(net.second)
    net.first = _wrapped(use_orig_params=False)(net.first)
    net.kept.append(net.second)
    return net  # type: ignore[no-any-return]


def _in_half(dtype: torch.dtype = torch.bfloat16) -> Callable[[nn.Module], nn.Module]:
    return _wrapped(nn.Conv2d, nn.Linear, mixed_precision=MixedPrecision(dtype, buffer_dtype=dtype))


def flat_ways() -> dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]]:
    """Return networks, and functions that wrap them."""
    return {
        "layers": (Zoo, _wrapped(nn.Conv2d, nn.Linear)),
        "one flat parameter": (Zoo, _wrapped()),
        "without original parameters": (Tied, _without_parameters),
        "only gradients": (Zoo, _wrapped(nn.Conv2d, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)),
        "not sharded": (Zoo, _wrapped(nn.Conv2d, sharding_strategy=ShardingStrategy.NO_SHARD)),
        "mixed precision": (Normalized, _in_half()),
        "parts": (Kept, _in_parts),
    }


def _trained(net: nn.Module, optimizer: Any, step: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    nn.functional.cross_entropy(net(x).to(dtype), torch.arange(4)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _state(net: nn.Module, optimizer: Any) -> Any:
    """Return all that wrapping put into a model: parts, hooks, classes; buffers and momenta."""
    tables = [(name, value.detach().clone()) for name, value in net.named_parameters()]
    buffers = [(name, value.clone()) for name, value in net.named_buffers()]
    modules = [(type(child).__name__, child.training, "forward" in vars(child)) for child in net.modules()]
    hooks = [len(child._forward_pre_hooks) + len(child._forward_hooks) for child in net.modules()]
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    return [tables, buffers, modules, hooks, momenta]


def gathered_while_training(make: Callable[[], nn.Module], wrap: Callable[[Any], nn.Module]) -> Report:
    """Train with and without whole weights in between, and compare with the network before it was wrapped."""
    states, report = [], {}
    for observed in (False, True):
        torch.manual_seed(0)
        plain = make()
        plain = plain if isinstance(plain, Normalized) else plain.double()
        dtype = next(plain.parameters()).dtype
        net = wrap(copy.deepcopy(plain))
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        _trained(net, optimizer, 0, dtype)
        with torch.no_grad():
            net(torch.ones(2, 3, 8, 8, dtype=dtype))  # leaves unsharded weights behind, as a validation does
        if observed:
            report = _used(net, plain, dtype)
        for step in (1, 2):
            _trained(net, optimizer, step, dtype)
        states.append(_state(net, optimizer))
    return {"unchanged": same(*states), **report}


def _used(net: nn.Module, plain: nn.Module, dtype: torch.dtype) -> Report:
    """Return how whole weights compare with the wrapped ones, and what passes with them take."""
    modes = [child.training for child in net.modules()]
    net.eval()  # spectral normalization changes its buffers in every pass of the training mode
    inner = getattr(net, "_fsdp_wrapped_module", net)  # a strategy wraps the LightningModule that callbacks know
    model = GatheredFlatModel(inner, net, CPU)
    model.gather()
    with FullyShardedDataParallel.summon_full_params(net, writeback=False):
        expected = {_name(name): value.detach().clone() for name, value in net.named_parameters()}
    images = torch.rand(2, 3, 8, 8, dtype=dtype, requires_grad=True)
    collectives = Collectives()
    with collectives:
        for _ in range(1 + torch.distributed.get_rank()):  # an uneven number of passes
            with model.active():
                found = dict(inner.named_parameters())
                kinds = [type(child).__name__ for child in inner.modules()]
                buffers = {name: value.to(dtype) for name, value in inner.named_buffers()}
                logits = inner(images)
                logits.sum().backward()
        with pytest.raises(RuntimeError), model.active():
            inner(images[:, :1])  # a pass that fails halfway
    plain = copy.deepcopy(plain).eval()
    plain.load_state_dict({**plain.state_dict(), **expected, **buffers})
    for child, mode in zip(net.modules(), modes, strict=True):
        child.training = mode
    return {
        "weights": same(dict(sorted(found.items())), dict(sorted(expected.items()))),
        "requires_grad": {name: value.requires_grad for name, value in found.items()}
        == {name: value.requires_grad for name, value in plain.named_parameters()},
        "logits": torch.allclose(logits, plain(images), rtol=1e-12 if dtype == torch.float64 else 1e-5),
        "collectives": collectives.count,
        "kinds": kinds == [type(child).__name__ for child in plain.modules()],
    }


def _name(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def every_flat_way() -> Report:
    """Return what each way finds."""
    return {name: gathered_while_training(*way) for name, way in flat_ways().items()}
