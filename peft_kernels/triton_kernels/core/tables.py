"""Tables in device memory that seldom change, such as the addresses of an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import bypasses_cache, cdiv, config, device_and_stream, launch, varying

STORE = config(4, 1)
WORDS = 256
"""Per launch: half the limit of a kernel's arguments."""
MARK = 1 << 58
"""Added to each word, so that Triton types all of them int64."""
PLAIN = tl.constexpr(MARK - 1)

Made = TypeVar("Made")


@triton.jit
def store_words_kernel(out_ptr, words, COUNT: tl.constexpr):
    # One store of all: with a store per word the compiler would first load all words into registers.
    at = tl.arange(0, COUNT)
    values = tl.zeros((COUNT,), tl.int64)
    for i in tl.static_range(COUNT):
        values = tl.where(at == i, words[i], values)
    tl.store(out_ptr + at, values >> 4 & PLAIN)


def words_on_device(words: Sequence[int], device: torch.device) -> Tensor:
    """int64 tensor of `words`, each below 2^58, padded to whole launches. They travel as kernel arguments, so
    nothing waits, and a CUDA graph holds its own copy."""
    out = torch.empty(cdiv(len(words), WORDS) * WORDS, dtype=torch.int64, device=device)
    for at in range(0, len(words), WORDS):
        part = [varying(word + MARK) for word in words[at : at + WORDS]]
        part += [varying(MARK)] * (WORDS - len(part))
        launch(store_words_kernel, (1,), out[at : at + WORDS], tuple(part), config=STORE, COUNT=WORDS)
    return out


class StreamCache(Generic[Made]):
    """Caches the last few values made from keys, per stream.

    Bypassed while a CUDA graph is captured: the graph makes its own values, in its own memory.
    """

    MOST = 16

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any, Made]] = []
        self._lock = Lock()

    def find(self, key: Any, make: Callable[[], Made]) -> Made:
        if bypasses_cache():
            return make()
        where = device_and_stream()
        with self._lock:
            for i, (found_where, found_key, made) in enumerate(self._made):
                if found_where == where and found_key == key:
                    self._made.insert(0, self._made.pop(i))
                    return made
            made = make()
            self._made.insert(0, (where, key, made))
            del self._made[self.MOST :]
            return made
