"""Who may be inside a language model: passes that want the same of it together, others in turn."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from gsae_core.errors import InputError


class Turns:
    """Hooks and replayed outputs belong to the modules, which threads share.

    A setting (a hook, say) that serves many passes at once is made when the first of them comes and
    undone when the last one has left: never while a pass runs, which would see its hooks change.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._key: Hashable = None
        self._setting: AbstractContextManager[None] = nullcontext()
        self._inside: set[int] = set()

    @contextmanager
    def together(
        self, key: Hashable, setting: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """Within, `setting` holds, and only threads that came with the same key are there too.

        Raises:
            InputError: if this thread is inside already, and would wait for itself.
        """
        me = threading.get_ident()
        with self._changed:
            if me in self._inside:
                raise InputError(
                    "expected an edit that leaves the language model alone, got one that runs it; "
                    "harvest first and edit with what was found"
                )
            self._changed.wait_for(lambda: self._key is None or self._key == key)
            if self._key is None:
                entered = setting()
                entered.__enter__()
                self._key, self._setting = key, entered
            self._inside.add(me)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(me)
                if not self._inside:
                    self._key = None
                    self._setting.__exit__(None, None, None)
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other thread is there."""
        with self.together(object(), nullcontext):
            yield
