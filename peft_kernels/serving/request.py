"""One request: what is asked for, and what has come of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import number, whole

_COLDEST = torch.finfo(torch.float32).tiny
"""Below it a temperature is 0 in fp32."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. With temperature 0 it is the likeliest one."""

    temperature: float = 0.0
    top_k: int = 0
    """Only the so many likeliest; 0: all."""
    top_p: float = 1.0
    """Only the likeliest that together have this probability."""
    seed: int | None = None
    """Of the request's own generator: other requests change nothing. None: one of torch's."""

    def __post_init__(self) -> None:
        if not 0 <= number("temperature", self.temperature) < float("inf"):
            raise ValueError(f"temperature: expected 0 or a positive number, got {self.temperature}")
        if whole("top_k", self.top_k) < 0:
            raise ValueError(f"top_k: expected 0 or a positive number, got {self.top_k}")
        if not 0 < number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not -(2**63) <= whole("seed", self.seed) < 2**64:
            raise ValueError(f"seed: expected one of 64 bits, got {self.seed}")


class Request:
    """A handle of what `Engine.submit` has taken. Threads may wait for it, or go through its tokens as they
    come.

    Attributes
    ----------
    tokens : list of int
        So far, without the prompt; with the token that ended it.
    logits : list of Tensor, (vocabulary,)
        That each token was chosen from, if `keep_logits` was asked for.
    finish_reason : str or None
        "stop" (an end-of-sequence token), "length", "cancelled" or "error"; None while it runs.
    error : Exception or None
    """

    def __init__(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        max_new_tokens: int,
        eos: frozenset[int],
        sampling: Sampling,
        keep_logits: bool,
        is_served: Callable[[], bool],
    ) -> None:
        self.prompt = list(prompt)
        self.adapter = adapter
        self.max_new_tokens = max_new_tokens
        self.eos = eos
        self.sampling = sampling
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._keep_logits = keep_logits
        self._is_served = is_served
        self._changed = threading.Condition()
        self._generator: torch.Generator | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def cancel(self) -> None:
        """End it, before its turn or with the next token. Nothing happens to one that is done."""
        self.finish("cancelled")

    def result(self, timeout: float | None = None) -> list[int]:
        """Its tokens when it is done. Raises its error; TimeoutError after `timeout` seconds; RuntimeError
        where nothing would ever serve it."""
        self._wait(lambda: self.done, timeout)
        if self.error is not None:
            raise self.error
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        """Tokens as they come. Raises its error."""
        given = 0
        while True:
            self._wait(lambda: self.done or len(self.tokens) > given)  # noqa: B023 (called here)
            done, fresh = self.done, self.tokens[given:]  # in this order: none comes when it is done
            yield from fresh
            given += len(fresh)
            if done and given == len(self.tokens):
                break
        if self.error is not None:
            raise self.error

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        # The lock is taken only where there is something to wait for. In a process forked from the engine's,
        # a thread that is not there may hold it.
        if not ready() and self._is_served():
            with self._changed:
                if not self._changed.wait_for(lambda: ready() or not self._is_served(), timeout):
                    raise TimeoutError(f"the request is not done after {timeout} seconds")
        if not ready():
            raise RuntimeError("the engine does not run: expected engine.start() or engine.run() beforehand")

    # For the engine.

    def wake(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def take(self, logits: Tensor) -> None:
        """Choose the next token, from logits (vocabulary,). Where that fails, as of NaN, this request
        ends."""
        try:
            token = self._choose(logits.float())
        except Exception as error:
            return self.finish("error", error)
        with self._changed:
            if self.done:  # cancelled meanwhile
                return
            if self._keep_logits:
                self.logits.append(logits.clone())
            self.tokens.append(token)  # last: who reads it may read its logits
            self._changed.notify_all()
        if token in self.eos:
            self.finish("stop")
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str, error: Exception | None = None) -> None:
        with self._changed:
            if not self.done:
                self.error = error
                self.finish_reason = reason  # last: who reads it may read the error
                self._changed.notify_all()

    def _choose(self, logits: Tensor) -> int:
        how, token = self.sampling, logits.argmax()
        largest = logits[token]
        if not largest.isfinite():
            raise RuntimeError(f"logits: expected one that is finite and the largest, got {float(largest)}")
        if how.temperature == 0:
            return int(token)
        logits = (logits - largest) / max(how.temperature, _COLDEST)
        if 0 < how.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
        probabilities = logits.softmax(0)
        if how.top_p < 1:
            ordered, places = probabilities.sort(descending=True)
            beyond = ordered.cumsum(0) - ordered >= how.top_p
            probabilities = probabilities.index_fill(0, places[beyond], 0)
        if self._generator is None:
            self._generator = torch.Generator(logits.device)
            self._generator.seed() if how.seed is None else self._generator.manual_seed(how.seed)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
