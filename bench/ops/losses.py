"""The loss of a language model's head, torch's over all logits, and a compiled loss in chunks.

Forward and backward; one token in eight has no label. The chunked peer computes the gradient of each chunk in
the forward, compiled (torch.func.grad_and_value). Torch's gets logits in fp32, as in transformers: from bf16
logits its gradients on a CPU have a relative error of 0.55, and such a peer is not timed. On a GPU Liger's
kernel replaces the chunks, and the truth is fp32, as fp64 is slow on most cards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
import testing

from ..lib import correctness
from ..lib.cases import DTYPES, Shape
from ..lib.harness import Case, Contenders, compared
from ..lib.report import OURS

TORCH, CHUNKS, LIGER = "F.cross_entropy", "in chunks, compiled", "Liger"
SMOLLM2, GEMMA2_CAP = (49152, 576), 30.0
ROWS = (256, 1024, 4096)
CHUNK = 256
IGNORED = -100
HEADS = ("frozen", "trained", "nf4")


def labels_of(rows: int, vocabulary: int) -> Tensor:
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))
    labels[::8] = IGNORED
    return labels


def losses(x: Tensor, weight: Tensor, labels: Tensor, cap: float | None = None) -> Tensor:
    """The mean loss over all logits."""
    logits = F.linear(x, weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


class InChunks:
    """The same in chunks of rows, each with its gradient at once."""

    def __init__(self, trained: bool, cap: float | None) -> None:
        def chunk(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            logits = F.linear(x, weight).float()
            if cap:
                logits = cap * torch.tanh(logits / cap)
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

        self.trained = trained
        wanted = (0, 1) if trained else (0,)
        self.function = torch.compile(torch.func.grad_and_value(chunk, argnums=wanted), dynamic=False)

    def __call__(self, x: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
        dx, total = torch.empty_like(x), torch.zeros(())
        dw = torch.zeros_like(weight, dtype=torch.float32) if self.trained else None
        count = (labels != IGNORED).sum()
        for begin in range(0, len(x), CHUNK):
            rows = slice(begin, begin + CHUNK)
            grads, value = self.function(x[rows], weight, labels[rows])
            dx[rows] = grads[0] / count
            total += value
            if dw is not None:
                dw += grads[1]
        found = {"loss": total / count, "dx": dx}
        return found if dw is None else {**found, "dw": (dw / count).to(weight.dtype)}


def differentiated(
    loss: Callable[..., Tensor], x: Tensor, weight: Any, labels: Tensor, trained: bool
) -> dict[str, Tensor]:
    value = loss(x, weight, labels)
    names = {"dx": x, "dw": weight} if trained else {"dx": x}
    grads = torch.autograd.grad(value, list(names.values()))
    return {"loss": value.detach().float(), **dict(zip(names, grads, strict=True))}


def liger(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(x, weight, labels, ignore_index=IGNORED)
    return loss


def case(
    head: str,
    rows: int,
    dtype: str,
    shape: Shape = SMOLLM2,
    cap: float | None = None,
    compiles: bool = True,
    card: str = "",
) -> Case:
    """`card`: the device of a GPU's case, "cpu" to test that."""
    trained = head == "trained"

    def build() -> Contenders:
        device = card or "cpu"
        x = testing.tensor(rows, shape[1], dtype=DTYPES[dtype]).to(device).requires_grad_()
        dense = testing.tensor(*shape, dtype=DTYPES[dtype], seed=1, scale=2 * shape[1] ** -0.5).to(device)
        packed = pk.NF4Weight.quantize(dense) if head == "nf4" else None
        if packed is not None:
            dense = packed.dequantize(DTYPES[dtype])
        dense.requires_grad_(trained)
        labels = labels_of(rows, shape[0]).to(device)
        by_torch = partial(losses, cap=cap)

        def results(wide: torch.dtype, at_once: int) -> dict[str, Tensor]:
            """The logits of a few rows at a time are in memory."""
            leaves = [t.detach().to(wide, copy=True).requires_grad_(t.requires_grad) for t in (x, dense)]
            has_label, total = labels != IGNORED, torch.zeros((), device=device)
            for part in (slice(i, i + at_once) for i in range(0, rows, at_once)):
                share = has_label[part].sum() / has_label.sum()
                loss = by_torch(leaves[0][part], leaves[1], labels[part]) * share
                loss.backward()
                total = total + loss.detach()
            names = {"dx": leaves[0], "dw": leaves[1]} if trained else {"dx": leaves[0]}
            return {"loss": total, **{name: t.grad for name, t in names.items()}}

        wide, some = (torch.float32, 512) if card else (torch.float64, 64)
        wanted = correctness.Expected(results(DTYPES[dtype], some if card else rows), results(wide, some))

        def call(loss: Callable[..., Tensor], weight: Any) -> Callable[[], Any]:
            return partial(differentiated, loss, x, weight, labels, trained)

        ours = partial(pk.linear_cross_entropy, softcap=cap)
        calls = {OURS: call(ours, dense if packed is None else packed), TORCH: call(by_torch, dense)}
        if compiles and not card:
            calls[CHUNKS] = partial(InChunks(trained, cap), x.detach(), dense.detach(), labels)
        found = compared(wanted, {name: lambda run=run: run for name, run in calls.items()})
        if card and packed is None:
            found += compared(wanted, {LIGER: lambda: call(liger, dense)}, "liger_kernel")
        return found

    group = f"loss-{head}" + ("-capped" if cap else "")
    kinds = {"frozen": "a frozen head", "trained": "a trained head", "nf4": "a frozen head in NF4"}
    title = f"loss of {kinds[head]}{', logits capped' if cap else ''}, forward + backward"
    return Case(group, *shape, rows, dtype, build, title=title, seconds=30.0)


def standard(dtype: str) -> list[Case]:
    found = [case("frozen", rows, dtype) for rows in ROWS]
    return [
        *found,
        *(case(head, 1024, dtype) for head in HEADS[1:]),
        case("frozen", 1024, dtype, cap=GEMMA2_CAP),
    ]
