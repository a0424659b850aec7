"""What cannot be read of int4, int8 and FP8 checkpoints: each error names the tensor or the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, change_tensors
from moe_models import qwen_moe
from owned_folders import FILE
from packed_models import KINDS, config_of, make
from torch import Tensor
from transformers_models import read

from peft_kernels.nf4.owners import OWNERS

Change = Callable[[dict[str, Tensor]], Any]


def _fill(name: str, value: float, count: int = 1) -> Change:
    return lambda t: t[name].view(-1)[3 : 3 + count].fill_(value)


def _as(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda t: t.update({name: change(t[name]).contiguous()})


def _order(t: dict[str, Tensor]) -> None:
    t["g_idx"] = t["g_idx"].flip(0)


def _cut(columns: int) -> Change:
    return lambda t: t.update(qweight=t["qweight"][: columns // 8], g_idx=t["g_idx"][:columns])


def _padding(t: dict[str, Tensor]) -> None:
    t["weight_packed"], t["weight_scale"] = t["weight_packed"][:12], t["weight_scale"][:12]
    t["weight_zero_point"] = t["weight_zero_point"][:2].contiguous()
    t["weight_zero_point"][1] |= 1 << 20
    t["weight_shape"][0] = 12


GPTQ = "gptq", (16, 64)
GPTQ_INT8 = "gptq int8", (16, 256)
AWQ = "awq", (16, 64)
INT4 = "packed zeros", (16, 64)
BLOCKS = "fp8 static", (192, 320)
ROWS = "fp8 rows", (192, 320)
WHOLE = "fp8 modelopt", (192, 320)
NONE = "expected this tensor of a packed weight, got none"
BROKEN: dict[str, tuple[tuple[str, tuple[int, int]], Change, str]] = {
    "no codes": (GPTQ, lambda t: t.pop("qweight"), f"a.qweight: {NONE}"),
    "no scales": (GPTQ, lambda t: t.pop("scales"), f"a.scales: {NONE}"),
    "no zero points": (GPTQ, lambda t: t.pop("qzeros"), f"a.qzeros: {NONE}"),
    "no groups": (GPTQ, lambda t: t.pop("g_idx"), f"a.g_idx: {NONE}"),
    "act-order": (
        GPTQ,
        _order,
        "a.g_idx: expected groups of consecutive input features, got another order (desc_act, or actorder), "
        "which cannot be read; quantise the model without it",
    ),
    "short g_idx": (GPTQ, _as("g_idx", lambda x: x[:32]), "a.g_idx: expected shape (64), got (32,)"),
    "8 bits": (
        GPTQ,
        lambda t: t.update(qweight=t["qweight"].repeat(2, 1), qzeros=t["qzeros"].repeat(1, 2)),
        "a.qweight: expected 4 bits for all layers, got 8 for this one; layers of several widths (`dynamic`) "
        "are not loaded",
    ),
    "another zero point": (
        GPTQ_INT8,
        _fill("qzeros", 0x7F7F7F7E),
        "a.qzeros: expected zero points of 128 alone, since int8 has none, got others in 1 of 8 words; "
        "quantise the model with sym=True",
    ),
    "zero points of v2": (
        GPTQ_INT8,
        _as("qzeros", lambda x: x + 0x01010101),
        "a.qzeros: expected zero points of 128 alone, since int8 has none, got others in 8 of 8 words; "
        "quantise the model with sym=True",
    ),
    "act-order in 8 bits": (
        GPTQ_INT8,
        _order,
        "a.g_idx: expected groups of consecutive input features, got another order (desc_act, or actorder), "
        "which cannot be read; quantise the model without it",
    ),
    "groups of 32 in 8 bits": (
        GPTQ_INT8,
        _as("scales", lambda x: x.repeat(4, 1)),
        "a.scales: expected groups of 64 or 128 input features, or whole rows, got 8 groups of 256",
    ),
    "fewer columns in 8 bits": (
        GPTQ_INT8, _as("scales", lambda x: x[:, :8]), "a.scales: expected shape (groups, 16), got (2, 8)"
    ),
    "fewer zero points in 8 bits": (
        GPTQ_INT8, _as("qzeros", lambda x: x[:1]), "a.qzeros: expected shape (2, 4), got (1, 4)"
    ),
    "flat codes in 8 bits": (
        GPTQ_INT8,
        _as("qweight", lambda x: x.view(-1)),
        "a.qweight: expected shape (in / 4, out), got (1024,)",
    ),
    "4 bits among 8": (
        GPTQ_INT8,
        lambda t: t.update(qweight=t["qweight"][::2], qzeros=t["qzeros"][:, ::2]),
        "a.qweight: expected 8 bits for all layers, got 4 for this one; layers of several widths (`dynamic`) "
        "are not loaded",
    ),
    "more codes": (
        GPTQ,
        _as("qweight", lambda x: x.repeat(2, 1)),
        "a.g_idx: expected shape (128), got (64,)",
    ),
    "flat codes": (
        GPTQ, _as("qweight", lambda x: x.view(-1)), "a.qweight: expected shape (in / 8, out), got (128,)"
    ),
    "unsigned codes": (
        GPTQ,
        _as("qweight", lambda x: x.view(torch.uint8)),
        "a.qweight: expected dtype torch.int32, got torch.uint8",
    ),
    "fewer columns": (
        GPTQ, _as("scales", lambda x: x[:, :8]), "a.scales: expected shape (2, 16), got (2, 8)"
    ),
    "flat scales": (
        GPTQ, _as("scales", lambda x: x.view(-1)), "a.scales: expected shape (groups, 16), got (32,)"
    ),
    "three groups": (
        GPTQ,
        _as("scales", lambda x: x[[0, 1, 1]]),
        "a.scales: expected groups of a multiple of 32 input features, got 3 groups of 64",
    ),
    "groups of 16": (
        GPTQ,
        _as("scales", lambda x: x.repeat(2, 1)),
        "a.scales: expected groups of a multiple of 32 input features, got 4 groups of 64",
    ),
    "no group": (
        GPTQ,
        _as("scales", lambda x: x[:0]),
        "a.scales: expected groups of a multiple of 32 input features, got 0 groups of 64",
    ),
    "a last group of 16": (
        ("gptq last", (16, 96)),
        _cut(80),
        "a.scales: expected groups of a multiple of 32 input features, got 2 groups of 80",
    ),
    "rows of 48": (
        ("gptq rows", (16, 64)),
        _cut(48),
        "a.scales: expected groups of a multiple of 32 input features, got 1 groups of 48",
    ),
    "uneven groups without an index": (
        ("awq", (16, 96)),
        _as("scales", lambda x: x[:2]),
        "a.scales: expected groups of a multiple of 32 input features, got 2 groups of 96",
    ),
    "wide scales": (
        GPTQ,
        _as("scales", Tensor.float),
        "a.scales: expected dtype torch.float16 or torch.bfloat16, got torch.float32",
    ),
    "NaN scales": (
        GPTQ, _fill("scales", torch.nan, 2), "a.scales: expected finite scales, got 2 NaN or Inf among 32"
    ),
    "Inf scale": (
        AWQ, _fill("scales", torch.inf), "a.scales: expected finite scales, got 1 NaN or Inf among 32"
    ),
    "one zero point for all": (
        AWQ, _as("qzeros", lambda x: x[:1]), "a.qzeros: expected shape (2, 2), got (1, 2)"
    ),
    "zero points in int64": (
        AWQ, _as("qzeros", Tensor.long), "a.qzeros: expected dtype torch.int32, got torch.int64"
    ),
    "halves of codes": (
        AWQ, _as("qweight", lambda x: x[:, :1]), "a.scales: expected shape (2, 8), got (2, 16)"
    ),
    "another shape": (
        INT4,
        lambda t: t["weight_shape"].fill_(64),
        "a.weight_shape: expected [16, 64], as weight_packed has it, got [64, 64]",
    ),
    "a shape of three": (
        INT4,
        _as("weight_shape", lambda x: x[[0, 1, 1]]),
        "a.weight_shape: expected [16, 64], as weight_packed has it, got [16, 64, 64]",
    ),
    "no packed codes": (INT4, lambda t: t.pop("weight_packed"), f"a.weight_packed: {NONE}"),
    "padding": (
        INT4,
        _padding,
        "a.weight_zero_point: expected zeros after the last of 12 zero points, got others",
    ),
    "actorder": (
        INT4,
        lambda t: t.update({"weight_g_idx": torch.arange(64, dtype=torch.int32) % 2}),
        "a.weight_g_idx: expected groups of consecutive input features, got another order (desc_act, or "
        "actorder), which cannot be read; quantise the model without it",
    ),
    "no FP8": (BLOCKS, lambda t: t.pop("weight"), f"a.weight: {NONE}"),
    "no FP8 scales": (BLOCKS, lambda t: t.pop("weight_scale_inv"), f"a.weight_scale_inv: {NONE}"),
    "NaN codes": (
        BLOCKS,
        lambda t: t["weight"].view(torch.uint8)[5, 4:6].copy_(torch.tensor([0x7F, 0xFF])),
        "a.weight: expected codes of finite values, got 2 NaN among 61440",
    ),
    "E5M2": (
        BLOCKS,
        _as("weight", lambda x: x.view(torch.float8_e5m2)),
        "a.weight: expected dtype torch.float8_e4m3fn, got torch.float8_e5m2",
    ),
    "three dimensions": (
        BLOCKS, _as("weight", lambda x: x[None]), "a.weight: expected shape (out, in), got (1, 192, 320)"
    ),
    "fewer blocks": (
        BLOCKS,
        _as("weight_scale_inv", lambda x: x[:1]),
        "a.weight_scale_inv: expected shape (2, 3), got (1, 3)",
    ),
    "one scale": (
        BLOCKS,
        _as("weight_scale_inv", lambda x: x[:1, :1]),
        "a.weight_scale_inv: expected shape (2, 3), got (1, 1)",
    ),
    "NaN scale of a block": (
        BLOCKS,
        _fill("weight_scale_inv", torch.nan),
        "a.weight_scale_inv: expected finite scales, got 1 NaN or Inf among 6",
    ),
    "scales in codes": (
        BLOCKS,
        _as("weight_scale_inv", lambda x: x.to(torch.float8_e8m0fnu)),
        "a.weight_scale_inv: expected dtype torch.float32 or torch.bfloat16 or torch.float16, got "
        "torch.float8_e8m0fnu",
    ),
    "fewer rows": (
        ROWS,
        _as("weight_scale", lambda x: x[:100]),
        "a.weight_scale: expected shape (2, 3), (192, 1), (192,) or one number, got (100, 1)",
    ),
    "a flat scale in blocks": (
        BLOCKS,
        _as("weight_scale_inv", lambda x: x.view(-1)),
        "a.weight_scale_inv: expected shape (2, 3), got (6,)",
    ),
    "two scales": (
        WHOLE,
        _as("weight_scale", lambda x: x.repeat(2)),
        "a.weight_scale: expected shape (2, 3), (192, 1), (192,) or one number, got (2,)",
    ),
    "Inf whole scale": (
        WHOLE,
        lambda t: t["weight_scale"].fill_(torch.inf),
        "a.weight_scale: expected finite scales, got 1 NaN or Inf among 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_damaged_weights(what: str) -> None:
    (kind, shape), change, expected = BROKEN[what]
    torch.manual_seed(0)
    tensors, _ = KINDS[kind].pack(*shape)
    owner = OWNERS[KINDS[kind].owner]
    owner.read(dict(tensors), "a.weight")
    change(tensors)
    with pytest.raises(ValueError) as caught:
        owner.read(tensors, "a.weight")
    assert str(caught.value) == expected


Q = "model.layers.0.self_attn.q_proj"
FILES: dict[str, tuple[str, Change, str]] = {
    "another layer's codes": (
        "awq",
        lambda t: t.update({f"{Q}.{part}": t[f"model.layers.0.mlp.up_proj.{part}"] for part in
                            ("qweight", "qzeros", "scales")}),
        rf"^{Q}\.weight: expected shape \(64, 64\), got \(96, 64\)$",
    ),
    "scaled activations": (
        "awq",
        lambda t: t.update({"model.layers.0.mlp.act_fn.scales": torch.ones(96)}),
        rf"^model\.layers\.0\.mlp\.act_fn\.qweight: {NONE}$",
    ),
    "no codes": ("gptq", lambda t: t.pop(f"{Q}.qweight"), rf"^{Q}\.qweight: {NONE}$"),
    "NaN": (
        "fp8",
        lambda t: t[f"{Q}.weight"].view(torch.uint8)[0].fill_(255),
        rf"^{Q}\.weight: expected codes of finite values, got 192 NaN among 36864$",
    ),
    "FP8 without scales": (
        "fp8", lambda t: t.pop(f"{Q}.weight_scale_inv"), rf"^{Q}\.weight_scale_inv: {NONE}$"
    ),
    "int8 without scales": ("int8", lambda t: t.pop(f"{Q}.weight_scale"), rf"^{Q}\.weight_scale: {NONE}$"),
    "int8 of another size": (
        "int8 words",
        lambda t: t[f"{Q}.weight_shape"].add_(1),
        rf"^{Q}\.weight_shape: expected \[192, 192\], as weight_packed has it, got \[193, 193\]$",
    ),
    "int8 scales": (
        "int8 groups",
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(192, 6)}),
        rf"^{Q}\.weight_scale: expected shape \(192, 3\) or \(192, 2\), \(192, 1\), \(192,\) or one numb",
    ),
    "int8 embeddings": (
        "int8",
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.int8)}),
        r"^model\.embed_tokens\.weight: expected a dense weight for an Embedding, got",
    ),
    "FP8 embeddings": (
        "fp8",
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(
            torch.float8_e4m3fn)}),
        r"^model\.embed_tokens\.weight: expected a dense weight for an Embedding, got FP8$",
    ),
    "FP8 embeddings with scales": (
        "fp8",
        lambda t: t.update({"model.embed_tokens.weight_scale_inv": torch.ones(1, 2)}),
        r"^model\.embed_tokens\.weight: expected a dense weight for an Embedding, got FP8$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_damaged_files(what: str, tmp_path: Path) -> None:
    kind, change, expected = FILES[what]
    make(tmp_path, kind, num_hidden_layers=1)
    change_tensors(tmp_path / FILE, change)
    with pytest.raises(ValueError, match=expected):
        read(tmp_path)


@pytest.mark.parametrize(("kind", "codes"), [("gptq", "qweight"), ("packed", "weight_packed")])
def test_one_packed_layer_among_dense_experts(kind: str, codes: str, tmp_path: Path) -> None:
    """transformers merges all of them into one weight."""
    qwen_moe().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", quantization_config=config_of(kind))
    name = "model.layers.0.mlp.experts.1.up_proj"

    def pack(tensors: dict[str, Tensor]) -> None:
        parts, _ = KINDS[kind].pack(*tensors.pop(f"{name}.weight").shape)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}

    change_tensors(tmp_path / FILE, pack)
    first = "model.layers.0.mlp.experts.0.gate_proj"
    expected = rf"^{first}\.{codes}: expected this tensor of a packed weight, got none$"
    with pytest.raises(ValueError, match=expected):
        read(tmp_path)
