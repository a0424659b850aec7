"""A mixture of experts of Qwen3-30B-A3B's shape: forward, and training of adapters on the experts' weights.

All contenders have the same (dequantised) weights and the same routing. The truth is computed in fp64 expert
by expert, as the weights of all would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
import testing

from ..lib import correctness, layers, report
from ..lib.cases import DTYPES
from ..lib.harness import Build, Case, Contenders, Entry, contenders
from ..lib.layers import ALPHA, RANK, SCALING
from ..lib.report import OURS, missing

MOE, MOE_LORA = "moe", "moe-lora"
TITLES = {
    MOE: "mixture of 128 experts of 2048 by 768, 8 for each token, forward without grad",
    MOE_LORA: f"the same with LoRA r={RANK} on both weights of all experts, forward + backward",
}
TOKENS = (1, 16, 256, 1024)
GROUPED, EAGER, DEQUANTISE = "dense grouped_mm", "dense eager", "dequantise, then multiply"
PEFT_GROUPED, PEFT_EAGER, PEFT_NF4 = "PEFT on grouped_mm", "PEFT on eager", "PEFT on NF4, not patched"
GOAL = 0.3
"""Bytes of the packed model / in bf16, at most."""
SECONDS = {MOE: (10.0, 1.0), MOE_LORA: (40.0, 2.0)}
"""Fixed, and per 1e9 weights times rows."""


@dataclass(frozen=True)
class Sizes:
    hidden: int = 2048
    inner: int = 768
    experts: int = 128
    top_k: int = 8

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of the weights: (experts, out, in)."""
        return {
            "gate_up_proj": (self.experts, 2 * self.inner, self.hidden),
            "down_proj": (self.experts, self.hidden, self.inner),
        }

    def config(self, **options: Any) -> Any:
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            hidden_size=self.hidden,
            moe_intermediate_size=self.inner,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            **options,
        )


QWEN3 = Sizes()
REST: dict[str, Any] = {
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
"""The rest of the whole model's configuration."""


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, index, weights)
        return y


class Dequantised(nn.Module):
    """Packed weights, dequantised per expert in the forward, and torch's GEMM."""

    def __init__(self, weights: Mapping[str, pk.NF4Weight], dtype: torch.dtype) -> None:
        super().__init__()
        self.weights, self.dtype = weights, dtype

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in index.unique().tolist():
            row, place = torch.where(index == e)
            up, down = (
                self.weights[name][e].dequantize(self.dtype) for name in ("gate_up_proj", "down_proj")
            )
            left, right = F.linear(x[row], up).chunk(2, dim=-1)
            part = F.linear(F.silu(left) * right, down)
            y.index_add_(0, row, part * weights[row, place, None])
        return y


