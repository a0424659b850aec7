"""A request: its parameters, tokens and state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import number, whole

_COLDEST = torch.finfo(torch.float32).tiny
"""Smallest temperature that is not 0 in fp32."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    """Sample among so many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the most likely tokens with this total probability."""
    seed: int | None = None
    """Seed of the request's own generator; None takes one from torch."""

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
    """The handle that `Engine.submit` returns. Threads can wait for it or iterate over its tokens.

    Attributes
    ----------
    tokens : list of int
        New tokens so far, including the end-of-sequence token.
    logits : list of Tensor, (vocabulary,)
        Logits of each token, with `keep_logits`.
    finish_reason : str or None
        "stop" (an end-of-sequence token), "length", "cancelled" or "error"; None until finished.
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
        """Ends the request, in the queue or with the next token. No effect if it is done."""
        self.finish("cancelled")

    def result(self, timeout: float | None = None) -> list[int]:
        """Waits and returns all tokens. Raises the request's error, TimeoutError after `timeout` seconds, or
        RuntimeError if no thread serves the engine."""
        self._wait(lambda: self.done, timeout)
        if self.error is not None:
            raise self.error
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        """Yields tokens as they are decoded. Raises the request's error."""
        given = 0
        while True:
            self._wait(lambda: self.done or len(self.tokens) > given)  # noqa: B023 (called here)
            done, fresh = self.done, self.tokens[given:]  # in this order: no token follows `done`
            yield from fresh
            given += len(fresh)
            if done and given == len(self.tokens):
                break
        if self.error is not None:
            raise self.error

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        # Takes the lock only to wait: in a process forked from the engine's, a missing thread may hold it.
        if not ready() and self._is_served():
            with self._changed:
                if not self._changed.wait_for(lambda: ready() or not self._is_served(), timeout):
                    raise TimeoutError(f"the request is not done after {timeout} seconds")
        if not ready():
            raise RuntimeError("the engine does not run: expected engine.start() or engine.run() beforehand")

    # For the engine.

    def wake(self) -> None:
        """Wakes waiting threads."""
        with self._changed:
            self._changed.notify_all()

    def take(self, logits: Tensor) -> None:
        """Samples the next token from logits (vocabulary,). An error, NaN for example, ends this request."""
        try:
            token = self._choose(logits.float())
        except Exception as error:
            return self.finish("error", error)
        with self._changed:
            if self.done:  # cancelled
                return
            if self._keep_logits:
                self.logits.append(logits.clone())
            self.tokens.append(token)  # after its logits, which readers may use
            self._changed.notify_all()
        if token in self.eos:
            self.finish("stop")
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str, error: Exception | None = None) -> None:
        with self._changed:
            if not self.done:
                self.error = error
                self.finish_reason = reason  # after the error, which readers may use
                self._changed.notify_all()

    def _choose(self, logits: Tensor) -> int:
        how, token = self.sampling, logits.argmax()
        largest = logits[token]
        if not largest.isfinite():
            raise RuntimeError(
                f"logits: expected finite numbers, got {float(largest)} as the largest for token "
                f"{len(self.tokens) + 1}: the model or its adapter overflows with this prompt"
            )
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
