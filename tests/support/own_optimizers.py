"""User-defined optimizers without a known formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Quantized(torch.optim.Optimizer):
    """SGD with momentum in 8 bits and a scale per tensor, as in libraries of quantized optimizers."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        buffer = state["codes"].double() * state["scale"] if state else torch.zeros_like(parameter)
        buffer = group["momentum"] * buffer + parameter.grad
        state["scale"] = buffer.abs().amax() / 127 + 1e-30
        state["codes"] = (buffer / state["scale"]).round().to(torch.int8)
        parameter.sub_(group["lr"] * state["codes"] * state["scale"])


class SignOfRoot(torch.optim.Optimizer):
    """An update rule that no library has, with decoupled decay that its group declares."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1, "decoupled_weight_decay": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(group["lr"] * parameter.grad.sign() * parameter.grad.abs().sqrt())
        return loss
