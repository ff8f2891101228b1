"""Models whose weights are sharded over processes: checks before training, and the shards that can be observed."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.rows import is_sharded, local_part
from lightning_normgeo.normalization.autograd.compiled_modules import runs_compiled_code
from lightning_normgeo.normalization.names import bias_of, by_clean_name, clean_name, named_weights
from lightning_normgeo.probes.sharded.shards import ShardedWeight, Shards
from lightning_normgeo.probes.sharded.unsharded import UnshardedParameters

_REMEDY = "Shard the model by fully_shard alone, over all processes, or use ddp, or remove the callback."


def runs_under(trainer: Any, *names: str) -> str | None:
    """Return the first of some class names that the Trainer's strategy or one of its bases has; None if there is none.

    Classes are compared by name, which works for ``lightning`` and for ``pytorch_lightning``.

    Args:
        trainer: a Trainer of either package.
        names: the class names to look for.
    """
    return next((base.__name__ for base in type(trainer.strategy).__mro__ if base.__name__ in names), None)


class Sharding(NamedTuple):
    """The shards, weights and unsharded parameters of a sharded model, as monitors need them."""

    shards: Shards
    weights: list[ShardedWeight]
    unsharded: UnshardedParameters


_shardings: WeakKeyDictionary[Any, Sharding] = WeakKeyDictionary()


def note_sharding(callback: str, trainer: Any, module: nn.Module) -> None:
    """Find out at the start of a fit how a model is sharded, and store it for :func:`sharding_of`.

    Args:
        callback: name of the callback, for error messages.
        trainer: the Trainer, before training.
        module: the model.

    Raises:
        ConfigurationError: for a model that cannot be observed.
    """
    forget_sharding(trainer)
    shards = find_shards(callback, trainer, module)
    if shards is not None:
        _shardings[trainer] = Sharding(shards, shards.weights(module), unsharded_of(module, shards))


def sharding_of(trainer: Any) -> Sharding | None:
    """Return the sharding found at the start of the fit; None for a model that is not sharded."""
    return _shardings.get(trainer)


def forget_sharding(trainer: Any) -> None:
    """Forget the sharding of a Trainer's model, which releases the model."""
    _shardings.pop(trainer, None)


def find_shards(callback: str, trainer: Any, module: nn.Module) -> Shards | None:
    """Return the shards of a sharded model; None for a model that is not sharded.

    Call it before any forward pass: after one, a module may still hold unsharded parameters.

    Args:
        callback: name of the callback, for error messages.
        trainer: the Trainer, before training.
        module: the model.

    Raises:
        ConfigurationError: unless every trained weight is sharded along dimension 0, by ``fully_shard``.
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
    _check_that_fully_shard_was_used(callback, [name for name in weights if is_sharded(weights[name])], module)
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


def unsharded_of(module: nn.Module, shards: Shards) -> UnshardedParameters:
    """Return the tracker that names unsharded parameters during a forward pass."""
    names = {id(parameter): name for name, parameter in shards.parameters.items()}
    return UnshardedParameters(module, names, fully_sharded_kind() or nn.Module, runs_compiled_code(module))


def fully_sharded_kind() -> type[Any] | None:
    """Return the class of modules that ``fully_shard`` was applied to; None where torch is too old to have it."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return None
    return FSDPModule


def _obstacle(parameter: Any, first: Any, processes: int) -> str | None:
    """Return the reason why a parameter cannot be observed, or None if it can."""
    if not is_sharded(parameter):
        return "when training starts it is not sharded, so each process trains its own copy"
    placements, mesh = tuple(parameter.placements), parameter.device_mesh
    cuts = [placement for placement in placements if not placement.is_replicate()]
    # by name: the strided shards of tensor parallelism with fully_shard are of a class derived from Shard
    if len(cuts) != 1 or type(cuts[0]).__name__ != "Shard" or cuts[0].dim != 0:
        return f"it is sharded as {placements}, but only shards of whole rows, one Shard(dim=0), can be observed"
    if mesh != first.device_mesh or placements != tuple(first.placements):
        return f"it is sharded over {mesh}, and others over {first.device_mesh}"
    if mesh.size() != processes:
        return f"it is sharded over {mesh.size()} of {processes} processes"
    along = placements.index(cuts[0])
    shards = Shards({}, parameter.device, parts=mesh.size(along), rank=mesh.get_coordinate()[along])
    rows, row_range = local_part(parameter).shape[0], shards.row_range(parameter)
    expected = row_range.stop - row_range.start
    return None if rows == expected else f"this process has {rows} of its rows, where {expected} are expected"


def _check_that_fully_shard_was_used(callback: str, sharded: list[str], module: nn.Module) -> None:
    """Raise an error for weights sharded by tensor parallelism, which computes with the shards themselves."""
    kind = fully_sharded_kind()
    if kind is None:
        raise ConfigurationError(f"{callback} cannot observe sharded weights: torch is older than 2.6. Use ddp.")
    paths = [clean_name(name) for name, child in module.named_modules() if isinstance(child, kind)]
    for name in sharded:
        if not any(not path or name.startswith(f"{path}.") for path in paths):
            raise ConfigurationError(
                f"{callback} cannot observe {name}: it is sharded, but not by fully_shard. {_REMEDY}"
            )
