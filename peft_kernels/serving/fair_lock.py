"""A fair (FIFO) lock: a thread that takes it again at once cannot starve the others."""

from __future__ import annotations

import threading
from typing import Any


class FairLock:
    """A `threading.RLock` that its last owner gets back only after the threads that were waiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # held by the thread that is next
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> FairLock:
        me = threading.get_ident()
        if self._owner != me:
            with self._turn:
                self._lock.acquire()
            self._owner = me
        self._depth += 1
        return self

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()
