"""Plain scripts of the repository, such as those of the documentation, loaded as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from support.isolation import REPOSITORY


def load_script(path: str) -> ModuleType:
    """Return a script as a module, once per process.

    Args:
        path: below the root of the repository, such as ``docs/units.py``.
    """
    name = f"script_{path.removesuffix('.py').replace('/', '_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
    return sys.modules[name]
