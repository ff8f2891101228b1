"""Emulated accelerator without float64, like Apple's GPUs: a device of PyTorch whose tensors are computed on the CPU.

Its tensors are told from those of the CPU by their device, as real ones are: an operation that mixes both fails, except
with scalars of the CPU. An operation that reads or makes float64 on the device raises a TypeError, and those that Metal
lacks a NotImplementedError. Everything else, also autograd, works as on any device.

Registering the device cannot be undone, so that it belongs into a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "coarse"
DEVICE_STRING = f"{NAME}:0"
MISSING = {"aten::segment_reduce", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::geqrf", "aten::poisson"}
"""Operations that the device does not have, as Metal did not in some or all releases of PyTorch."""
_TO_ANOTHER_DEVICE = {"aten::_to_copy", "aten::copy_"}


class CoarseTensor(Tensor):
    """A tensor on the emulated device, which holds one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CoarseTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(DEVICE_STRING),
        )
        made.held = held
        return made

    def __repr__(self, *args: Any) -> str:
        return f"CoarseTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class FromValues(TorchFunctionMode):
    """Context in which ``torch.tensor`` makes tensors on the CPU and copies them, as it does below Python's modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        if func is Tensor.tolist and isinstance(args[0], CoarseTensor):  # torch refuses it for all subclasses
            return args[0].held.tolist()
        return func(*args, **kwargs)


class CoarseMode(TorchDispatchMode):
    """Context in which tensors can be made on the emulated device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        there = device is not None and torch.device(device).type == NAME
        if there or any(isinstance(leaf, CoarseTensor) for leaf in tree_leaves((args, kwargs))):
            return _computed(func, args, kwargs)
        return func(*args, **kwargs)


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation on the CPU, and return its results as tensors of the device."""
    name = func._schema.name
    if name in MISSING:
        raise NotImplementedError(f"{name} is not implemented for this device")
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name not in _TO_ANOTHER_DEVICE:
        _check_devices(name, leaves)
    goes = kwargs.get("device")
    result = func(*tree_map(_held, args), **tree_map(_held, {**kwargs, **({"device": "cpu"} if goes else {})}))
    leaves_device = goes is not None and torch.device(goes).type != NAME
    if leaves_device and kwargs.get("dtype") == torch.float64:
        raise TypeError("the cast to float64 would be on the device: copy first, then cast")
    if name == "aten::copy_":
        return args[0]
    if leaves_device or name == "aten::_local_scalar_dense":
        return result
    return _returned(func, args, result)


def _returned(func: Any, args: Any, result: Any) -> Any:
    """Return results as tensors of the device; those of operations in place are the arguments themselves."""
    own = {id(leaf.held): leaf for leaf in tree_leaves(args) if isinstance(leaf, CoarseTensor)}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in own:
            return own[id(leaf)]
        if leaf.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{func._schema.name}: the device has no float64")
        return CoarseTensor(leaf)

    return tree_map(wrapped, result)


def _check_devices(name: str, leaves: list[Tensor]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, CoarseTensor) and leaf.ndim and leaf.device.type != "meta":
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {NAME} and {leaf.device}")


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, CoarseTensor) else leaf


class CoarseAccelerator(Accelerator):
    """The emulated device for a Trainer."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(DEVICE_STRING)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


@contextmanager
def device() -> Iterator[torch.device]:
    """Context in which tensors can be made on the device and copied to it."""
    with CoarseMode(), FromValues():
        yield torch.device(DEVICE_STRING)


def register() -> None:
    """Register the device in this process, for good, and tell the package that it has no float64."""
    from lightning_normgeo.geometry import rows

    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    rows._WITHOUT_FLOAT64.add(NAME)


def strategy(io: CheckpointIO | None = None) -> SingleDeviceStrategy:
    """Return a strategy for training on the device."""
    return SingleDeviceStrategy(torch.device(DEVICE_STRING), accelerator=CoarseAccelerator(), checkpoint_io=io)
