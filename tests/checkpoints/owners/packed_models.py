"""Tiny checkpoints in int4 and FP8, packed here with plain loops from the definitions of the formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint_damage import change_json, write
from owned_folders import E2M1, FILE
from safetensors.torch import load_file
from torch import Tensor
from transformers_models import llama

NATURAL, AWQ_ORDER = range(8), (0, 2, 4, 6, 1, 3, 5, 7)
Weight = tuple[dict[str, Tensor], Tensor]
"""Tensors by the last part of their names, and the weight's values in fp32."""


@dataclass
class Made:
    """A checkpoint: its tensors, and the values of its packed weights in fp32."""

    tensors: dict[str, Tensor]
    dense: dict[str, Tensor]


def words(matrix: Tensor, order: Iterable[int] = NATURAL, subtract: int = 0) -> Tensor:
    """Eight codes of a row in each word of 32 bits, from the lowest bits in this order."""
    found, order = [], list(order)
    for row in matrix.tolist():
        found.append([])
        for begin in range(0, len(row), 8):
            eight = [*row[begin : begin + 8], *[0] * 8][:8]
            word = -subtract
            for place in range(8):
                word += eight[order[place]] << 4 * place
            word %= 1 << 32
            found[-1].append(word - (1 << 32 if word >> 31 else 0))
    return torch.tensor(found, dtype=torch.int32)


