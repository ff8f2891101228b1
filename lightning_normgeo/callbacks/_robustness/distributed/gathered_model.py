"""A model sharded by FSDP2 with whole weights on every process, so that its passes need no other process."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_normgeo.callbacks._monitors.sharded_models import fully_sharded_kind
from lightning_normgeo.errors import UnsuitableError
from lightning_normgeo.geometry.rows import is_sharded
from lightning_normgeo.normalization.autograd.compiled_modules import is_compiled
from lightning_normgeo.normalization.names import clean_name
from lightning_normgeo.robustness.model.parameter_swap import ParameterSlot, swapped_parameters

_FSDP = "torch.distributed.fsdp"
_TENSOR_PARALLEL = "torch.distributed.tensor"
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Attributes of a module with hooks of FSDP. Those of state dictionaries put shards back into the model."""
_REMEDY = "Save a checkpoint and test it on one device or with ddp."


class GatheredModel:
    """Whole weights of a sharded model, and a context in which the model computes with them.

    In every pass of a model sharded by ``fully_shard`` each layer gathers its weights from all processes. Attacks make
    a different number of passes on each process, which would wait for each other forever. Here the weights are gathered
    once. Inside :meth:`active` the model is the one that was sharded, on each process by itself: with plain parameters
    in the precision in which they are stored, the classes of its modules before sharding, and without the hooks of
    FSDP, whose own state is not touched. Compiled models run uncompiled inside, since compiled code may hold the hooks.

    It is made in two steps, between which the processes agree whether all of them can go on: a process that fails
    between two collectives leaves the others waiting.

    Args:
        module: the model.
        device: device of the passes.

    Raises:
        UnsuitableError: for tensor parallelism, where each pass is computed by several processes together, and if
            memory does not suffice for the weights of the whole model.

    Cost: memory for the weights of the whole model on each process, besides the shards.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._kind: Any = fully_sharded_kind() or ()
        for child in self._sharded_modules():
            child.reshard()  # puts shards in place of unsharded weights, on every process
        _check_alone(module, self._sharded_modules())
        self._slots: list[tuple[nn.Module, str, Any]] = [
            (child, name, value)
            for child in module.modules()
            for name, value in child._parameters.items()
            if is_sharded(value)
        ]
        self._whole = _room({id(value): value for _, _, value in self._slots}, device)

    @torch.no_grad()
    def gather(self) -> None:
        """Gather the weights; every process has to call this."""
        with torch.inference_mode(False):
            for value in {id(value): value for _, _, value in self._slots}.values():
                part: Any = value.detach()
                whole = self._whole[id(value)]
                # shards that are offloaded to the host are gathered on the device, where the processes communicate
                whole.data.copy_(part.to(part.device_mesh.device_type).full_tensor())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the model computes with whole weights and without other processes.

        It leaves alone whether FSDP holds unsharded weights at the moment, as it does of the outermost module between
        two passes: the other processes, which count on it in the next pass, may not enter this context.
        """
        with ExitStack() as stack:
            if self._slots and is_compiled(self._module):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(swapped_parameters(self._places()))
            for child in self._sharded_modules():
                stack.callback(setattr, child, "__class__", type(child))
                child.__class__ = _class_before(type(child), self._kind)
            yield

    def _places(self) -> list[ParameterSlot]:
        places: list[ParameterSlot] = [
            (child._parameters, name, self._whole[id(value)]) for child, name, value in self._slots
        ]
        places += places_without_hooks(self._module)
        for child in self._sharded_modules():
            for name, method in vars(child).items():
                if inspect.ismethod(method) and _is_wrapped(method):  # by register_fsdp_forward_method
                    genuine = getattr(_class_before(type(child), self._kind), name)
                    places.append((vars(child), name, types.MethodType(genuine, child)))
        return places

    def _sharded_modules(self) -> list[Any]:
        return [child for child in self._module.modules() if isinstance(child, self._kind)]


def places_without_hooks(module: nn.Module) -> list[ParameterSlot]:
    """Return the tables of hooks of a model's modules without those of FSDP."""
    places: list[ParameterSlot] = []
    for child in module.modules():
        for hooks in _HOOKS:
            present = getattr(child, hooks)
            kept = type(present)((key, hook) for key, hook in present.items() if not _is_of(_FSDP, hook))
            if len(kept) < len(present):
                places.append((vars(child), hooks, kept))
    return places


def _check_alone(module: nn.Module, sharded_modules: list[Any]) -> None:
    """Check that a model is sharded by ``fully_shard`` alone.

    Raises:
        UnsuitableError: for tensor parallelism.
    """
    managed = {id(value) for child in sharded_modules for value in child.parameters()}
    parameters: dict[str, Any] = dict(module.named_parameters())
    for name, value in parameters.items():
        if not is_sharded(value):
            continue
        cuts = [type(placement).__name__ for placement in value.placements if not placement.is_replicate()]
        if id(value) not in managed or len(cuts) > 1 or "_StridedShard" in cuts:
            raise tensor_parallel(clean_name(name))
    for name, child in module.named_modules():
        if any(
            _is_of(_TENSOR_PARALLEL, hook)
            for hook in (*child._forward_pre_hooks.values(), *child._forward_hooks.values())
        ):
            raise tensor_parallel(clean_name(name))


def tensor_parallel(name: str) -> UnsuitableError:
    """Return the error for a weight that is divided by tensor parallelism."""
    return UnsuitableError(
        f"{name} is divided by tensor parallelism, where several processes compute each pass together, and each may "
        f"need another number of passes. {_REMEDY}"
    )


def _room(shards: dict[int, Any], device: torch.device) -> dict[int, nn.Parameter]:
    """Return whole parameters without content for sharded ones, by the id of the latter.

    Raises:
        UnsuitableError: if memory does not suffice for them, and for gathering the largest one.
    """
    try:
        with torch.inference_mode(False):
            found = {
                key: nn.Parameter(torch.empty(shard.shape, dtype=shard.dtype, device=device), shard.requires_grad)
                for key, shard in shards.items()
            }
            largest = max((value.nbytes for value in found.values()), default=0)
            torch.empty(3 * largest, dtype=torch.uint8, device=device)  # the parts of all processes, joined and padded
    except RuntimeError as error:
        size = sum(shard.numel() * shard.element_size() for shard in shards.values())
        raise shortage(size) from error
    return found


def shortage(size: int) -> UnsuitableError:
    """Return the error for weights of a number of bytes that memory does not suffice for."""
    return UnsuitableError(
        f"Each process needs the weights of the whole model, {size / 2**30:.1f} GiB, and there is no memory left for "
        f"them. {_REMEDY}"
    )


def _class_before(kind: type, sharded_kind: Any) -> type:
    """Return the class that a module had before ``fully_shard``."""
    return next(base for base in kind.__mro__ if not issubclass(base, sharded_kind))


def _is_of(package: str, hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(package)


def _is_wrapped(method: types.MethodType) -> bool:
    """Whether a method is one that FSDP put around a module's own, whose name and module it took over."""
    code = getattr(method.__func__, "__code__", None)
    return code is not None and "_fully_shard" in code.co_filename
