"""The cases of run.py that are parts of a training step: norms, rotary embedding, the loss of a head, and a
whole decoder layer with LoRA on NF4 weights.

Peers are what transformers' models compute, in plain torch; the head's also Liger's kernel. Truth is fp64
where memory bounds a part, and fp32, far more exact than bf16, where GEMMs do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk

from ..lib import correctness, layers
from ..lib.harness import Case, Contenders, Entry, compared, contenders, copies
from ..lib.layers import BNB
from ..lib.report import OURS
from ..ops import losses
from . import step_estimate
from .decoder_layer import EPS, LLAMA, Layer, Sizes, add_norm, angles, norm, rotary
from .device_weights import DTYPE, normal
from .step_estimate import Cost, Ours

TINY = Sizes(2, 20, 192, 320, 6, 2, 32, 300, 1)
TORCH, ONE_OP, COMPILED = "torch", "F.rms_norm", "torch, compiled"
LIGER = "Liger"
ON_BNB, ON_DENSE = "torch on bnb", "torch on dense"
LOSS_ROWS = 512
"""Rows whose logits the truth has in memory at a time."""

Function = Callable[..., Any]
Limit = Callable[[Ours], Cost]


@dataclass(frozen=True)
class PartCase(Case):
    sizes: Sizes = LLAMA
    limit: Limit = lambda model: Cost()
    """What ours needs at least."""


def call(function: Function, inputs: Mapping[str, Tensor], dy: Sequence[Tensor]) -> Callable[[], Any]:
    """A forward without grad, or, given gradients of its results, forward and backward."""
    needing = {f"d{name}": t for name, t in inputs.items() if t.requires_grad}

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(bool(dy)):
            y = function(*inputs.values())
        y = y if isinstance(y, tuple) else (y,)
        found = {f"y{i}": t.detach() for i, t in enumerate(y)}
        if dy:
            found |= zip(needing, torch.autograd.grad(y, list(needing.values()), dy), strict=True)
        return found

    return run


def token_losses(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), labels, ignore_index=losses.IGNORED, reduction="none")


def liger(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mean of the losses: Liger has no gradients of others."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(x, weight, labels, ignore_index=losses.IGNORED)
    return loss


class Parts:
    """The cases for one device. `tiny`: small shapes for checking, without contenders that are compiled."""

    def __init__(self, device: str, tiny: bool, cache: int, release: Callable[[], None]) -> None:
        self.device, self.tiny, self.cache, self.release = device, tiny, cache, release
        self.sizes = TINY if tiny else LLAMA

    def cases(self) -> list[Case]:
        """The most important first: time may run out."""
        hidden, vocabulary = self.sizes.hidden, self.sizes.vocabulary
        heads = self.sizes.heads * self.sizes.features, self.sizes.key_heads * self.sizes.features
        norms, head = (hidden, hidden), (vocabulary, hidden)
        both = "forward + backward"
        return [
            self.case("layer", (self.sizes.intermediate, hidden), self.layer,
                      lambda m: _both(step_estimate.layer(m)),
                      f"a decoder layer with LoRA on NF4, {both}", 15.0),
            self.case("loss", head, partial(self.loss, packed=False),
                      lambda m: _both(m.loss()), f"loss of a frozen head, {both}", 10.0),
            self.case("norm", norms, partial(self.norm, "", False), lambda m: m.norm()[0],
                      "RMS norm, forward without grad"),
            self.case("add-norm", norms, partial(self.norm, "residual", False), lambda m: m.add_norm()[0],
                      "residual sum and its RMS norm, forward without grad"),
            self.case("add-norm-train", norms, partial(self.norm, "residual", True),
                      lambda m: _both(m.add_norm()), f"residual sum and its RMS norm, frozen, {both}"),
            self.case("rotary", heads, partial(self.rotary, False), lambda m: m.rotary()[0],
                      "rotary embedding of queries and keys, forward without grad"),
            self.case("rotary-train", heads, partial(self.rotary, True), lambda m: _both(m.rotary()),
                      f"rotary embedding of queries and keys, {both}"),
            self.case("norm-train", norms, partial(self.norm, "", True), lambda m: _both(m.norm()),
                      f"RMS norm, frozen, {both}"),
            self.case("norm-train-weight", norms, partial(self.norm, "weight", True),
                      lambda m: _both(m.trained_norm()), f"RMS norm, trained, {both}"),
            self.case("loss-nf4", head, partial(self.loss, packed=True),
                      lambda m: _both(m.loss(packed=True)), f"loss of a frozen head in NF4, {both}", 10.0),
        ]  # fmt: skip

    def case(
        self, part: str, shape: tuple[int, int], build: Callable[[], Contenders], limit: Limit, title: str,
        seconds: float = 2.0,
    ) -> Case:  # fmt: skip
        def released() -> Contenders:
            self.release()
            return build()

        sizes = self.sizes
        return PartCase(
            f"step-{part}", *shape, sizes.tokens, DTYPE, released, sizes.sequences, title=title,
            seconds=1.0 if self.tiny else seconds, sizes=sizes, limit=limit,
        )  # fmt: skip

    def normal(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return normal(self.device, *shape, seed=seed, scale=scale)

    def memory_bound(
        self,
        functions: Mapping[str, Function],
        given: Mapping[str, Tensor],
        trained: Sequence[str],
        dy: Sequence[Tensor],
    ) -> Contenders:
        """Contenders on copies of their inputs. The function of TORCH defines the result."""
        count = (
            2 if self.tiny else copies(sum(t.nbytes for t in given.values()), len(functions) + 1, self.cache)
        )
        if not self.tiny:
            functions = {**functions, COMPILED: torch.compile(functions[TORCH], dynamic=False)}

        def leaves(wide: bool = False) -> dict[str, Tensor]:
            made = {name: t.double() if wide else t.clone() for name, t in given.items()}
            return {name: t.requires_grad_(name in trained) for name, t in made.items()}

        truth = call(functions[TORCH], leaves(wide=True), [t.double() for t in dy])()
        wanted = correctness.Expected(call(functions[TORCH], leaves(), dy)(), truth)

        def entry(name: str, function: Function) -> Entry:
            verify = wanted.strict if name == OURS else wanted.sane
            return Entry(name, lambda: [call(function, leaves(), dy) for _ in range(count)], verify)

        return contenders([entry(name, function) for name, function in functions.items()])

    def norm(self, extra: str, trains: bool) -> Contenders:
        """`extra`: a "residual" that is added, or "weight" if that is trained."""
        shape = self.sizes.states
        given = {"x": self.normal(*shape, seed=1)}
        dy = [self.normal(*shape, seed=3)]
        functions: dict[str, Function]
        weight = 1 + self.normal(shape[-1], seed=4, scale=0.1)
        if extra == "residual":
            given["residual"] = self.normal(*shape, seed=2)
            dy.append(self.normal(*shape, seed=5))

            def one_op(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
                total = x + residual
                return F.rms_norm(total, weight.shape, weight, EPS), total

            functions = {OURS: partial(pk.add_rms_norm, eps=EPS), TORCH: add_norm, ONE_OP: one_op}
        else:

            def one_op_alone(x: Tensor, weight: Tensor) -> Tensor:
                return F.rms_norm(x, weight.shape, weight, EPS)

            functions = {OURS: partial(pk.rms_norm, eps=EPS), TORCH: norm, ONE_OP: one_op_alone}
        trained = [name for name in (*given, *["weight"] * (extra == "weight")) if trains]
        return self.memory_bound(functions, {**given, "weight": weight}, trained, dy if trains else [])

    def rotary(self, trains: bool) -> Contenders:
        shapes = self.sizes.queries, self.sizes.keys
        q, k = (self.normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
        given = dict(zip(("q", "k", "cos", "sin"), (q, k, *angles(self.sizes, self.device)), strict=True))
        dy = [self.normal(*shape, seed=seed) for seed, shape in enumerate(shapes, 2)]
        functions = {OURS: pk.rotary, TORCH: rotary}
        return self.memory_bound(functions, given, ["q", "k"] if trains else [], dy if trains else [])

    def loss(self, packed: bool) -> Contenders:
        """The mean over the tokens with a label."""
        vocabulary, hidden = self.sizes.vocabulary, self.sizes.hidden
        x = self.normal(self.sizes.tokens, hidden, seed=1)
        labels = losses.labels_of(self.sizes.tokens, vocabulary).to(self.device)
        has_label = labels != losses.IGNORED
        share = has_label / has_label.sum()
        dense = self.normal(vocabulary, hidden, seed=2, scale=2 * hidden**-0.5)
        weight = pk.NF4Weight.quantize(dense) if packed else dense
        exact = layers.dequantized(weight) if isinstance(weight, pk.NF4Weight) else dense.float()
        dense = exact.to(dense.dtype)

        def made(
            loss: Function, weight: Any, x: Tensor = x, labels: Tensor = labels, dy: Tensor = share
        ) -> Callable[[], Any]:
            leaf = x.detach().requires_grad_()
            return call(partial(loss, weight=weight, labels=labels), {"x": leaf}, [dy])

        def in_parts(weight: Tensor) -> dict[str, Tensor]:
            rows = zip(*(t.split(LOSS_ROWS) for t in (x.to(weight.dtype), labels, share)), strict=True)
            found = [made(token_losses, weight, *part)() for part in rows]
            return {name: torch.cat([one[name] for one in found]) for name in found[0]}

        wanted = correctness.Expected(in_parts(dense), in_parts(exact))
        del exact
        ours = partial(pk.linear_cross_entropy, reduction="none")
        makes = {OURS: partial(made, ours, weight), losses.TORCH: partial(made, token_losses, dense)}
        found = compared(wanted, makes)
        if not packed:
            mean = {"y0": wanted.truth["y0"] @ share, "dx": wanted.truth["dx"]}
            by_liger = partial(made, liger, dense, dy=share.new_ones(()))
            found += compared(correctness.Expected(mean, mean), {LIGER: by_liger}, "liger_kernel")
        return found

    def layer(self) -> Contenders:
        layer = Layer(self.sizes, self.device)
        x, dy = (self.normal(*self.sizes.states, seed=seed) for seed in (1, 2))
        tables = angles(self.sizes, self.device)

        def made(forward: Function, dtype: torch.dtype = x.dtype) -> Callable[[], Any]:
            inputs = {"x": x.to(dtype), **layer.adapters(dtype)}
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            return call(partial(forward, *(t.to(dtype) for t in tables)), leaves, [dy.to(dtype)])

        def dense(dtype: torch.dtype) -> Callable[[], Any]:
            bases = [partial(F.linear, weight=weights.exact.to(dtype)) for weights in layer.weights]
            return made(partial(layer.stock, bases), dtype)

        def on_bnb() -> Callable[[], Any]:
            bases = [layers.bnb_linears(weights, 1, "train")[0] for weights in layer.weights]
            return made(partial(layer.stock, bases))

        on_dense = partial(dense, x.dtype)
        wanted = correctness.Expected(on_dense()(), dense(torch.float32)())
        return [
            *compared(wanted, {OURS: partial(made, layer.ours)}),
            *compared(wanted, {ON_BNB: on_bnb}, BNB),
            *compared(wanted, {ON_DENSE: on_dense}),
        ]


def _both(costs: tuple[Cost, Cost]) -> Cost:
    return costs[0] + costs[1]