class Mixtures(layers.LayerCache):
    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype

    @cached_property
    def packed(self) -> dict[str, pk.NF4Weight]:
        found = {}
        for name, shape in self.sizes.shapes.items():
            original = torch.empty(shape, dtype=self.dtype)
            for e, expert in enumerate(original):
                expert.copy_(testing.tensor(*shape[1:], seed=e, scale=shape[2] ** -0.5))
            found[name] = pk.NF4Weight.quantize(original)
        return found

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        return {name: weight.dequantize(self.dtype) for name, weight in self.packed.items()}

    @cached_property
    def adapters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (experts, r, in) and B (experts, out, r) by parameter, in fp32."""
        found = {}
        for seed, (name, (experts, out, width)) in enumerate(self.sizes.shapes.items()):
            a = testing.tensor(experts, RANK, width, seed=20 + seed, scale=width**-0.5)
            b = testing.tensor(experts, out, RANK, seed=30 + seed, scale=0.5 * RANK**-0.5 / SCALING)
            found[name] = a, b
        return found

    def experts(self, base: str) -> nn.Module:
        """Experts on packed weights ("nf4"), or on dense ones in a named implementation."""
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = self.sizes.config()
        config._experts_implementation = "grouped_mm" if base == "nf4" else base
        with torch.device("meta"):
            module: nn.Module = Qwen3MoeExperts(config)
        for name, weight in (self.packed if base == "nf4" else self.dense).items():
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        if base == "nf4":
            from peft_kernels.nf4.experts_packing import adopt

            adopt(module)
        return module

    def adapted(self, base: str, patch: bool) -> Any:
        """A PEFT model over the block, with adapters on both weights."""
        import peft

        names = [f"experts.{name}" for name in self.sizes.shapes]
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
        model = peft.get_peft_model(Block(self.experts(base)), config)
        with torch.no_grad():
            for layer in layers.lora_layers(model).values():
                a, b = self.adapters[layer.parameter_name]
                layer.lora_A["default"].weight.copy_(a.flatten(0, 1))
                layer.lora_B["default"].weight.copy_(b.permute(1, 2, 0).flatten(1))
        if patch:
            layers.patched(model, 1)
        return model

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, the experts of each token and their weights, and the gradient of the output."""
        x, dy = (testing.tensor(tokens, self.sizes.hidden, dtype=self.dtype, seed=seed) for seed in (4, 5))
        scores = testing.tensor(tokens, self.sizes.experts, seed=6).softmax(-1)
        weights, index = scores.topk(self.sizes.top_k)
        return x, index, (weights / weights.sum(-1, keepdim=True)).to(self.dtype), dy

    def truth(self, tokens: int, training: bool) -> dict[str, Tensor]:
        """y, and in training the gradients of x and of all adapters, by parameter."""
        x, index, weights, dy = (t.double() if t.is_floating_point() else t for t in self.inputs(tokens))
        y = torch.zeros_like(x)
        found = {"y": y}
        if training:
            found["dx"] = torch.zeros_like(x)
            for name, both in self.adapters.items():
                for kind, adapter in zip(("da", "db"), both, strict=True):
                    found[f"{kind} {name}"] = torch.zeros_like(adapter, dtype=torch.float64)
        for e in index.unique().tolist():
            row, place = torch.where(index == e)
            scale = weights[row, place, None]
            # One expert's graph at a time.
            leaves = {"dx": x[row]}
            for name, (a, b) in self.adapters.items():
                leaves |= {f"da {name}": a[e].double(), f"db {name}": b[e].double()}
            for leaf in leaves.values():
                leaf.requires_grad_(training)
            h = self._lora_linear("gate_up_proj", e, leaves["dx"], leaves, training)
            gate_, up = h.chunk(2, dim=-1)
            part = scale * self._lora_linear("down_proj", e, F.silu(gate_) * up, leaves, training)
            y.index_add_(0, row, part.detach())
            if training:
                grads = torch.autograd.grad(part, list(leaves.values()), dy[row])
                for name, grad in zip(leaves, grads, strict=True):
                    if name == "dx":
                        found[name].index_add_(0, row, grad)
                    else:
                        found[name][e] = grad
        return found

    def _lora_linear(self, name: str, e: int, x: Tensor, leaves: Mapping[str, Tensor], lora: bool) -> Tensor:
        y = F.linear(x, self.packed[name][e].dequantize(torch.float32).double())
        if lora:
            y = y + SCALING * F.linear(F.linear(x, leaves[f"da {name}"]), leaves[f"db {name}"])
        return y

    def training_call(self, model: Any, tokens: int) -> Callable[[], dict[str, Tensor]]:
        x, index, weights, dy = self.inputs(tokens)
        inputs = {"dx": x.requires_grad_()}
        for layer in layers.lora_layers(model).values():
            inputs[f"da {layer.parameter_name}"] = layer.lora_A["default"].weight
            inputs[f"db {layer.parameter_name}"] = layer.lora_B["default"].weight
        return layers.differentiated(partial(model, x, index, weights), inputs, dy)

    def in_peft_layout(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts gradients of adapters to the layout of PEFT's parameters."""
        turned = {}
        for name, tensor in found.items():
            if name.startswith("da "):
                tensor = tensor.flatten(0, 1)
            elif name.startswith("db "):
                tensor = tensor.permute(1, 2, 0).flatten(1)
            turned[name] = tensor
        return turned


def standard(dtype: str, sizes: Sizes = QWEN3) -> list[Any]:
    found: list[Any] = [Footprint(sizes)]
    found += [forward(tokens, dtype, sizes) for tokens in TOKENS]
    return [*found, *(training(tokens, dtype, sizes) for tokens in TOKENS)]


def forward(tokens: int, dtype: str, sizes: Sizes = QWEN3) -> Case:
    """Packed experts compared with dense ones in transformers' implementations, and with dequantised ones."""

    def build() -> Contenders:
        mixtures = layers.shared(Mixtures, MOE, sizes, DTYPES[dtype])
        x, index, weights, _ = mixtures.inputs(tokens)

        def call(module: Any) -> Callable[[], dict[str, Tensor]]:
            return layers.forward_call(lambda x: module(x, index, weights), x)

        plain = call(mixtures.get(EAGER, lambda: [mixtures.experts("eager")])[0])()
        expected = correctness.Expected(plain, mixtures.truth(tokens, training=False))
        entries = [
            Entry(OURS, lambda: [mixtures.experts("nf4")], expected.strict),
            Entry(GROUPED, lambda: [mixtures.experts("grouped_mm")], expected.sane),
            Entry(EAGER, lambda: [mixtures.experts("eager")], expected.sane),
            Entry(DEQUANTISE, lambda: [Dequantised(mixtures.packed, mixtures.dtype)], expected.sane),
        ]
        return contenders(entries, call, mixtures)

    return _case(MOE, tokens, dtype, sizes, build)


def training(tokens: int, dtype: str, sizes: Sizes = QWEN3) -> Case:
    """Patched adapters on packed experts compared with PEFT's on dense ones and on packed ones."""

    def build() -> Contenders:
        mixtures = layers.shared(Mixtures, MOE_LORA, sizes, DTYPES[dtype])

        def call(model: Any) -> Callable[[], dict[str, Tensor]]:
            return mixtures.training_call(model, tokens)

        plain = call(mixtures.get(PEFT_GROUPED, lambda: [mixtures.adapted("grouped_mm", patch=False)])[0])()
        truth = mixtures.in_peft_layout(mixtures.truth(tokens, training=True))
        expected = correctness.Expected(plain, truth)
        entries = [
            Entry(name, lambda base=base, patch=patch: [mixtures.adapted(base, patch)], verify)
            for name, base, patch, verify in (
                (OURS, "nf4", True, expected.strict),
                (PEFT_GROUPED, "grouped_mm", False, expected.sane),
                (PEFT_EAGER, "eager", False, expected.sane),
                (PEFT_NF4, "nf4", False, expected.sane),
            )
        ]
        return contenders(entries, call, mixtures)

    return _case(MOE_LORA, tokens, dtype, sizes, build)


def _case(group: str, tokens: int, dtype: str, sizes: Sizes, build: Build) -> Case:
    at_once, by_rows = SECONDS[group]
    weights = 3 * sizes.hidden * sizes.inner
    seconds = at_once + by_rows * min(tokens * sizes.top_k, 8 * sizes.experts) * weights / 1e9
    title, needs = TITLES[group], "transformers" if group == MOE else "peft transformers"
    shape = sizes.hidden, sizes.inner
    return Case(group, *shape, tokens, dtype, build, title=title, seconds=seconds, needs=needs)


@dataclass(frozen=True)
class Footprint:
    """Bytes of the whole model in bf16, and with linear layers and experts packed, computed from shapes."""

    sizes: Sizes = QWEN3
    seconds = 2.0
    name = "moe-bytes"

    def run(self, timing: report.Timing = report.ONCE, progress: report.Progress = report.silent) -> Bytes:
        outcome = Bytes(self)
        if reason := missing("transformers"):
            outcome.absent[OURS] = reason
            return outcome
        from transformers import Qwen3MoeForCausalLM

        progress("count")
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(self.sizes.config(**REST))
        outcome.dense = 2 * sum(parameter.numel() for parameter in model.parameters())
        outcome.packed = outcome.dense
        for name, module in model.named_modules():
            packs = isinstance(module, nn.Linear) and name != "lm_head"
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3 or (packs and parameter.dim() == 2):
                    count = prod(parameter.shape[:-2])
                    outcome.packed += count * packed_bytes(*parameter.shape[-2:]) - 2 * parameter.numel()
        return outcome


@lru_cache
def packed_bytes(out_features: int, in_features: int) -> int:
    """Of one weight; experts are quantised one by one."""
    return pk.NF4Weight.quantize(torch.ones(out_features, in_features, dtype=torch.bfloat16)).nbytes


@dataclass
class Bytes(report.Outcome):
    dense: int = 0
    packed: int = 0

    @property
    def ratio(self) -> float | None:
        return self.packed / self.dense if self.dense else None

    def goals(self) -> Iterator[tuple[str, bool]]:
        if self.ratio is not None:
            yield f"packed / bf16: at most {GOAL:.0%}, measured {self.ratio:.1%}", self.ratio <= GOAL

    def parts(self) -> list[str]:
        return [f"bf16 {self.dense / 1e9:.2f} GB, packed {self.packed / 1e9:.2f} GB"] if self.dense else []

    def data(self) -> dict[str, Any]:
        return {"group": "moe-bytes", "dense": self.dense, "packed": self.packed, "ratio": self.ratio}

    @classmethod
    def tables(cls, outcomes: Sequence[Bytes], unit: str) -> Iterator[tuple[str, str]]:
        rows = [
            [f"{one.dense / 1e9:,.2f}", f"{one.packed / 1e9:,.2f}", f"{one.ratio:.1%}"]
            for one in outcomes
            if one.ratio is not None
        ]
        yield "Qwen3-30B-A3B, GB", report.table(["bf16", "packed", "packed / bf16"], rows)
