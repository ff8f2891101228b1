"""A model wrapped by FullyShardedDataParallel with whole weights on every process, so that its passes need no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_normgeo.callbacks._robustness.distributed.gathered_model import (
    places_without_hooks,
    shortage,
    tensor_parallel,
)
from lightning_normgeo.geometry.rows import is_sharded
from lightning_normgeo.normalization.autograd.compiled_modules import is_compiled
from lightning_normgeo.robustness.model.parameter_swap import ParameterSlot, swapped_parameters


class GatheredFlatModel:
    """Whole weights of a model under ``FSDPStrategy``, and a context in which the model computes with them.

    ``FullyShardedDataParallel`` joins the weights of each wrapped module into one flat parameter, of which a process
    holds a part. Here the weights are gathered once, one wrapped module after the other. Inside :meth:`active` the
    model is the one that was wrapped: its modules have their own parameters, in the precision in which they are stored,
    and call each other directly. See ``GatheredModel``, which does the same for ``fully_shard``, for the rest.

    Args:
        module: the LightningModule.
        wrapped: the module of the strategy, which is, contains or is contained in the wrapped modules.
        device: device of the passes.

    Raises:
        UnsuitableError: if memory does not suffice for the weights of the whole model.

    Cost: memory for the weights of the whole model on each process, besides the shards.
    """

    def __init__(self, module: nn.Module, wrapped: nn.Module, device: torch.device) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        self._kind: type[Any] = FullyShardedDataParallel
        self._module, self._device = module, device
        # the outermost first: the first one that is used becomes the root of all others inside it
        self._wrappers: list[Any] = [child for child in wrapped.modules() if isinstance(child, self._kind)]
        self._tables: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
        _check_room(self._wrappers, device)

    @torch.no_grad()
    def gather(self) -> None:
        """Gather the weights; every process has to call this.

        Raises:
            UnsuitableError: for tensor parallelism.
        """
        failed: Exception | None = None
        with torch.inference_mode(False):
            for wrapper in self._wrappers:
                with self._kind.summon_full_params(wrapper, recurse=False, writeback=False):
                    try:
                        self._keep(wrapper)
                    except Exception as error:  # the other processes wait for this one in the next wrapped module
                        failed = failed or error
        if failed is not None:
            raise failed

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the model computes with whole weights and without other processes."""
        with ExitStack() as stack:
            if self._wrappers and is_compiled(self._module):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for child, table in self._tables.items():
                # FSDP leaves views of its flat parameter as attributes, which would hide the parameters
                for name in table.keys() & vars(child).keys():
                    stack.callback(vars(child).__setitem__, name, vars(child).pop(name))
            stack.enter_context(swapped_parameters(self._places()))
            yield

    def _keep(self, wrapper: Any) -> None:
        """Copy the weights of one wrapped module, which are whole at the moment."""
        copies: dict[int, nn.Parameter] = {}
        for child in self._own_modules(wrapper):
            parameters: dict[str, Any] = child._parameters
            for name, value in parameters.items():
                if is_sharded(value):
                    raise tensor_parallel(name)
                if value is not None and id(value) not in copies:
                    whole = value.detach().to(self._device, copy=True)
                    copies[id(value)] = nn.Parameter(whole, value.requires_grad)
            self._tables[child] = {
                name: None if value is None else copies[id(value)] for name, value in parameters.items()
            }

    def _own_modules(self, wrapper: Any) -> list[nn.Module]:
        """Return the modules inside a wrapped module that are in no other one inside it."""
        inner = [child for child in wrapper.modules() if isinstance(child, self._kind) and child is not wrapper]
        others = {module for child in inner for module in child.modules()}
        return [child for child in wrapper.modules() if child is not wrapper and child not in others]

    def _places(self) -> list[ParameterSlot]:
        places: list[ParameterSlot] = places_without_hooks(self._module)
        places += [(vars(child), "_parameters", table) for child, table in self._tables.items()]
        for wrapper in self._wrappers:
            # also for those that the project keeps in a place of its own, where they cannot be replaced
            places.append((vars(wrapper), "forward", wrapper._fsdp_wrapped_module))
        for child in self._module.modules():
            for name, inner in child._modules.items():
                if isinstance(inner, self._kind):
                    places.append((child._modules, name, inner._fsdp_wrapped_module))
        return places + self._buffers()

    def _buffers(self) -> list[ParameterSlot]:
        """Return the buffers that FSDP keeps in lower precision, in that of the weights."""
        weights = [value for table in self._tables.values() for value in table.values() if value is not None]
        if not weights:
            return []
        low = {wrapper.mixed_precision.buffer_dtype for wrapper in self._wrappers} - {None, weights[0].dtype}
        return [
            (child._buffers, name, value.to(weights[0].dtype))
            for child in self._tables
            for name, value in child._buffers.items()
            if value is not None and value.dtype in low
        ]


def _check_room(wrappers: list[Any], device: torch.device) -> None:
    """Check that memory suffices for whole weights, and for gathering those of the largest wrapped module.

    Raises:
        UnsuitableError: if it does not.
    """
    flat = [wrapper._handle.flat_param for wrapper in wrappers if wrapper._handle is not None]
    sizes = [part._unpadded_unsharded_size.numel() * part.element_size() for part in flat]
    try:
        torch.empty(sum(sizes) + 2 * max(sizes, default=0), dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise shortage(sum(sizes)) from error
