"""Zero constants of a forward pass, whose values the autograd graph does not record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _pytree as pytree

from lightning_normgeo.geometry.rows import is_captured
from lightning_normgeo.normalization.autograd.constants import Constants
from lightning_normgeo.normalization.autograd.nodes import is_leaf


class ZeroConstants(TorchFunctionMode):
    """Mode that records the nodes of operations whose constants are all zero, such as a tensor that is scattered into.

    The nodes are described in :class:`.Constants`, whose records keep the graph alive.

    Args:
        reads: whether to read tensors. Otherwise only constants that are numbers are known.

    Attributes:
        nodes: nodes of operations whose constants are all zero.
        shifting: nodes of operations that let shifts through.
        added: nodes of sums with a constant, and the shape of the constant.
        epsilons: nodes of sums with a tiny constant.
        inspected: nodes of which everything is known.

    Cost: a Python call for each operation; with ``reads`` also a reduction for each tensor in an operation of
    ``_CONSTANTS``, on a GPU with a synchronization.
    """

    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.nodes: set[Any] = set()
        self.shifting: set[Any] = set()
        self.added: dict[Any, tuple[int, ...]] = {}
        self.epsilons: set[Any] = set()
        self.inspected: set[Any] = set()
        self._reads = reads

    def records(self) -> Constants:
        """Return all records so far, for a graph."""
        return Constants(
            self._reads,
            frozenset(self.nodes),
            frozenset(self.shifting),
            dict(self.added),
            frozenset(self.epsilons),
            frozenset(self.inspected),
        )

    def begin(self) -> None:
        """Enter the mode; it is active until :meth:`leave`."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Leave the mode, even if other modes have been entered since then and are still active."""
        stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if not any(mode is self for mode in stack):
            return
        above = []
        while (top := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
            above.append(top)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation unchanged, and record what its constants decide."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # it has no node: an optimizer's step, or what is measured there
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").rstrip("_").removeprefix("__")
        constants, keeps_shifts, addend = _CONSTANTS.get(name), _KEEPS_SHIFTS.get(name), _ADDS.get(name)
        # read before the operation, which may write to them in place
        zero = False if constants is None else self._are_zero(list(constants(args, kwargs)))
        shifts = False if keeps_shifts is None else keeps_shifts(args, kwargs, self._reads)
        result = func(*args, **kwargs)
        changed = args[0] if result is None and args else result  # y[index] = 0 returns nothing
        node = changed.grad_fn if isinstance(changed, Tensor) else None
        if node is None:
            return result
        if zero:
            self.nodes.add(node)
        if shifts:
            self.shifting.add(node)
        known = addend is None or self._note_addend(node, addend(args, kwargs))
        if name == "rms_norm":
            sums = _sums_inside(node, args[0].grad_fn)
            self.epsilons |= sums
            self.inspected |= sums
        if known and zero is not None and shifts is not None and (constants or keeps_shifts or addend):
            self.inspected.add(node)
        return result

    def _are_zero(self, constants: list[Any]) -> bool | None:
        """Whether all constants are zero; None if some are tensors that may not be read."""
        if not self._reads and any(isinstance(value, Tensor) for value in constants):
            return None
        return all(map(_is_zero, constants))

    def _note_addend(self, node: Any, constant: Any) -> bool:
        """Record a constant that is added, and return whether everything is known about it."""
        if isinstance(constant, int | float):
            self.added[node] = ()
            if abs(constant) <= _LARGEST_EPSILON:
                self.epsilons.add(node)
        elif isinstance(constant, Tensor) and not constant.requires_grad:
            while "View" in node.name():  # a linear map of a tensor of more than two dimensions
                node = node.next_functions[0][0]
            self.added[node] = tuple(constant.shape)
            if constant.numel() == 1 and not self._reads:
                return False
            if constant.numel() == 1 and _is_readable(constant) and abs(float(constant)) <= _LARGEST_EPSILON:
                self.epsilons.add(node)
            self.inspected.add(node)
        return True


def _sums_inside(last: Any, first: Any) -> set[Any]:
    """Return the sums among the few nodes of a function from its last node to that of its input."""
    found, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node is not first and node not in found and not is_leaf(node):
            found.add(node)
            waiting += [source for source, _ in node.next_functions]
    return {node for node in found if node.name().startswith("AddBackward")}


ConstantsOf = Callable[[tuple[Any, ...], dict[str, Any]], Iterator[Any]]


def _floats(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the constant tensors except indices and masks."""
    for value in _all(args, kwargs):
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            yield value


def _all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for value in pytree.tree_leaves((args, kwargs)):
        if not (isinstance(value, Tensor) and value.requires_grad):
            yield value


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    yield from (value for value in _all(args, kwargs) if isinstance(value, Tensor))


def _behind_the_condition(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    yield from _all(args[1:], {name: value for name, value in kwargs.items() if name != "condition"})


def _value(position: int) -> ConstantsOf:
    def constants(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        yield kwargs.get("value", args[position] if len(args) > position else None)

    return constants


def _bias(position: int) -> ConstantsOf:
    def constants(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        bias = kwargs.get("bias", args[position] if len(args) > position else None)
        yield from () if isinstance(bias, Tensor) and bias.requires_grad else (bias,)

    return constants


_CONSTANTS: dict[str, ConstantsOf] = {
    **dict.fromkeys(("scatter", "scatter_add", "index_add", "index_copy", "index_put", "scatter_reduce"), _floats),
    **dict.fromkeys(("cat", "concat", "concatenate", "maximum", "minimum", "max", "min"), _tensors),
    "where": _behind_the_condition,
    "masked_fill": _value(2),
    "setitem": lambda args, kwargs: _all((args[0], args[2]), {}),
    "pad": _value(3),
    "linear": _bias(2),
    "layer_norm": _bias(3),
    "group_norm": _bias(3),
    "batch_norm": _bias(4),
}
"""By the name of an operation, the constants that decide whether it is homogeneous in its other arguments."""


def _is_zero(value: Any) -> bool:
    """Whether a constant is zero; None counts as zero, since ``pad`` then fills in zeros."""
    if isinstance(value, Tensor):
        return not value.requires_grad and _is_readable(value) and not bool(value.any())
    return value is None or (isinstance(value, int | float) and value == 0)


def _is_readable(value: Tensor) -> bool:
    """Whether the values of a tensor are in this process, and known by now.

    To read a distributed tensor, all processes would have to take part.
    """
    return not value.is_meta and not hasattr(value, "placements") and not (value.is_cuda and is_captured())


def _by_a_number(args: tuple[Any, ...], kwargs: dict[str, Any], reads: bool) -> bool:
    del reads
    other = kwargs.get("other", args[1] if len(args) > 1 else None)
    return isinstance(other, int | float) or (isinstance(other, Tensor) and other.ndim == 0 and not other.requires_grad)


def _by_minus_infinity(args: tuple[Any, ...], kwargs: dict[str, Any], reads: bool) -> bool | None:
    value = kwargs.get("value", kwargs.get("other", args[2] if len(args) > 2 else None))
    if isinstance(value, Tensor):
        if not reads:
            return None
        return value.numel() == 1 and _is_readable(value) and float(value) <= _NEARLY_MINUS_INFINITY
    return isinstance(value, int | float) and value <= _NEARLY_MINUS_INFINITY


_NEARLY_MINUS_INFINITY = -1e4  # a softmax gives such an element a weight of exactly zero
_KEEPS_SHIFTS: dict[str, Callable[[tuple[Any, ...], dict[str, Any], bool], bool | None]] = {
    **dict.fromkeys(("mul", "rmul", "multiply", "div", "truediv", "divide", "true_divide"), _by_a_number),
    "masked_fill": _by_minus_infinity,
    "where": _by_minus_infinity,
}
"""By the name of an operation, whether its constant lets shifts of the other argument through."""


def _other_term(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    terms = [*args[:2], *(kwargs[name] for name in ("input", "other") if name in kwargs)]
    return next((term for term in terms if not (isinstance(term, Tensor) and term.requires_grad)), None)


def _bias_of_linear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("bias", args[2] if len(args) > 2 else None)


_LARGEST_EPSILON = 1e-3
_ADDS: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = {
    **dict.fromkeys(("add", "radd", "iadd", "sub", "rsub", "isub", "subtract"), _other_term),
    **dict.fromkeys(("addmm", "baddbmm"), lambda args, kwargs: kwargs.get("input", args[0] if args else None)),
    "linear": _bias_of_linear,
}
"""By the name of an operation, the summand that may be a constant."""
