"""Modules that torch.compile was applied to, whose autograd graph is opaque."""

from __future__ import annotations

from torch import nn

from lightning_normgeo.errors import ConfigurationError


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module, to a submodule, or to the LightningModule itself."""
    if getattr(module, "_compiler_ctx", None) is not None:  # Lightning's mark: it compiles the methods of the module
        return True
    # ``module.compile()`` sets the attribute, ``torch.compile(module)`` returns a wrapper of this class; it is compared
    # by name, since importing it loads all of the compiler
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or type(child).__name__ == "OptimizedModule"
        for child in module.modules()
    )


def check_not_compiled(function: str, module: nn.Module) -> None:
    """Check that a function can read the graph of a module.

    Args:
        function: its name.
        module: the module that it was given.

    Raises:
        ConfigurationError: for a compiled module.
    """
    if is_compiled(module):
        raise ConfigurationError(f"{function} cannot look into a compiled model. Give it the model itself.")
