"""Packs sequences with a common prefix into one row: the prefix once, followed by all continuations.

A mask lets each continuation attend to the prefix and itself, and its positions continue from the prefix, so
a causal transformer computes the same as in separate rows. Padding has the greatest position of the batch,
because some rotary embeddings (dynamic NTK scaling, LongRoPE) depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...patch.loss.trl_head import IGNORED

LINEAR = 1
"""Cost of a token in linear layers relative to attending to hidden_size tokens. By FLOPs it is 5 or 6, but
attention with such a mask is slow and computes masked scores too: on two cores, prompts of 64 with
completions of 192 are slower, prompts of 128 with 128 faster."""


@dataclass(frozen=True)
class Rows:
    """A batch with each prefix once. At least one row is padded, on the right; padding has the last position
    of the batch.

    `input_ids`, `position_ids`, `targets`: (rows, length); a target is the predicted token, or -100.
    `visible`: bool (rows, 1, length, length), whether a query (third) attends to a key (fourth). `index`:
    positions in the flattened rows of the original batch's predictions, in its order. `own`: int (rows,
    length), the continuation of a token in its row, 0 for the prefix, -1 for padding."""

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    visible: Tensor
    index: Tensor
    own: Tensor


@dataclass(frozen=True)
class _Sequence:
    """A sequence up to its last prediction: tokens, start in its row, and the index of the first token that
    is not shared, from which the first target is predicted."""

    row: int
    tokens: np.ndarray
    start: int
    split: int

    @property
    def prefix(self) -> tuple[int, bytes]:
        return self.start, self.tokens[: self.split].tobytes()


def share(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, hidden_size: int) -> Rows | str:
    """Rows that replace a batch, or the reason why they would not be less work.

    Parameters
    ----------
    input_ids, attention_mask, labels
        (batch, length), padded on the left or right. A label is the token at its position if it is to be
        predicted, else -100.
    hidden_size
        Of the model, to estimate the cost of linear layers.
    """
    ids, seen, wanted = (t.cpu().numpy() for t in (input_ids, attention_mask != 0, labels))
    counted = wanted[:, 1:] != IGNORED
    sequences = [_sequence(row, ids[row], seen[row], counted[row]) for row in range(len(ids))]
    if any(isinstance(sequence, str) for sequence in sequences):
        return next(sequence for sequence in sequences if isinstance(sequence, str))
    groups: dict[tuple[int, bytes], list[_Sequence]] = {}
    for sequence in sequences:
        if isinstance(sequence, _Sequence):
            groups.setdefault(sequence.prefix, []).append(sequence)

    def split(most: int) -> list[list[_Sequence]]:
        return [group[at:][:most] for group in groups.values() for at in range(0, len(group), most)]

    def work(rows: int, length: int) -> int:
        return rows * length * (length + LINEAR * hidden_size)

    largest = max(map(len, groups.values()), default=1)
    choices = [split(most) for most in range(2, largest + 1)]
    best = min(choices, key=lambda rows: work(len(rows), max(map(_length, rows))), default=None)
    if best is None:
        return "no two sequences have the same prompt"
    if work(len(best), max(map(_length, best))) >= work(*ids.shape):
        return "the prompts are too short compared with their completions"
    return _lay_out(best, ids, counted, input_ids.device)


def _sequence(row: int, ids: np.ndarray, seen: np.ndarray, counted: np.ndarray) -> _Sequence | str | None:
    """The sequence of a row, None if it has no target, or a reason."""
    where = np.flatnonzero(counted)
    if not len(where):
        return None
    start, first, last = int(seen.argmax()), int(where[0]), int(where[-1])
    if not seen[start : last + 1].all() or first < start:
        return "its attention mask has gaps"
    return _Sequence(row, ids[start : last + 1], start, first - start)


def _length(row: list[_Sequence]) -> int:
    return row[0].split + sum(len(sequence.tokens) - sequence.split for sequence in row)


def _lay_out(rows: list[list[_Sequence]], ids: np.ndarray, counted: np.ndarray, device: torch.device) -> Rows:
    lengths = [_length(row) for row in rows]
    shape = len(rows), max(lengths) + (min(lengths) == max(lengths))
    tokens, positions = np.zeros(shape, ids.dtype), np.full(shape, ids.shape[1] - 1)
    targets, own = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
    place = np.zeros(counted.shape, np.int64)
    for r, row in enumerate(rows):
        start, at = row[0].start, row[0].split
        tokens[r, :at], positions[r, :at], own[r, :at] = row[0].tokens[:at], np.arange(start, start + at), 0
        for number, sequence in enumerate(row, 1):
            rest = sequence.tokens[sequence.split :]
            here = slice(at, at + len(rest))
            there = slice(start + sequence.split, start + len(sequence.tokens))
            tokens[r, here], positions[r, here] = rest, np.arange(there.start, there.stop)
            own[r, here], place[sequence.row, there] = number, r * shape[1] + np.arange(at, here.stop)
            following = ids[sequence.row, there.start + 1 : there.stop + 1]
            targets[r, here] = np.where(counted[sequence.row, there], following, IGNORED)
            at = here.stop
    of_row = torch.from_numpy(own).to(device)
    return Rows(
        input_ids=torch.from_numpy(tokens).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        targets=torch.from_numpy(targets).to(device),
        visible=_visible(of_row),
        index=torch.from_numpy(place[counted]).to(device),
        own=of_row,
    )


def _visible(own: Tensor) -> Tensor:
    """Causal mask within a continuation and the prefix. Padding attends to itself: a softmax over nothing is
    NaN."""
    keys, queries = own[:, None, None, :], own[:, None, :, None]
    causal = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool, device=own.device).tril()
    return causal & ((keys == queries) | (keys == 0))


def leak(rows: Rows, run: Callable[[Tensor], Tensor]) -> float:
    """Relative effect of the first continuation of each row on other tokens; 0 for a model that respects the
    mask.

    `run` maps input_ids (rows, length) to hidden states (rows, length, hidden_size).
    """
    ids = rows.input_ids
    others = torch.where(rows.own == 1, torch.where(ids > 0, ids - 1, 1), ids)
    kept = (rows.own == 0) | (rows.own > 1)
    return apart(run(others)[kept], run(ids)[kept])


def apart(a: Tensor, b: Tensor) -> float:
    """Relative distance of a from b."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
