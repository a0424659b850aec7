"""Tables in the device's memory that seldom change, such as where an optimizer's parameters are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, config, launch, passing, queue, varying

STORE = config(4, 1)
WORDS = 256
"""Of a launch: half of what the arguments of a kernel may have."""
MARK = 1 << 58
"""Added to each word, so that all are int64 to the compiler."""
PLAIN = tl.constexpr(MARK - 1)

Made = TypeVar("Made")


@triton.jit
def store_words_kernel(out_ptr, words, COUNT: tl.constexpr):
    # Not one store for each: the compiler would have all words in registers first.
    at = tl.arange(0, COUNT)
    values = tl.zeros((COUNT,), tl.int64)
    for i in tl.static_range(COUNT):
        values = tl.where(at == i, words[i], values)
    tl.store(out_ptr + at, values >> 4 & PLAIN)


def stored(words: Sequence[int], device: torch.device) -> Tensor:
    """int64, of `words` from 0 to below 2^58 and what fills the last launch. They travel as arguments of
    kernels: nothing waits, and a graph holds its own."""
    out = torch.empty(cdiv(len(words), WORDS) * WORDS, dtype=torch.int64, device=device)
    for at in range(0, len(words), WORDS):
        part = [varying(word + MARK) for word in words[at : at + WORDS]]
        part += [varying(MARK)] * (WORDS - len(part))
        launch(store_words_kernel, (1,), out[at : at + WORDS], tuple(part), config=STORE, COUNT=WORDS)
    return out


class Kept(Generic[Made]):
    """The last few of what was made from keys, each for a stream, on which it was written.

    While a graph is captured nothing is taken from here, nor left: the graph makes its own each time, in
    memory of its own.
    """

    MOST = 16

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any, Made]] = []
        self._lock = Lock()

    def find(self, key: Any, make: Callable[[], Made]) -> Made:
        if passing():
            return make()
        where = queue()
        with self._lock:
            for i, (found_where, found_key, made) in enumerate(self._made):
                if found_where == where and found_key == key:
                    self._made.insert(0, self._made.pop(i))
                    return made
            made = make()
            self._made.insert(0, (where, key, made))
            del self._made[self.MOST :]
            return made
