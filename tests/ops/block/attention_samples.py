"""Arguments of the attention ops."""

from __future__ import annotations

from typing import Any

import torch
from small_tensors import leaf


def attention_args(
    dtype: torch.dtype = torch.float32, spans: int = 0, causal: bool = False, dropout_p: float = 0.0
) -> tuple[Any, ...]:
    """`spans`: number of spans per row."""
    q, k, v = (leaf(2, rows, heads, 6, dtype=dtype, seed=rows) for rows, heads in ((5, 4), (7, 2), (7, 2)))
    of_rows = torch.tensor([[0, 7], [2, 5], [3, 3], [6, 9], [0, 1]]).int().expand(2, 5, 2)
    if spans == 2:
        of_rows = torch.stack([of_rows, of_rows.flip(1)], 2)
    seed = torch.tensor(7) if dropout_p else None
    return (q, k, v, of_rows if spans else None, causal, 0.4, dropout_p, seed)


def backward_args(**options: Any) -> tuple[Any, ...]:
    q, k, v, *rest = attention_args(**options)
    args = (q.detach(), k.detach(), v.detach(), *rest)
    y, softmax = torch.ops.peft_kernels_reference.attention(*args)
    return (leaf(2, 5, 4, 6, dtype=y.dtype, seed=8).detach(), *args, y, softmax)


def attention_samples() -> dict[str, dict[str, tuple[Any, ...]]]:
    return {
        "attention": {
            "plain": attention_args(),
            "spans-bf16": attention_args(torch.bfloat16, spans=1),
            "causal": attention_args(causal=True),
            "dropout": attention_args(dropout_p=0.2),
            "both": attention_args(spans=1, causal=True),
            "two-spans": attention_args(spans=2, causal=True),
        },
        "attention_backward": {
            "causal": backward_args(causal=True),
            "dropout": backward_args(dropout_p=0.2),
            "spans-bf16": backward_args(dtype=torch.bfloat16, spans=1),
            "two-spans": backward_args(spans=2, causal=True),
        },
    }
