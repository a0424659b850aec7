"""The layers that take part, in as many copies as the rotation asks for, all holding the same numbers."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing

RANK, ALPHA = 16, 32
SCALING = ALPHA / RANK
BNB = "bitsandbytes"


class Kept:
    """Layers that consecutive cases share."""

    def __init__(self) -> None:
        self._kept: dict[str, Sequence[Any]] = {}

    def keep(self, name: str, make: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """The layers of one contender, made when they are first asked for: cases differ in rows only."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


class Weights(Kept):
    """The base weights of one shape and dtype."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype

    @cached_property
    def original(self) -> Tensor:
        """What was quantised: (out, in), of the size that weights have at the start of training."""
        scale = self.in_features**-0.5
        return testing.tensor(self.out_features, self.in_features, dtype=self.dtype, seed=1, scale=scale)

    @cached_property
    def nf4(self) -> pk.NF4Weight:
        with pk.use_backend("reference"):
            return pk.NF4Weight.quantize(self.original)

    @cached_property
    def exact(self) -> Tensor:
        """The dequantised weight in fp32: code * scale, as the reference unpacks it."""
        return dequantized(self.nf4)

    @cached_property
    def rounded(self) -> Tensor:
        """The dequantised weight in the dtype of the case: the base of the dense layers."""
        return self.exact.to(self.dtype)

    @cached_property
    def lora_a(self) -> Tensor:
        return testing.tensor(RANK, self.in_features, seed=2, scale=self.in_features**-0.5)

    @cached_property
    def lora_b(self) -> Tensor:
        return testing.tensor(self.out_features, RANK, seed=3, scale=RANK**-0.5)

    def x(self, m: int) -> Tensor:
        return testing.tensor(m, self.in_features, dtype=self.dtype, seed=4)

    def dy(self, m: int) -> Tensor:
        return testing.tensor(m, self.out_features, dtype=self.dtype, seed=5)


def dequantized(weight: pk.NF4Weight) -> Tensor:
    """In fp32: code * scale, as the reference unpacks it."""
    assert weight.packed is not None and weight.absmax is not None
    parts = (weight.packed, weight.absmax, weight.absmax2, weight.offset, weight.blocksize)
    exact: Tensor = testing.reference_op("dequantize_nf4")(*parts, weight.shape, torch.float32)
    return exact


def dense_linears(weights: Weights, count: int) -> list[nn.Linear]:
    return [dense_linear(weights.rounded.clone()) for _ in range(count)]


def nf4_copies(weights: Weights, count: int) -> list[pk.NF4Weight]:
    return [cast(pk.NF4Weight, weights.nf4.clone()) for _ in range(count)]


def nf4_linears(weights: Weights, count: int) -> list[nn.Linear]:
    return [pk.nn.NF4Linear(weight) for weight in nf4_copies(weights, count)]


def bitsandbytes() -> Any:
    """The library, without its complaint about an optional download: the header tells whether it has it."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes as bnb

    return bnb


def bnb_linears(weights: Weights, count: int, mode: str) -> list[Any]:
    """Linear4bit in mode "train" or "eval"; the latter repacks its weight in the first call, done here."""
    first = linear4bit(weights.original)
    layers = [copy.deepcopy(first).train(mode == "train") for _ in range(count)]
    with torch.no_grad():
        for layer in layers:
            layer(weights.x(1))
    return layers


def linear4bit(original: Tensor) -> Any:
    """bitsandbytes' layer over its own quantisation of a weight."""
    bnb = bitsandbytes()
    layer = _linear(bnb.nn.Linear4bit, *original.shape, compute_dtype=original.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        original.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return layer.to(original.device)  # quantises


def adapted(model: nn.Module, targets: Any, count: int, names: Sequence[str], **options: Any) -> Any:
    """The PEFT model with an adapter by each of the names on `count` layers, the first of them active.

    PEFT's defaults (fp32 adapters), but for `options` of its LoraConfig.
    """
    if importlib.util.find_spec(BNB) is not None:
        bitsandbytes()  # PEFT imports it
    import peft

    # PEFT asks the model, as transformers builds it, whether to wrap Linear4bit.
    in_4bit: Any = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    model.is_loaded_in_4bit = in_4bit
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options)
    wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    if (found := len(lora_layers(wrapped))) != count:
        raise RuntimeError(f"PEFT wrapped {found} of {count} layers (in 4 bits: {in_4bit})")
    return wrapped


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by name."""
    import peft

    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def peft_loras(
    bases: Sequence[nn.Module], weights: Weights, patch: bool, **options: Any
) -> Sequence[nn.Module]:
    """PEFT's LoRA layers around the bases; with `patch`, on our kernels."""
    wrapped = adapted(nn.Sequential(*bases), r"\d+", len(bases), ("default",), **options)
    layers = list(lora_layers(wrapped).values())
    with torch.no_grad():
        for layer in layers:
            layer.lora_A["default"].weight.copy_(weights.lora_a)
            layer.lora_B["default"].weight.copy_(weights.lora_b)
    if patch:
        report = pk.patch(wrapped)
        if report.original or len(report.fused) < len(bases):
            raise RuntimeError(f"pk.patch: {report}")
    return layers


def own_loras(bases: Sequence[nn.Linear], weights: Weights) -> list[nn.Module]:
    """Our own LoRA modules, for when PEFT is not installed. They make the same call."""
    layers: list[nn.Module] = []
    for base in bases:
        layer = pk.nn.LoRALinear(base, RANK, ALPHA)
        with torch.no_grad():
            layer.lora_A.copy_(weights.lora_a)
            layer.lora_B.copy_(weights.lora_b)
        layers.append(layer)
    return layers


def adapters(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B of a LoRA layer, PEFT's or ours."""
    if isinstance(layer, pk.nn.LoRALinear):
        return layer.lora_A, layer.lora_B
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def nf4_parts(weight: pk.NF4Weight) -> dict[str, Tensor]:
    """The bits of a quantised weight, by name."""
    named = {name: getattr(weight, name) for name in ("packed", "absmax", "absmax2", "offset")}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def bnb_parts(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """The same of what bitsandbytes' quantize_4bit returns."""
    return {"packed": packed, "absmax": state.absmax, "absmax2": state.state2.absmax, "offset": state.offset}


def forward_call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], dict[str, Tensor]]:
    """The layer without grad."""

    def call() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": layer(x)}

    return call


def training_call(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Forward and backward: what a layer inside a model does in a training step."""
    inputs = {"dx": x}
    if hasattr(layer, "lora_A"):
        inputs["da"], inputs["db"] = adapters(layer)
    return differentiated(partial(layer, x), inputs, dy)


def differentiated(
    forward: Callable[[], Tensor], inputs: Mapping[str, Tensor], dy: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """Forward, and backward to all of the inputs, whose gradients go by their names."""
    names, tensors = list(inputs), list(inputs.values())

    def call() -> dict[str, Tensor]:
        y = forward()
        return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, tensors, dy), strict=True))}

    return call


def dense_linear(weight: Tensor) -> nn.Linear:
    layer: nn.Linear = _linear(nn.Linear, *weight.shape)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _linear(layer_class: Any, out_features: int, in_features: int, **arguments: Any) -> Any:
    """A layer without bias whose constructor fills no memory that is thrown away."""
    return layer_class(in_features, out_features, bias=False, device="meta", **arguments)
