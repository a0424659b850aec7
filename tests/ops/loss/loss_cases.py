"""Heads, labels and the definition of the loss, for tests of ops and calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
import testing
from peft_kernels.core.formats import FORMATS

IGNORED = -100

OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "capped": {"softcap": 5.0, "logit_scale": 2.0},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "all": {"logit_scale": 2.0, "softcap": 5.0, "label_smoothing": 0.2, "z_loss": 1e-2},
}


def labels_of(rows: int, vocabulary: int) -> Tensor:
    """Every fifth label is ignored; the first and the last token occur among the others."""
    generator = torch.Generator().manual_seed(testing.SEED)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[:2] = torch.tensor([0, vocabulary - 1])[:rows]
    labels[4::5] = IGNORED
    return labels


def weight_of(base: str, vocabulary: int, features: int, dtype: torch.dtype) -> Any:
    if base == "dense":
        return testing.tensor(vocabulary, features, dtype=dtype, seed=1, scale=2 * features**-0.5)
    if base in FORMATS:
        return testing.nf4_weight(vocabulary, features, None, format=base)
    return testing.nf4_weight(vocabulary, features, 32, base == "nested")


def wide(weight: Any) -> Tensor:
    return (
        (weight.dequantize(torch.float32) if isinstance(weight, pk.NF4Weight) else weight).detach().double()
    )


def defined(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float = 1.0,
    softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses and entropies in torch functions."""
    z = F.linear(x, weight, bias) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, labels, label_smoothing=label_smoothing, reduction="none")
    valid = labels != IGNORED
    entropy = torch.distributions.Categorical(logits=z).entropy() if len(z) else z.new_empty(0)
    return losses + z_loss * z.logsumexp(-1) ** 2 * valid, entropy * valid


def results_of(case: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Results of the op, of plain torch and in fp64, by name."""
    rows, vocabulary, features = case["size"]
    dtype, options = case["dtype"], OPTIONS[case["options"]]
    with_dx = case["options"] != "all"  # with both a cap and smoothing there is none
    x = testing.tensor(rows, features, dtype=dtype)
    weight = weight_of(case["base"], vocabulary, features, dtype)
    bias = {"none": None, "same": dtype, "fp32": torch.float32}[case["bias"]]
    b = None if bias is None else testing.tensor(vocabulary, dtype=bias, seed=3)
    labels = labels_of(rows, vocabulary)
    head = weight._state.op_args if case["base"] != "dense" else (weight, None, None, None, 0)
    o = [options.get(k, v) for k, v in (("logit_scale", 1.0), ("softcap", 0.0), ("label_smoothing", 0.0))]
    args = (*head, vocabulary, b, labels, IGNORED, *o, options.get("z_loss", 0.0), with_dx, True, True, True)
    got = torch.ops.peft_kernels.linear_cross_entropy(x, *args)
    plain = testing.reference_op("linear_cross_entropy")(x, *args)
    assert all(g.is_contiguous() and g.dtype == p.dtype for g, p in zip(got, plain, strict=True))
    assert not any(t[4::5].any() for t in got)
    value, *rest = torch.ops.peft_kernels.linear_cross_entropy(x, *args[:-4], *[False] * 4)
    near = 8 * torch.finfo(dtype).eps  # dx may be computed in another order
    torch.testing.assert_close(value, got[0], rtol=near, atol=near)
    assert [t.numel() for t in rest] == [0, rows, 0, 0, 0, 0]
    x64 = x.double().requires_grad_()
    truth, entropy = defined(x64, wide(weight), labels, None if b is None else b.double(), **options)
    wide_args = map(testing.widen, (x, *args))
    _, _, lse, _, mean, squares, _ = testing.reference_op("linear_cross_entropy")(*wide_args)
    (dx,) = torch.autograd.grad(truth.sum(), x64)
    truths = (truth.detach(), entropy, lse, mean, squares, dx if with_dx else dx[:0])
    names = ("loss", "entropy", "lse", "mean", "squares", "dx")
    got, plain = ((*each[:3], *each[4:]) for each in (got, plain))
    return {n: parts for n, *parts in zip(names, got, plain, truths, strict=True)}  # type: ignore[misc]
