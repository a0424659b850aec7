"""Reading the logits of a loss computed without them gives stock's values."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import loss_models
import pytest
import torch
import torch.nn.functional as F
from flow_checks import assert_near, step
from flow_models import llama
from loss_models import MODELS, VOCABULARY, batch, patched, without_noise
from peft_models import gradients
from test_gradient_needs import Unused
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import peft_kernels as pk
import testing
from peft_kernels.ops.loss.token_loss import linear_cross_entropy
from peft_kernels.patch.loss import lazy_scores, recipe
from peft_kernels.patch.loss.lazy_logits import LazyLogits


def read_whole(out: Any) -> Tensor:
    return out.loss + out.logits.float().square().mean()


def read_by_position(out: Any) -> Tensor:
    return out.loss * 2 + out[1].softmax(-1)[..., 3].mean() + out["logits"].amax() + out.to_tuple()[1].sum()


def own_loss(out: Any) -> Tensor:
    logits = out.logits[..., :-1, :].contiguous()
    return F.cross_entropy(
        logits.view(-1, VOCABULARY), batch()["input_ids"][:, 1:].flatten(), label_smoothing=0.1
    )


def masked_loss(out: Any) -> Tensor:
    ids = batch()["input_ids"]
    return F.cross_entropy(out.logits[ids > 30] / 2, ids[ids > 30], reduction="sum")


def weighted_loss(out: Any) -> Tensor:
    weight = torch.linspace(0, 1, VOCABULARY)
    return F.cross_entropy(out.logits.flatten(0, 1), batch()["input_ids"].view(-1), weight)


def written_into(out: Any) -> Tensor:
    """A view sees writes to its base, a computed tensor does not."""
    logits, rows = out.logits, out.logits.view(-1, VOCABULARY)
    half = logits * 0.5
    logits[..., 3] = -5.0
    rows.mul_(2.0)
    wanted = F.cross_entropy(logits.view(-1, VOCABULARY), batch()["input_ids"].view(-1))
    return wanted + half.square().mean() + rows.mean()


def without_gradient(out: Any) -> Tensor:
    """Zeros would let weight decay and momentum move the adapters."""
    of_logits = Unused.apply(out.logits) + Unused.apply(out.logits.tanh())
    return of_logits.sum() + torch.ones((), requires_grad=True)


class Square(torch.autograd.Function):
    """Its argument bypasses `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * dy * ctx.saved_tensors[0]


def by_a_function(out: Any) -> Tensor:
    return Square.apply(out.logits).mean() + out.loss  # type: ignore[no-any-return]


class Doubled(torch.autograd.Function):
    """The output has the input's values and another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * dy


def through_a_function(out: Any) -> Tensor:
    logits = Doubled.apply(out.logits)
    return F.cross_entropy(logits.view(-1, VOCABULARY), batch()["input_ids"].view(-1))  # type: ignore[attr-defined]


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(3.0)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * dy


class InPlaceChained(InPlace):
    """Returns the method's result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.mul_(3.0)
        ctx.mark_dirty(y)
        return y


def in_place_function(out: Any) -> Tensor:
    InPlace.apply(out.logits)
    return out.logits.square().mean() + out.loss  # type: ignore[no-any-return]


def in_place_function_chained(out: Any) -> Tensor:
    return InPlaceChained.apply(out.logits).square().mean() + out.logits.mean()  # type: ignore[no-any-return]


def in_place_function_on_a_view(out: Any) -> Tensor:
    rows = out.logits.view(-1, VOCABULARY)
    InPlace.apply(rows)
    InPlace.apply(out.logits[0])
    return out.logits.square().mean() + rows.softmax(-1)[:, 3].mean()  # type: ignore[no-any-return]


def function_after_writes(out: Any) -> Tensor:
    """Writes by methods, through views made before and after the first read, of kinds that are not lazy."""
    logits, rows = out.logits, out.logits.view(-1, VOCABULARY)
    early = Doubled.apply(rows).square().mean()  # type: ignore[attr-defined]
    logits.mul_(2.0)
    logits.select(0, 1).mul_(0.5)
    logits.transpose(1, 2)[:, 7] *= 3.0
    late = Doubled.apply(logits).square().mean() + Doubled.apply(rows)[2, 3]  # type: ignore[attr-defined]
    InPlace.apply(logits)
    return early + late + rows.square().mean() + logits.softmax(-1)[..., 3].mean()  # type: ignore[no-any-return]


READERS = (
    read_whole, read_by_position, own_loss, masked_loss, weighted_loss, written_into, by_a_function,
    through_a_function, in_place_function, in_place_function_chained, in_place_function_on_a_view,
    function_after_writes, without_gradient,
)  # fmt: skip
FOLLOWED = (own_loss, masked_loss)


@pytest.mark.parametrize("name", ["llama", "gemma2", "head-lora"])
@pytest.mark.parametrize("reader", READERS)
def test_reads_give_logits_and_their_gradient(name: str, reader: Any) -> None:
    stock = MODELS[name]()
    model, report = patched(stock)
    got, want = (step(each, lambda m: reader(m(**batch()))) for each in (model, stock))
    assert_near(without_noise(got, want), without_noise(want, want))
    assert bool(report.losses[0].record.facts.reads) != (reader in FOLLOWED)


def test_copies_and_files_hold_the_values(tmp_path: Path) -> None:
    stock = llama(vocab_size=VOCABULARY)
    model, _ = patched(stock)
    want = stock(**batch()).logits.detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = model(**batch())
            assert torch.equal(copy.deepcopy(out).logits, want)
            torch.save(out.logits, tmp_path / "logits.pt")
            assert torch.equal(torch.load(tmp_path / "logits.pt"), want)
            assert (model(**batch()).logits.numpy() == want.numpy()).all()
            assert str(model(**batch()).logits) == str(want)
            assert all(map(torch.equal, model(**batch()).logits, want))


@torch.no_grad()
def test_index_is_copied_when_used() -> None:
    stock = llama(vocab_size=VOCABULARY)
    model, _ = patched(stock)
    chosen, logits = batch()["input_ids"] > 30, model(**batch()).logits
    some, want = logits[chosen], stock(**batch()).logits[chosen]
    chosen.zero_()
    assert torch.equal(some, want)


def test_logits_are_those_of_the_call() -> None:
    """The state of autocast or the adapter at the time of the read has no effect."""
    stock = MODELS["head-lora"]()
    model, _ = patched(stock)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (each(**batch()) for each in (model, stock))
    assert ours.logits.dtype == theirs.logits.dtype
    pk.patch(stock, (*loss_models.BLOCK, "loss"))  # under autocast a fused head rounds elsewhere than PEFT's
    with torch.autocast("cpu", torch.bfloat16):
        theirs = stock(**batch())
    assert torch.equal(ours.logits, theirs.logits)
    ours, theirs = (each(**batch()) for each in (model, stock))
    with loss_models.disabled(model):
        assert torch.equal(ours.logits, theirs.logits)
        ours = model(**batch())
    with loss_models.disabled(stock):
        theirs = stock(**batch())
    assert type(ours.logits) is LazyLogits and torch.equal(ours.logits, theirs.logits)


def test_a_frozen_fp32_head_is_not_copied_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss op rounds the weight in chunks, with the bits of a weight rounded as a whole."""
    heads: list[Tensor] = []

    def seen(**given: Any) -> Tensor:
        heads.append(given["weight"])
        return linear_cross_entropy(**given)

    monkeypatch.setattr(lazy_scores, "linear_cross_entropy", seen)
    model, _ = patched(MODELS["head-frozen"]())
    steps = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            out = model(**batch())
            loss = out.loss
            loss.backward()
            steps.append((loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)))
            model.zero_grad()
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().bfloat16(), requires_grad=False)
    assert [head.dtype for head in heads] == [torch.float32, torch.bfloat16]
    assert len(steps[0]) > 1 and all(map(torch.equal, *steps))


def test_unsupported_reads_raise() -> None:
    model, _ = patched(llama(vocab_size=VOCABULARY))
    out = model(**batch())
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="logits: expected to be read before the head"):
        out.logits.sum()
    out = model(**batch())
    for method in ("retain_grad", "register_hook"):
        with pytest.raises(RuntimeError, match=f"logits: expected no {method}"):
            getattr(out.logits, method)(*[print][: method == "register_hook"])
    with FlopCounterMode(display=False) as counter:  # its hooks only observe the start of backward
        model(**batch()).loss.backward()
    assert counter.get_total_flops() > 0
    out = model(**batch())
    for allow_unused in (False, True):
        with pytest.raises(
            RuntimeError,
            match=r"logits: expected no torch.autograd.grad with respect to them, for a loss was",
        ):
            torch.autograd.grad(out.loss + out.logits.mean(), [out.logits], allow_unused=allow_unused)
    with pytest.raises(RuntimeError, match=r"expected no torch.autograd.backward with them as inputs"):
        out.loss.backward(inputs=[out.logits])
    with pytest.raises(RuntimeError, match=r"logits: expected no unsqueeze_, which would change their shape"):
        out.logits.unsqueeze_(0)
    with pytest.raises(RuntimeError, match=r"logits: expected no data, which would change their shape or"):
        out.logits.data = torch.zeros(())
    logits = out.logits.detach().requires_grad_()
    (dy,) = torch.autograd.grad(logits.sum(), logits)
    assert bool((dy == 1).all())


def test_the_gradient_of_logits_before_the_loss() -> None:
    """Until a loss was computed without them, logits have a gradient, and the loss then reads them."""
    stock = llama(vocab_size=VOCABULARY)
    model, report = patched(stock)
    found = []
    for each in (model, stock):
        out = each(input_ids=batch()["input_ids"])
        rows, seen = out.logits.float().view(-1, VOCABULARY), []
        out.logits.retain_grad()
        out.logits.register_hook(seen.append)
        loss = F.cross_entropy(rows, batch()["input_ids"].view(-1))
        (grad,) = torch.autograd.grad(loss, [out.logits], retain_graph=True)
        loss.backward()
        found.append({"grad": grad, "kept": out.logits.grad, "seen": seen[-1], **gradients(each)})
    assert_near(*found)
    assert report.losses[0].record.facts.reads == {"cross_entropy": 1}, report


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: logits.softmax(-1).square().mean() + logits.logsumexp(-1).mean(),
        lambda logits: F.kl_div(logits.log_softmax(-1), torch.full((3, 12, VOCABULARY), 1 / VOCABULARY)),
    ],
    ids=["softmax", "kl_div"],
)
def test_a_read_computes_the_head_once_for_both_passes(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = patched(MODELS["head-frozen"]())
    stock, calls = recipe.Head.output, 0

    def counted(head: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return stock(head)

    monkeypatch.setattr(recipe.Head, "output", counted)
    logits = model(input_ids=batch()["input_ids"]).logits
    loss(logits).backward()
    assert calls == 1


def test_logits_may_be_a_leaf() -> None:
    model, _ = patched(llama(vocab_size=VOCABULARY))
    for context in (torch.no_grad(), torch.inference_mode(False)):
        with context:
            model.requires_grad_(False)
            logits = model(**batch()).logits
        logits.requires_grad_()
        logits.square().sum().backward()
        assert torch.equal(logits.grad, 2 * logits.detach())


@pytest.mark.parametrize("name", ["head-frozen", "llama", "gemma2"])
def test_saved_bytes(name: str) -> None:
    """No logits, unless they are read; materialised logits are freed with the outputs."""
    stock = MODELS[name]()
    model, _ = patched(stock)
    given = batch(rows=8, length=50)
    logits = 8 * 50 * VOCABULARY * 4

    def saved(model: Any) -> int:
        kept = [*model.parameters(), *model.buffers()]
        return testing.saved_bytes(lambda: model(**given).loss, kept)

    per_row = 8 * 50 * (2 * 64 * 4 + 32)  # hidden states twice, and a few scalars
    assert saved(stock) - saved(model) > (logits if name != "gemma2" else 3 * logits) - per_row
    hidden: list[Any] = []
    norm = next(m for n, m in model.named_modules() if n.endswith("model.norm"))
    handle = norm.register_forward_hook(lambda *args: hidden.append(weakref.ref(args[2])))
    gc.disable()
    try:
        readers: tuple[Any, ...] = (
            lambda out: out.loss,
            lambda out: out.logits.sum(),
            lambda out: out.logits.log_softmax(-1).exp().sum(),
            lambda out: (
                out.logits.gather(-1, given["input_ids"][..., None]).sum() + out.logits.detach().mean()
            ),
        )
        for read in readers:
            read(model(**given)).backward()
        assert [each() for each in hidden] == [None] * len(readers)
    finally:
        gc.enable()
        handle.remove()
