"""Random numbers of foreign code, drawn for each sample of a batch by itself.

Code such as torchattacks draws a tensor for a whole batch, so that a sample's numbers depend on its place in the batch.
Inside :class:`SampleDraws` a draw of one entry per sample is made of the samples' own numbers instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_normgeo.robustness.attacks.random_numbers.counter_random import (
    normals,
    sample_numbers,
    uniforms,
    whole_numbers,
)
from lightning_normgeo.robustness.attacks.random_numbers.sample_randoms import FOREIGN


class BatchDrawError(Exception):
    """Random numbers were drawn for a whole batch: its samples have to be attacked one by one."""


class SampleDraws(TorchFunctionMode):
    """Context in which torch draws the random numbers of each sample by themselves, on the device asked for.

    Covered are ``rand``, ``randn``, ``randint``, their ``_like`` forms and the methods ``uniform_`` and ``normal_``,
    for tensors with one entry per sample in the first dimension. The k-th draw of a sample depends on the seed, the
    sample and k alone, and has a stream of its own.

    Args:
        seed: seed of the evaluation.
        indices: a number for each sample of the batch.

    Raises:
        BatchDrawError: of several samples, for a draw that does not have one entry per sample, or by numpy or Python.
    """

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        super().__init__()
        self._seed, self._indices, self._draws = seed, indices, 0

    def __enter__(self) -> SampleDraws:
        self._before = _states()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        if exception[0] is None and _states() != self._before:
            self._refuse()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or draw for each sample by itself."""
        draw = _DRAWS.get(func)
        if draw is None:
            if func in _OTHERS:
                self._refuse()
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            found = draw(self._drawn, args, dict(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found

    def _drawn(self, shape: Sequence[int], make: _Make, device: torch.device) -> Tensor | None:
        """Return the draws of all samples on a device; None for a shape without one entry per sample."""
        if not shape or shape[0] != len(self._indices):
            self._refuse()
            return None
        samples, stream = sample_numbers(self._indices, device), FOREIGN + self._draws
        self._draws += 1
        return make(self._seed, samples, stream, torch.Size(shape[1:]).numel()).view(*shape)

    def _refuse(self) -> None:
        if len(self._indices) > 1:
            raise BatchDrawError


_Make = Callable[[int, Tensor, int, int], Tensor]
_Drawn = Callable[[Sequence[int], _Make, torch.device], Tensor | None]


def _states() -> tuple[Any, ...]:
    """Return the states of the random generators of numpy and Python, to be compared."""
    known: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return known["state"]["pos"], known["state"]["key"].tobytes(), random.getstate()


def _whole(low: int, high: int) -> _Make:
    return lambda seed, samples, stream, count: whole_numbers(seed, samples, stream, count, low, high)


def _shape(args: Sequence[Any], options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape that a factory function was given, as numbers or as a sequence."""
    given = options.get("size", args)
    if len(given) == 1 and isinstance(given[0], (tuple, list, torch.Size)):
        given = given[0]
    return tuple(int(entry) for entry in given)


def _placed(
    drawn: _Drawn,
    shape: Sequence[int],
    make: _Make,
    options: Mapping[str, Any],
    default: tuple[torch.device, torch.dtype],
) -> Any:
    """Return draws with the device and the type that were asked for, or else the default ones."""
    device, dtype = default
    found = drawn(shape, make, device if options.get("device") is None else torch.device(options["device"]))
    asked = options.get("dtype") or dtype
    return None if found is None else found.to(asked).requires_grad_(bool(options.get("requires_grad", False)))


def _factory(make: _Make) -> Callable[[_Drawn, Sequence[Any], dict[str, Any]], Any]:
    def draw(drawn: _Drawn, args: Sequence[Any], options: dict[str, Any]) -> Any:
        if options.get("generator") is not None:
            return None
        default = torch.get_default_device(), torch.get_default_dtype()
        return _placed(drawn, _shape(args, options), make, options, default)

    return draw


def _like(make: _Make) -> Callable[[_Drawn, Sequence[Any], dict[str, Any]], Any]:
    def draw(drawn: _Drawn, args: Sequence[Any], options: dict[str, Any]) -> Any:
        return _placed(drawn, args[0].shape, make, options, (args[0].device, args[0].dtype))

    return draw


def _randint(drawn: _Drawn, args: Sequence[Any], options: dict[str, Any]) -> Any:
    names = ("high", "size") if len(args) < 3 else ("low", "high", "size")
    given = {**dict(zip(names, args, strict=False)), **options}
    if given.get("generator") is not None:
        return None
    make = _whole(given.get("low", 0), given["high"])
    return _placed(drawn, tuple(given["size"]), make, given, (torch.get_default_device(), torch.int64))


def _randint_like(drawn: _Drawn, args: Sequence[Any], options: dict[str, Any]) -> Any:
    names = ("like", "high") if len(args) < 3 else ("like", "low", "high")
    given = {**dict(zip(names, args, strict=False)), **options}
    make = _whole(given.get("low", 0), given["high"])
    return _placed(drawn, args[0].shape, make, options, (args[0].device, args[0].dtype))


def _in_place(make: _Make, names: tuple[str, str], defaults: tuple[float, float]) -> Callable[..., Any]:
    def draw(drawn: _Drawn, args: Sequence[Any], options: dict[str, Any]) -> Any:
        given = {**dict(zip(names, defaults, strict=True)), **dict(zip(names, args[1:], strict=False)), **options}
        if given.get("generator") is not None:
            return None
        found = drawn(args[0].shape, make, args[0].device)
        if found is None:
            return None
        first, second = given[names[0]], given[names[1]]
        spread = second - first if names[0] == "from" else second
        return args[0].copy_(found * spread + first)

    return draw


_DRAWS: dict[Any, Callable[[_Drawn, Sequence[Any], dict[str, Any]], Any]] = {
    torch.rand: _factory(uniforms),
    torch.randn: _factory(normals),
    torch.rand_like: _like(uniforms),
    torch.randn_like: _like(normals),
    torch.randint: _randint,
    torch.randint_like: _randint_like,
    Tensor.uniform_: _in_place(uniforms, ("from", "to"), (0.0, 1.0)),
    Tensor.normal_: _in_place(normals, ("mean", "std"), (0.0, 1.0)),
}
_OTHERS = {
    *(torch.randperm, torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.dropout),
    *(Tensor.random_, Tensor.bernoulli, Tensor.bernoulli_, Tensor.multinomial, Tensor.exponential_),
    *(Tensor.log_normal_, Tensor.cauchy_, Tensor.geometric_),
}
"""Functions that draw random numbers in another way."""
