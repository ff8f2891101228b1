"""Names of parameters while a model may be edited: renamed, pruned, parametrized, or given other layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping

from torch import nn


class ParameterNames:
    """Names of parameters, as they were when they were last looked up; the parameters themselves are not kept alive.

    Args:
        look_up: returns the parameters by name.
    """

    def __init__(self, look_up: Callable[[], Mapping[str, nn.Parameter]] = dict) -> None:
        self.look_up = look_up
        # by id, with the parameters themselves, since another one may get the id of one that was replaced
        self._held: dict[int, tuple[str, weakref.ref[nn.Parameter]]] = {}

    @property
    def all(self) -> list[str]:
        """All names, in the order in which they were looked up first."""
        return list(dict.fromkeys(name for name, _ in self._held.values() if name))

    def of(self, parameter: nn.Parameter) -> str:
        """Return the name of a parameter; empty if it has none or is not known."""
        return self._held[id(parameter)][0] if self.knows(parameter) else ""

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter has been looked up, with or without a name."""
        return id(parameter) in self._held and self._held[id(parameter)][1]() is parameter

    def leave_nameless(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep in mind that parameters have no name, unless they are known."""
        self._held |= {id(one): ("", weakref.ref(one)) for one in parameters if not self.knows(one)}

    def update(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
        """Take the names of parameters and return the new names of those that were renamed, by their old ones.

        A parameter that is not among them keeps its name, unless another one has that name now.
        """
        renamed = {self.of(one): name for name, one in parameters.items() if self.of(one) not in ("", name)}
        for key, (name, held) in self._held.items():
            if name in parameters and parameters[name] is not held():  # of a layer that was replaced
                self._held[key] = "", held
        self._held = {key: one for key, one in self._held.items() if one[0] or one[1]() is not None}
        self._held |= {id(parameter): (name, weakref.ref(parameter)) for name, parameter in parameters.items()}
        return renamed
