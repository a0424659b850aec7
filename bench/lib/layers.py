"""The layers of the contenders, in as many copies as the rotation needs, all with the same values."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch import PatchReport

RANK, ALPHA = 16, 32
SCALING = ALPHA / RANK
BNB = "bitsandbytes"

T = TypeVar("T")


@lru_cache(maxsize=1)
def shared(make: Callable[..., T], group: str, *arguments: Any) -> T:
    """`make(*arguments)`, shared by consecutive cases of a group. Only the last one is kept in memory."""
    return make(*arguments)


class LayerCache:
    def __init__(self) -> None:
        self._layers: dict[str, Sequence[Any]] = {}

    def get(self, name: str, make: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """The layers of one contender, made on first use: consecutive cases differ in rows only."""
        if name not in self._layers:
            self._layers[name] = make()
        return self._layers[name]


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0, device: str = "cpu") -> Tensor:
    if device == "cpu":
        return testing.tensor(*shape, dtype=dtype, seed=seed, scale=scale)
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)


class Weights(LayerCache):
    """`seed`: of other values for a layer of the same shape."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        format: str = "nf4",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self.format, self.device, self.seed = format, device, seed

    def normal(self, *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype, seed = dtype or self.dtype, seed + 10 * self.seed
        return normal(*shape, dtype=dtype, seed=seed, scale=scale, device=self.device)

    @cached_property
    def original(self) -> Tensor:
        """(out, in), before quantisation, scaled as weights are at initialisation."""
        return self.normal(self.out_features, self.in_features, seed=1, scale=self.in_features**-0.5)

    @cached_property
    def nf4(self) -> pk.NF4Weight:
        """In the format."""
        with pk.use_backend("reference"):
            return pk.NF4Weight.quantize(self.original, format=self.format)

    @cached_property
    def exact(self) -> Tensor:
        """The dequantised weight in fp32."""
        return dequantized(self.nf4)

    @cached_property
    def rounded(self) -> Tensor:
        """The dequantised weight in the dtype of the case, for dense layers."""
        return self.exact.to(self.dtype)

    @cached_property
    def lora_a(self) -> Tensor:
        scale = self.in_features**-0.5
        return self.normal(RANK, self.in_features, seed=2, scale=scale, dtype=torch.float32)

    @cached_property
    def lora_b(self) -> Tensor:
        return self.normal(self.out_features, RANK, seed=3, scale=RANK**-0.5, dtype=torch.float32)

    def x(self, m: int) -> Tensor:
        return self.normal(m, self.in_features, seed=4)

    def dy(self, m: int) -> Tensor:
        return self.normal(m, self.out_features, seed=5)


def dequantized(weight: pk.NF4Weight) -> Tensor:
    """The weight in fp32 (code * scale), unpacked by the reference."""
    parts = weight._state.op_args
    exact: Tensor = testing.reference_op("dequantize_nf4")(*parts, weight.shape, torch.float32)
    return exact


def dense_linears(weights: Weights, count: int) -> list[nn.Linear]:
    return [dense_linear(weights.rounded.clone()) for _ in range(count)]


def nf4_copies(weights: Weights, count: int) -> list[pk.NF4Weight]:
    return [cast(pk.NF4Weight, weights.nf4.clone()) for _ in range(count)]


def nf4_linears(weights: Weights, count: int) -> list[nn.Linear]:
    return [pk.nn.NF4Linear(weight) for weight in nf4_copies(weights, count)]


def bitsandbytes() -> Any:
    """Imports the library without its warning about an optional download, which the header mentions."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes as bnb

    return bnb


def bnb_linears(weights: Weights, count: int, mode: str) -> list[Any]:
    """Linear4bit in mode "train" or "eval", called once: in eval the first call repacks the weight."""
    first = linear4bit(weights.original)
    layers = [copy.deepcopy(first).train(mode == "train") for _ in range(count)]
    with torch.no_grad():
        for layer in layers:
            layer(weights.x(1))
    return layers


def linear4bit(original: Tensor) -> Any:
    """bitsandbytes' layer, which quantises the weight itself."""
    bnb = bitsandbytes()
    layer = _linear(bnb.nn.Linear4bit, *original.shape, compute_dtype=original.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        original.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return layer.to(original.device)  # quantises


def adapted(model: nn.Module, targets: Any, count: int, names: Sequence[str], **options: Any) -> Any:
    """The PEFT model with one adapter per name on `count` layers, the first active.

    `options` of LoraConfig; otherwise PEFT's defaults (fp32 adapters).
    """
    if importlib.util.find_spec(BNB) is not None:
        bitsandbytes()  # PEFT imports it
    import peft

    # By this attribute of transformers PEFT decides whether to wrap Linear4bit.
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
    import peft

    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def peft_loras(bases: Sequence[nn.Module], weights: Weights, patch: bool, **options: Any) -> list[Any]:
    wrapped = adapted(nn.Sequential(*bases), r"\d+", len(bases), ("default",), **options)
    layers = list(lora_layers(wrapped).values())
    with torch.no_grad():
        for layer in layers:
            layer.lora_A["default"].weight.copy_(weights.lora_a)
            layer.lora_B["default"].weight.copy_(weights.lora_b)
    if patch:
        patched(wrapped, len(bases))
    return layers


def patched(model: nn.Module, count: int = 0) -> PatchReport:
    """Patches a model, all LoRA layers of which must run fused, and at least `count`."""
    report = pk.patch(model)
    if report.original or len(report.fused) < count:
        raise RuntimeError(f"pk.patch: {report}")
    return report


def own_loras(bases: Sequence[nn.Linear], weights: Weights) -> list[nn.Module]:
    """Our LoRA modules, for use without PEFT. They call the same op."""
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
    """The tensors of a quantised weight, by name."""
    named = {name: getattr(weight, name) for name in ("packed", "absmax", "absmax2", "offset")}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def bnb_parts(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """The same of the result of bitsandbytes' quantize_4bit."""
    return {"packed": packed, "absmax": state.absmax, "absmax2": state.state2.absmax, "offset": state.offset}


def forward_call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], dict[str, Tensor]]:
    def call() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": layer(x)}

    return call


def training_call(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], dict[str, Tensor]]:
    inputs = {"dx": x}
    if hasattr(layer, "lora_A"):
        inputs["da"], inputs["db"] = adapters(layer)
    return differentiated(partial(layer, x), inputs, dy)


def differentiated(
    forward: Callable[[], Tensor], inputs: Mapping[str, Tensor], dy: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """A forward, and a backward to all inputs; gradients are named as the inputs."""
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
    """A layer without bias, constructed on device "meta"."""
    return layer_class(in_features, out_features, bias=False, device="meta", **arguments)
