"""Models whose weights are divided over processes: what can be observed, and what is refused before training."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.graph import is_compiled
from lightning_normgeo.normalization.names import bias_of, by_clean_name, clean_name, named_weights
from lightning_normgeo.probes.sharded.shards import ShardedWeight, Shards, is_sharded, local_part
from lightning_normgeo.probes.sharded.unsharded import UnshardedParameters

_REMEDY = "Divide the model by fully_shard alone, over all processes, or use ddp, or remove the callback."


def runs_under(trainer: Any, *names: str) -> str | None:
    """Return which class the strategy of a Trainer is, or is derived from; by name, which serves both namespaces.

    Args:
        trainer: of either namespace.
        names: of the classes that are asked about.
    """
    return next((base.__name__ for base in type(trainer.strategy).__mro__ if base.__name__ in names), None)


class Sharding(NamedTuple):
    """A divided model, as far as what observes it has to know."""

    shards: Shards
    weights: list[ShardedWeight]
    unsharded: UnshardedParameters


_divisions: WeakKeyDictionary[Any, Sharding] = WeakKeyDictionary()


def note_sharding(callback: str, trainer: Any, module: nn.Module) -> None:
    """Find out whether and how a model is divided, when a fit starts, and keep it for all training in it.

    Raises:
        ConfigurationError: for a model that cannot be observed, in the name of ``callback``.
    """
    forget_sharding(trainer)
    shards = find_shards(callback, trainer, module)
    if shards is not None:
        _divisions[trainer] = Sharding(shards, shards.weights(module), stand_ins_of(module, shards))


def sharding_of(trainer: Any) -> Sharding | None:
    """Return what was noted when the fit started; None where the parameters are whole."""
    return _divisions.get(trainer)


def forget_sharding(trainer: Any) -> None:
    """Let go of what was noted."""
    _divisions.pop(trainer, None)


def find_shards(callback: str, trainer: Any, module: nn.Module) -> Shards | None:
    """Return the parameters of a divided model; None for one whose parameters are whole.

    Call it before any forward pass: afterwards a module may still hold what it computed with.

    Args:
        callback: who asks, for messages.
        trainer: about to train.
        module: the model.

    Raises:
        ConfigurationError: unless every weight that is trained is divided along dimension 0, by ``fully_shard``.
    """
    weights: dict[str, Any] = dict(named_weights(module, frozen=True))
    first = next((weight for weight in weights.values() if is_sharded(weight)), None)
    if first is None and (trainer.world_size == 1 or runs_under(trainer, "ModelParallelStrategy") is None):
        return None
    parameters: dict[str, Any] = dict(by_clean_name(module.named_parameters()))
    biases = {name: parameters[name] for name in map(bias_of, weights) if is_sharded(parameters.get(name))}
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad or is_sharded(weight)}
    for name, parameter in (trained | biases).items():
        why = _obstacle(parameter, first, trainer.world_size)
        if why is not None:
            raise ConfigurationError(f"{callback} cannot observe {name}: {why}. {_REMEDY}")
    if first is None:
        return None
    _check_that_fully_shard_divided(callback, [name for name in weights if is_sharded(weights[name])], module)
    along = next(d for d, placement in enumerate(first.placements) if placement.is_shard())
    place = first.device_mesh.get_coordinate()
    return Shards(
        parameters,
        trainer.strategy.root_device,
        processes=trainer.world_size,
        parts=first.device_mesh.size(along),
        rank=place[along],
        counts=not any(index for d, index in enumerate(place) if d != along),
    )


def stand_ins_of(module: nn.Module, shards: Shards) -> UnshardedParameters:
    """Return what notes the names of what forward passes compute with."""
    names = {id(parameter): name for name, parameter in shards.parameters.items()}
    return UnshardedParameters(module, names, fully_sharded_kind() or nn.Module, is_compiled(module))


def fully_sharded_kind() -> type[Any] | None:
    """Return the class of modules that ``fully_shard`` was applied to; None where torch is too old to have it."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return None
    return FSDPModule


def _obstacle(parameter: Any, first: Any, processes: int) -> str | None:
    """Return why a parameter cannot be observed, or None."""
    if not is_sharded(parameter):
        return "when training starts it is not divided, so each process trains a copy of its own"
    placements, mesh = tuple(parameter.placements), parameter.device_mesh
    cuts = [placement for placement in placements if not placement.is_replicate()]
    # by name: the strided kind, of tensor parallelism together with fully_shard, is derived from Shard
    if len(cuts) != 1 or type(cuts[0]).__name__ != "Shard" or cuts[0].dim != 0:
        return f"it is divided as {placements}, and only whole rows, one Shard(dim=0), can be put together"
    if mesh != first.device_mesh or placements != tuple(first.placements):
        return f"it is divided over {mesh}, and others over {first.device_mesh}"
    if mesh.size() != processes:
        return f"it is divided over {mesh.size()} of {processes} processes"
    along = placements.index(cuts[0])
    shards = Shards({}, parameter.device, parts=mesh.size(along), rank=mesh.get_coordinate()[along])
    rows, row_range = local_part(parameter).shape[0], shards.row_range(parameter)
    expected = row_range.stop - row_range.start
    return None if rows == expected else f"this process has {rows} of its rows, where {expected} are expected"


def _check_that_fully_shard_divided(callback: str, divided: list[str], module: nn.Module) -> None:
    """Tensor parallelism divides parameters too, but computes with the parts."""
    kind = fully_sharded_kind()
    if kind is None:
        raise ConfigurationError(f"{callback} cannot observe divided weights: torch is older than 2.6. Use ddp.")
    paths = [clean_name(name) for name, child in module.named_modules() if isinstance(child, kind)]
    for name in divided:
        if not any(not path or name.startswith(f"{path}.") for path in paths):
            raise ConfigurationError(
                f"{callback} cannot observe {name}: it is divided, but not by fully_shard. {_REMEDY}"
            )