@dataclass
class Groups:
    """Random ingredients of an int4 weight: codes (out, in), zero points and scales (out, groups)."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    length: int

    @classmethod
    def of(cls, out: int, into: int, length: int, scales: torch.dtype, symmetric: bool) -> Groups:
        length = into if length == -1 else length
        shape = (out, -(-into // length))
        codes = torch.randint(0, 16, (out, into))
        zeros = torch.full(shape, 8) if symmetric else torch.randint(0, 16, shape)
        return cls(codes, zeros, (0.02 + 0.02 * torch.rand(shape)).to(scales), length)

    @property
    def values(self) -> Tensor:
        wide = [each[:, self.index.long()] for each in (self.zeros, self.scales.float())]
        return (self.codes - wide[0]) * wide[1]

    @property
    def index(self) -> Tensor:
        return torch.tensor([i // self.length for i in range(self.codes.shape[1])], dtype=torch.int32)


def gptq(out: int, into: int, length: int = 32, symmetric: bool = False, version: int = 1) -> Weight:
    made = Groups.of(out, into, length, torch.float16, symmetric)
    less = 0x11111111 if version == 1 else 0
    return {
        "qweight": words(made.codes).T.contiguous(),
        "qzeros": words(made.zeros.T, subtract=less),
        "scales": made.scales.T.contiguous(),
        "g_idx": made.index,
    }, made.values


def awq(out: int, into: int, length: int = 32) -> Weight:
    made = Groups.of(out, into, length, torch.float16, symmetric=False)
    return {
        "qweight": words(made.codes.T, AWQ_ORDER),
        "qzeros": words(made.zeros.T, AWQ_ORDER),
        "scales": made.scales.T.contiguous(),
    }, made.values


def packed_int4(out: int, into: int, length: int = 32, symmetric: bool = True) -> Weight:
    made = Groups.of(out, into, length, torch.bfloat16, symmetric)
    found = {
        "weight_packed": words(made.codes),
        "weight_scale": made.scales,
        "weight_shape": torch.tensor([out, into]),
    }
    if not symmetric:
        found["weight_zero_point"] = words(made.zeros.T).T.contiguous()
    return found, made.values


def fp8(
    out: int,
    into: int,
    kind: str = "block",
    name: str = "weight_scale_inv",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (1,),
) -> Weight:
    """With scales of blocks, rows ("channel") or the whole ("tensor", in this shape)."""
    codes = torch.randint(0, 256, (out, into), dtype=torch.uint8)
    codes[codes & 127 == 127] = 0x7E
    weight = codes.view(torch.float8_e4m3fn)
    grid = -(-out // 128), -(-into // 128)
    scale = (
        0.0005
        + 0.0005 * torch.rand({"block": grid, "channel": (out, 1), "flat": (out,), "tensor": shape}[kind])
    ).to(dtype)
    values = weight.float()
    for row in range(out):
        for begin in range(0, into, 128):
            where = {"block": (row // 128, begin // 128), "channel": (row, 0), "flat": (row,)}.get(kind)
            one = scale.float().view(()) if where is None else scale[where].float()
            values[row, begin : begin + 128] *= one
    return {"weight": weight, name: scale}, values


def int8(out: int, into: int, length: int = -1, in_words: bool = False) -> Weight:
    codes = torch.randint(-128, 128, (out, into), dtype=torch.int8)
    length = into if length < 0 else length
    scale = (0.001 + 0.001 * torch.rand(out, -(-into // length))).to(torch.bfloat16)
    values = codes.float() * scale.float().repeat_interleave(length, 1)[:, :into]
    if not in_words:
        return {"weight": codes, "weight_scale": scale}, values
    packed = (codes.int() + 128).to(torch.uint8).view(torch.int32)
    shape = torch.tensor([out, into])
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}, values


def gptq_int8(out: int, into: int, length: int = 128, version: int = 1) -> Weight:
    length = into if length < 0 else length
    codes = torch.randint(0, 256, (out, into))
    index = torch.arange(into, dtype=torch.int32) // length
    scales = (0.001 + 0.001 * torch.rand(out, -(-into // length))).half()
    values = (codes - 128) * scales.float()[:, index]
    zeros = torch.full((scales.shape[1], out), 127 if version == 1 else 128)
    return {
        "qweight": _four_in_words(codes).T.contiguous(),
        "qzeros": _four_in_words(zeros),
        "scales": scales.T.contiguous(),
        "g_idx": index,
    }, values


def _four_in_words(codes: Tensor) -> Tensor:
    """Four codes of a row in each word of 32 bits, from the lowest bits."""
    words = sum(codes[:, place::4] << 8 * place for place in range(4))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def mxfp4(out: int, into: int) -> Weight:
    codes = torch.randint(0, 256, (out, into // 2), dtype=torch.uint8)
    scales = torch.randint(116, 121, (out, into // 32), dtype=torch.uint8)
    table = torch.tensor(E2M1)
    wide = torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), -1).flatten(-2)
    scale = torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    return {"weight_packed": codes, "weight_scale": scales}, wide * scale


def with_input(made: Weight, name: str = "input_scale") -> Weight:
    return made[0] | {name: torch.rand(())}, made[1]


def _groups(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


_GPTQ = {
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": False,
    "quant_method": "gptq",
    "dynamic": {r"-:.*\.mtp\..*": {}},
    "lm_head": False,
    "pack_dtype": "int32",
}
_GPTQ_INT8 = _GPTQ | {"bits": 8, "group_size": 128, "sym": True}
_AWQ = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "quant_method": "awq"}
_INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
_INT4_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}
_FP8_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_BLOCKS = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
}  # fmt: skip
_INT4_SIZES = {"hidden_size": 64, "intermediate_size": 96}
_FP8_SIZES = {"hidden_size": 192, "intermediate_size": 320}


@dataclass(frozen=True)
class Kind:
    """A format: how to pack a weight, its configuration, and the name of its owner."""

    pack: Callable[[int, int], Weight]
    config: dict[str, Any]
    owner: str
    activations: bool = False

    @property
    def format(self) -> str:
        return next((each for each in ("mxfp4", "fp8", "int8") if each in self.owner), "int4")


KINDS = {
    "gptq": Kind(gptq, _GPTQ, "gptq"),
    "gptq v2": Kind(lambda *s: gptq(*s, version=2), _GPTQ | {"checkpoint_format": "gptq_v2"}, "gptq-v2"),
    "gptq symmetric": Kind(lambda *s: gptq(*s, symmetric=True), _GPTQ | {"sym": True}, "gptq"),
    "gptq rows": Kind(lambda *s: gptq(*s, length=-1), _GPTQ | {"group_size": -1}, "gptq"),
    "gptq last": Kind(lambda *s: gptq(*s, length=64), _GPTQ | {"group_size": 64}, "gptq"),
    "gptq int8": Kind(gptq_int8, _GPTQ_INT8, "gptq-int8"),
    "gptq int8 v2": Kind(
        lambda *s: gptq_int8(*s, 64, 2), _GPTQ_INT8 | {"group_size": 64, "format": "gptq_v2"}, "gptq-v2-int8"
    ),
    "gptq int8 rows": Kind(lambda *s: gptq_int8(*s, -1), _GPTQ_INT8 | {"group_size": -1}, "gptq-int8"),
    "awq": Kind(awq, _AWQ, "awq"),
    "awq rows": Kind(lambda *s: awq(*s, length=-1), _AWQ | {"group_size": -1}, "awq"),
    "packed": Kind(packed_int4, _INT4 | _groups(**_INT4_WEIGHTS), "compressed-tensors-int4"),
    "packed zeros": Kind(
        lambda *s: packed_int4(*s, symmetric=False),
        _INT4 | _groups(**_INT4_WEIGHTS | {"symmetric": False}),
        "compressed-tensors-int4",
    ),
    "packed rows": Kind(
        lambda *s: packed_int4(*s, length=-1),
        _INT4 | _groups(**_INT4_WEIGHTS | {"strategy": "channel", "group_size": None}),
        "compressed-tensors-int4",
    ),
    "packed mxfp4": Kind(
        mxfp4,
        _INT4
        | _groups(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32)
        | {"format": "mxfp4-pack-quantized"},
        "compressed-tensors-mxfp4",
    ),
    "fp8": Kind(lambda *s: fp8(*s, dtype=torch.bfloat16), _BLOCKS, "fp8", True),
    "fp8 whole": Kind(
        lambda *s: fp8(*s, "tensor", shape=()), _BLOCKS | {"weight_block_size": None}, "fp8-whole", True
    ),
    "fp8 static": Kind(
        lambda *s: with_input(fp8(*s), "activation_scale"),
        _BLOCKS | {"activation_scheme": "static"},
        "fp8",
        True,
    ),
    "fp8 rows": Kind(
        lambda *s: fp8(*s, "channel", "weight_scale", torch.bfloat16),
        _FP8 | _groups(**_FP8_WEIGHTS | {"strategy": "channel"}),
        "compressed-tensors-fp8",
    ),
    "fp8 rows in fp32": Kind(
        lambda *s: fp8(*s, "channel", "weight_scale"),
        _FP8 | _groups(**_FP8_WEIGHTS | {"strategy": "channel"}) | {"format": "naive-quantized"},
        "compressed-tensors-fp8",
    ),
    "fp8 tensor": Kind(
        lambda *s: fp8(*s, "tensor", "weight_scale", torch.bfloat16),
        _FP8 | _groups(**_FP8_WEIGHTS | {"strategy": "tensor"}),
        "compressed-tensors-fp8",
    ),
    "fp8 blocks": Kind(
        lambda *s: fp8(*s, "block", "weight_scale"),
        _FP8 | _groups(**_FP8_WEIGHTS | {"strategy": "block", "block_structure": [128, 128]}),
        "compressed-tensors-fp8",
    ),
    "int8": Kind(
        lambda *s: int8(*s),
        _INT4 | _groups(**_INT8 | {"strategy": "channel"}) | {"format": "int-quantized"},
        "compressed-tensors-int8",
    ),
    "int8 groups": Kind(
        lambda *s: int8(*s, length=128, in_words=True),
        _INT4 | _groups(**_INT8 | {"strategy": "group", "group_size": 128}),
        "compressed-tensors-int8-words",
    ),
    "int8 words": Kind(
        lambda *s: int8(*s, in_words=True),
        _INT4 | _groups(**_INT8 | {"strategy": "channel"}),
        "compressed-tensors-int8-words",
    ),
    "fp8 modelopt": Kind(
        lambda *s: with_input(fp8(*s, "tensor", "weight_scale", shape=())),
        {"quant_method": "modelopt", "quant_algo": "FP8"} | _groups(**_FP8_WEIGHTS),
        "modelopt-fp8",
    ),
    "fp8 modelopt rows": Kind(
        lambda *s: fp8(*s, "flat", "weight_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"} | _groups(**_FP8_WEIGHTS),
        "modelopt-fp8",
    ),
}  # fmt: skip


def make(folder: Path, kind: str, **options: Any) -> Made:
    """Writes a Llama with random weights in a format."""
    chosen = KINDS[kind]
    sizes = _FP8_SIZES if chosen.format in ("fp8", "int8") else _INT4_SIZES
    llama(**sizes | options).to(torch.bfloat16).save_pretrained(folder)
    torch.manual_seed(0)
    made = Made({}, {})
    for name, value in load_file(folder / FILE).items():
        if not name.endswith("proj.weight"):
            made.tensors[name] = value
            continue
        parts, made.dense[name] = chosen.pack(*value.shape)
        stem = name.removesuffix("weight")
        made.tensors |= {stem + part: tensor for part, tensor in parts.items()}
    write(folder / FILE, made.tensors)
    change_json(folder / "config.json", quantization_config=config_of(kind))
    return made


def config_of(kind: str, **changed: Any) -> Any:
    """A new copy of its `quantization_config`."""
    return json.loads(json.dumps(KINDS[kind].config | changed))


def dense_twin(folder: Path, made: Made, twin: Path, dtype: torch.dtype) -> Path:
    """Writes the dense model of a packed checkpoint."""
    twin.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config))
    plain = {n: t for n, t in made.tensors.items() if "proj." not in n}
    write(twin / FILE, {name: tensor.to(dtype) for name, tensor in (plain | made.dense).items()})
    return twin
