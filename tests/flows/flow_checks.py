"""Checks that a patched model ran fused and gives stock's values. Shared by the flow tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import peft_models
import rounding
import torch
from peft.tuners import lora
from rounding import ONE_MODEL, ONE_STEP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import testing

FUSED_OPS = ("lora_linear", "multi_lora_linear", "gated_mlp")


class Calls(TorchDispatchMode):
    """Counts calls of this package's ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace.startswith("peft_kernels"):
            self.counts[name.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> int:
        """How many calls computed base and adapters in one op."""
        return sum(self.counts[name] for name in FUSED_OPS)


def lora_layers(model: nn.Module) -> set[str]:
    """Names of the LoRA layers over linear layers, which can be fused."""
    others = (lora.Embedding, lora.layer._ConvNd, lora.layer.ParamWrapper, lora.layer.MultiheadAttention)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, lora.LoraLayer) and not isinstance(module, others)
    }


def fused_layers(report: Any) -> set[str]:
    return {layer.name for layer in report.layers if layer.fused}


def fused_blocks(report: Any, kind: str = "gated MLP") -> set[str]:
    """Names of fused blocks of a kind, without the name of their class."""
    return {block.name for block in report.blocks if block.fused and block.kind.rpartition(" ")[0] == kind}


def layer_fallbacks(report: Any) -> Counter[str]:
    """Calls of layers that used the original forward, by reason."""
    return sum((Counter(entry.fallbacks) for entry in report.layers), Counter())


def block_fallbacks(report: Any) -> Counter[str]:
    """Calls of blocks that used the original forward, by reason. An attention function that sdpa serves is
    none."""
    counts = sum((Counter(entry.fallbacks) for entry in report.blocks), Counter())
    return Counter({why: n for why, n in counts.items() if not why.startswith("attention by sdpa")})


def fallbacks(report: Any) -> Counter[str]:
    return layer_fallbacks(report) + block_fallbacks(report)


def assert_fused(model: nn.Module, report: Any, blocks: int | None = None) -> None:
    """Every LoRA layer and `blocks` gated MLPs are fused, and no call used the original forward."""
    layers = lora_layers(model)
    assert layers and not layers - fused_layers(report), report.details()
    if blocks is not None:
        assert len(fused_blocks(report)) == blocks, report.details()
    assert not fallbacks(report), str(report)


def step(model: nn.Module, loss: Callable[[Any], Tensor], seed: int = 5) -> dict[str, Tensor]:
    """Loss and gradients of one step, with the random seed `seed`."""
    return peft_models.step(model, lambda: loss(model), seed)


def language_loss(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


Results = dict[str, Tensor]


def assert_same_numbers(sample: Callable[[int], tuple[Results, Results, Results]], bound: float) -> None:
    """Applies the numbers policy to all results of `sample(i)` together: of the patched model, stock and
    fp64 for input i, which is another when the test runs again.

    Each result must be within `bound` of the truth on both sides, since a wrong peer would widen the policy.
    """
    got, stock, truth = sample(rounding.run_number())
    for what, side in (("patched", got), ("stock", stock)):
        assert side.keys() == truth.keys() and side
        for name, true in truth.items():
            error, size = (side[name].double() - true).norm().item(), true.double().norm().item()
            assert error <= bound * max(size, 1e-6), f"{what} {name}: error {error:.3g} of {size:.3g}"
    rounding.assert_close_together(got, stock, truth)


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = ONE_MODEL) -> None:
    assert got.keys() == want.keys() and got, f"not in both: {sorted(got.keys() ^ want.keys())}"
    for name in want:
        error = testing.relative_error(got[name], want[name])
        assert error < bound, f"{name}: relative error {error:.3g}"


def assert_curve(got: list[float], stock: list[float], truth: list[float], bound: float) -> None:
    """A loss curve within `bound` of stock's, and at most twice as far from the truth."""
    assert len(got) == len(stock) == len(truth) > 1
    exact = torch.tensor(truth).double()
    ours, theirs = (testing.relative_error(torch.tensor(curve), exact) for curve in (got, stock))
    apart = max(abs(a - b) / abs(b) for a, b in zip(got, stock, strict=True))
    assert apart < bound, f"{apart:.3g} from stock: {got} {stock}"
    assert ours <= 2 * theirs + ONE_STEP, f"{ours:.3g} from the truth, stock {theirs:.3g}"
    assert abs(stock[-1] - stock[0]) > 3 * bound * abs(stock[0]), f"these curves could be anything's: {stock}"


def train(
    model: nn.Module, loss: Callable[[Any, int], Tensor], steps: int = 4, lr: float = 1e-2
) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        value = loss(model, i)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
