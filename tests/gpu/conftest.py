"""Emulation of a GPU on a CPU, where it is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from support.gpu import EMULATED, emulate


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    if EMULATED:
        emulate(monkeypatch, interpreted=request.node.path.stem == "test_kernels")
