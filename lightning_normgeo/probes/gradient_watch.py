"""Detection of gradients that were changed after their backward pass, by their version counters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class GradientWatch:
    """Keeps track of the gradients that were changed or replaced after their backward pass, as by clipping.

    Every in-place operation increments the version counter of its tensor, which is on the host: nothing is read from
    the device. Changes through ``.data`` are not detected.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[int, int]] = {}
        self._touched: set[int] = set()

    def forget(self) -> None:
        """Discard all records, at the beginning of a step."""
        self._left, self._touched = {}, set()

    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """Record the versions of all gradients right after a backward pass."""
        self._left = {id(p): (id(p.grad), p.grad._version) for p in parameters if p.grad is not None}

    def look(self, parameters: Iterable[nn.Parameter]) -> None:
        """Record the gradients changed since :meth:`note`, before another backward pass or the update."""
        for parameter in parameters:
            gradient, left = parameter.grad, self._left.get(id(parameter))
            if gradient is None:
                self._touched.discard(id(parameter))
            elif left is not None and left != (id(gradient), gradient._version):
                self._touched.add(id(parameter))

    def alike(self, weight: nn.Parameter, scale: nn.Parameter, together: bool) -> bool:
        """Whether the gradients of W and γ differ from those of the backward pass by one common factor.

        That is so if both are unchanged. If both were changed and one optimizer moves both, they are assumed to have
        been clipped together. Nothing is known about gradients that a hook of the parameter may change.

        Args:
            weight: W.
            scale: γ.
            together: whether one optimizer moves both.
        """
        if _is_hooked(weight) or _is_hooked(scale):
            return False
        self.look((weight, scale))
        touched = {id(weight) in self._touched, id(scale) in self._touched}
        return touched == {False} or (touched == {True} and together)


def _is_hooked(parameter: nn.Parameter) -> bool:
    """Whether a hook gets the gradient of a parameter in the backward pass, as in clipping by ``register_hook``."""
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))
