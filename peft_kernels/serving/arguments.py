"""Checks of an engine's arguments."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def whole(name: str, value: Any) -> int:
    """`value` as an int. Raises ValueError unless it is a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None


def number(name: str, value: Any) -> float:
    """`value` as a float. Raises ValueError unless it is a number; text is not."""
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None


def at_least(name: str, value: Any, least: int) -> int:
    if whole(name, value) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return whole(name, value)


def end_tokens(given: Any, model: Any) -> frozenset[int]:
    """End-of-sequence ids from an id, several or a tensor; None means those of the model's
    generation_config."""
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        return frozenset()
    if isinstance(given, Tensor):
        given = given.reshape(-1).tolist()
    try:
        if isinstance(given, str):
            raise TypeError
        return frozenset(map(operator.index, given if isinstance(given, Iterable) else [given]))
    except TypeError:
        raise ValueError(f"eos_token_id: expected a token id or several, got {given!r}") from None


def token_ids(prompt: str | Sequence[int], tokenizer: Any, vocabulary: int) -> list[int]:
    """The token ids of a prompt. Raises ValueError for an empty prompt or ids outside of the vocabulary."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("prompt: expected token ids, as the engine has no tokenizer, got a text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            got = f"{prompt[error.start]!r} at {error.start}"
            raise ValueError(f"prompt: expected a text that UTF-8 can hold, got {got}") from error
        prompt = tokenizer(prompt).input_ids
    try:
        ids = [operator.index(token) for token in prompt]  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"prompt: expected a text or a sequence of token ids, got {prompt!r}") from error
    if not ids:
        raise ValueError("prompt: expected at least one token, got none")
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise ValueError(f"prompt: expected tokens below {vocabulary}, got {wrong[0]}")
    return ids
