"""What garbage collections leave out, and what they still find."""

import gc
import sys
import types
import weakref

import pytest

from gsae_core.app import shell


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "_n_modules", 0)
    shell.spare_modules()


def test_what_is_alive_when_modules_were_imported_is_left_out_from_then_on() -> None:
    frozen = gc.get_freeze_count()
    assert frozen > 10_000  # pytest and torch alone hold more
    assert len(gc.get_objects()) < frozen / 10


def test_garbage_is_found_all_the_same() -> None:
    seen = weakref.ref(Node())
    assert seen() is not None
    gc.collect()
    assert seen() is None


def test_nothing_more_is_left_out_until_a_module_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = Node()
    shell.spare_modules()
    assert looked_at(kept)
    monkeypatch.setitem(sys.modules, "imported_just_now", types.ModuleType("imported_just_now"))
    shell.spare_modules()
    assert not looked_at(kept)


def looked_at(thing: object) -> bool:
    """Whether collections look at an object; counts would change with what other threads free."""
    return any(other is thing for other in gc.get_objects())
