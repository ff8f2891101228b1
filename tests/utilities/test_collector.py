"""The garbage collector is off while a function runs, and as it was before afterwards, whatever happens."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lightning_normgeo.utilities.collector import without_collector


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    gc.enable()


@without_collector
def seen(fails: bool = False) -> bool:
    if fails:
        raise ValueError("wrong")
    return gc.isenabled()


def test_it_is_off_inside_and_on_again_afterwards() -> None:
    assert seen() is False
    assert gc.isenabled()


def test_it_is_on_again_after_an_exception() -> None:
    with pytest.raises(ValueError, match="wrong"):
        seen(fails=True)
    assert gc.isenabled()


def test_who_has_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    assert seen() is False
    assert not gc.isenabled()


def test_nested_functions_leave_it_as_it_was() -> None:
    @without_collector
    def outer() -> tuple[bool, bool]:
        return seen(), gc.isenabled()

    assert outer() == (False, False)
    assert gc.isenabled()
