"""Modules of experts in 4 bits: packing, copying, saving, merging and unpacking."""

from __future__ import annotations

import copy
import logging
from typing import Any

import models
import moe_models as moe
import pytest
import torch
from moe_models import EXPERTS, HIDDEN, KINDS, packed, sample, unpacked
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.nf4.experts_forward import weight_names
from peft_kernels.nf4.experts_packing import NF4Experts, is_experts, pack, unpack
from peft_kernels.quantize.model import report_of


@pytest.mark.parametrize("kind", KINDS)
def test_pack_and_unpack(kind: str) -> None:
    before = moe.experts(kind, torch.bfloat16)
    module = copy.deepcopy(before)
    cls, keys = type(module), list(module.state_dict())
    pack(module, blocksize=32, double_quant=False)
    assert isinstance(module, NF4Experts) and isinstance(module, cls)
    assert type(module).__name__ == cls.__name__ and module.is_transposed is False
    for name in weight_names(module):
        dense = getattr(before, name).data
        expected = pk.NF4Weight.quantize(dense.mT if before.is_transposed else dense, 32, False)
        weight = getattr(module, name)
        assert torch.equal(weight.packed, expected.packed) and torch.equal(weight.absmax, expected.absmax)
        assert not weight.requires_grad and weight.blocksize == 32
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in before.named_parameters()]
    unpack(module)
    assert type(module) is cls and list(module.state_dict()) == keys
    assert module.is_transposed == before.is_transposed
    assert vars(module).keys() == vars(before).keys()
    for name, parameter in module.named_parameters():
        other = getattr(before, name) if "." not in name else before.get_parameter(name)
        assert type(parameter) is nn.Parameter
        assert parameter.shape == other.shape and parameter.dtype == other.dtype
        assert parameter.is_contiguous()
        torch.testing.assert_close(parameter, other, atol=0.2, rtol=0)


class Mixture(nn.Module):
    """A linear layer, and experts that send token t to t and t + 1."""

    def __init__(self, kind: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.experts = moe.experts(kind, dtype)

    def forward(self, x: Tensor) -> Any:
        first = torch.arange(x.shape[0])[:, None]
        index = (first + torch.arange(2)) % EXPERTS
        return self.experts(self.proj(x), index, torch.full(index.shape, 0.5))


def test_quantize_model_reports_dense_experts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        model = pk.quantize_model(Mixture())
    nbytes = sum(p.nbytes for p in model.experts.parameters())
    expected = f"1 sets of experts stay dense, {nbytes / 1e6:.3g} MB in all; experts=True packs them"
    assert expected in caplog.text and "the first: experts" in caplog.text
    report = report_of(model)
    assert report is not None and report.left == {"experts": "experts; experts=True would pack them"}


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_model_packs_experts(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Mixture(kind)
    before = sum(p.nbytes for p in model.parameters())
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        pk.quantize_model(model, experts=True, blocksize=128, compute_dtype=torch.bfloat16)
    assert caplog.text == ""
    report = report_of(model)
    assert report is not None and report.layers == ["proj", "experts"] and report.left == {}
    assert report.bytes_before == before
    assert report.bytes_after == sum(p.nbytes for p in model.parameters()) < before / 5
    assert model.experts.compute_dtype == torch.bfloat16 and model.experts.down_proj.blocksize == 128
    assert model.experts.down_proj._state.name == "experts.down_proj"
    pk.quantize_model(model, experts=True)
    assert model.experts.down_proj.blocksize == 128, "it was packed anew"


def test_dense_experts_can_be_packed_later() -> None:
    model = pk.quantize_model(Mixture())
    expected = model.experts(*sample())
    pk.quantize_model(model, experts=True)
    report = report_of(model)
    assert report is not None and report.layers == ["proj", "experts"] and report.left == {}
    assert not torch.equal(model.experts(*sample()), expected)


def test_names_to_skip() -> None:
    model = pk.quantize_model(Mixture(), skip=["experts"], experts=True)
    report = report_of(model)
    assert report is not None and report.left == {"experts": "named in skip"}
    assert not isinstance(model.experts, NF4Experts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weight_is_named_and_changes_nothing(bad: float) -> None:
    model = Mixture()
    model.experts.down_proj.data[3, 5, 7] = bad
    with pytest.raises(ValueError, match=r"experts\.down_proj: .* got 1 NaN or Inf"):
        pk.quantize_model(model, experts=True)
    assert type(model.proj) is nn.Linear and is_experts(model.experts)


def test_shared_experts_stay_dense() -> None:
    model = Mixture()
    model.other = moe.experts("qwen3_moe")
    model.other.down_proj = model.experts.down_proj
    pk.quantize_model(model, experts=True)
    report = report_of(model)
    assert report is not None and set(report.left) == {"experts", "other"}
    assert "shares" in report.left["experts"]


def test_unsupported_experts_stay_dense_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    """A subclass with its own forward, and Llama 4's experts, which all see every token."""
    cls = type(moe.experts("qwen3_moe"))

    class Own(cls):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Any:
            return super().forward(*args) * 2

    model = Mixture()
    model.experts.__class__ = Own
    model.experts.down_proj = nn.Parameter(torch.zeros(8, 512, 512))
    config = moe.transformers.Llama4TextConfig(hidden_size=256, intermediate_size=256, num_local_experts=16)
    llama4 = moe.transformers.models.llama4.modeling_llama4
    model.llama = llama4.Llama4TextExperts(config)
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        pk.quantize_model(model, experts=True)
    report = report_of(model)
    names = {"experts.down_proj", "llama.gate_up_proj", "llama.down_proj"}
    reason = "three-dimensional, and in no module of experts that is known here"
    assert report is not None and report.left == dict.fromkeys(names, reason)
    assert "3 three-dimensional parameters" in caplog.text and "nothing packs them" in caplog.text


# Copies, state dicts, merges


@pytest.mark.parametrize("copying", [copy.deepcopy, models.pickled, models.saved_and_loaded])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_copies(kind: str, copying: Any) -> None:
    module, given = packed(kind), sample()
    copied = copying(module)
    assert type(copied) is type(module) and copied is not module
    assert torch.equal(copied(*given), module(*given))
    copied.down_proj.data += 1
    assert module.down_proj.dense is None
    unpack(copied)
    assert type(copied) is type(module).plain_class and isinstance(module, NF4Experts)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_state_dict(kind: str, assign: bool, double_quant: bool) -> None:
    module = packed(kind, torch.bfloat16, double_quant=double_quant)
    state = module.state_dict()
    assert {t.dtype for k, t in state.items() if not k.endswith("_bias")} <= {torch.uint8, torch.float32}
    other = moe.experts(kind)
    for parameter in other.parameters():
        parameter.data.mul_(2)
    pack(other, double_quant=double_quant)
    found = other.load_state_dict(state, assign=assign)
    assert not found.missing_keys and not found.unexpected_keys
    again = other.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    for name in weight_names(module):
        assert getattr(other, name).dtype == torch.bfloat16
        same = getattr(other, name).packed.data_ptr() == getattr(module, name).packed.data_ptr()
        assert same == assign


def _without(key: str) -> Any:
    return lambda state: state.pop(key)


def _changed(key: str, change: Any) -> Any:
    return lambda state: state.update({key: change(state[key])})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without("down_proj.absmax"), "down_proj.absmax: expected a dense tensor in the state dict"),
        (_without("down_proj.nested_offset"), "down_proj.nested_offset: expected a dense tensor"),
        (_changed("down_proj", lambda t: t[:-1]), "down_proj: expected number of experts 6, got 5"),
        (_changed("down_proj", lambda t: t[:, :-1]), r"down_proj: expected 3072 bytes for shape \(64, 96\)"),
        (_changed("down_proj", lambda t: t.float()), "down_proj: expected dtype torch.uint8, got torch.fl"),
        (_changed("down_proj.absmax", lambda t: t[:, :-1]), "down_proj.absmax: expected number of blocks"),
        (_changed("down_proj.nested_absmax", lambda t: -t), "down_proj.nested_absmax: expected finite"),
        (
            _changed("down_proj.nested_offset", lambda t: t * float("nan")),
            "down_proj.nested_offset: expected fin",
        ),
        (_changed("down_proj.nested_offset", lambda t: t[None]), "down_proj.nested_offset: expected num"),
        (lambda state: state.update({"down_proj.more": torch.ones(1)}), "down_proj.more: expected the items"),
        (lambda state: state.update(moe.experts("qwen3_moe").state_dict()), "gate_up_proj: expected dtype"),
    ],
)
def test_bad_state_dict_changes_nothing(change: Any, sentence: str) -> None:
    module = packed()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    state = packed(dtype=torch.bfloat16).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=sentence):
        module.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_dense_state_dict_is_refused() -> None:
    module = packed()
    with pytest.raises(RuntimeError, match="gate_up_proj: expected the items of an NF4 weight, got dense"):
        module.load_state_dict(moe.experts("qwen3_moe").state_dict())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_merge_and_unmerge(kind: str) -> None:
    model = pk.quantize_model(Mixture(kind), experts=True)
    x = testing.tensor(7, HIDDEN)
    before, bits = model(x), {key: t.clone() for key, t in model.experts.state_dict().items()}
    delta = torch.full_like(model.experts.down_proj.dequantize(), 0.05)
    model.experts.down_proj.data += delta
    assert model.experts.down_proj.is_merged
    dense = unpacked(model.experts)
    model.proj.requires_grad_(False)
    expected = model.experts(model.proj(x), torch.arange(7)[:, None] % 6, torch.ones(7, 1))
    torch.testing.assert_close(expected, dense(model.proj(x), torch.arange(7)[:, None] % 6, torch.ones(7, 1)))
    state = model.experts.state_dict()
    assert torch.equal(state["down_proj"], dense.down_proj), "in the layout of the class"
    model.experts.down_proj.data -= delta
    assert torch.equal(model(x), before)
    again = model.experts.state_dict()
    assert again.keys() == bits.keys() and all(torch.equal(again[key], bits[key]) for key in bits)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_fully_merged_module_becomes_dense(kind: str) -> None:
    """Like `nn.NF4Linear`: when the modules are listed, as PEFT does after unloading."""
    model = pk.quantize_model(Mixture(kind), experts=True)
    for weight in (model.proj.weight, model.experts.gate_up_proj, model.experts.down_proj):
        weight.data += torch.full_like(weight.dequantize(), 0.05)
    x = testing.tensor(7, HIDDEN)
    expected = model(x)
    for name in ("proj", "experts"):
        list(model.get_submodule(name).named_modules())
    assert not isinstance(model.experts, NF4Experts) and is_experts(model.experts)
    torch.testing.assert_close(model(x), expected)
    assert report_of(model) is None and not hasattr(model, "is_loaded_in_4bit")


def test_moves_and_casts() -> None:
    model = pk.quantize_model(Mixture("gpt_oss"), experts=True)
    packed_bytes = model.experts.down_proj.packed
    model.half()
    assert (
        model.experts.down_proj.dtype == torch.float16 and model.experts.down_proj_bias.dtype == torch.float16
    )
    assert torch.equal(model.experts.down_proj.packed, packed_bytes)
    model.to("meta")
    assert model.experts.down_proj.device.type == "meta"


def test_repr() -> None:
    expected = "gate_up_proj=(6, 192, 64), down_proj=(6, 64, 96), blocksize=64, dtype=torch.float32"
    assert expected in repr(packed())


def test_memory_of_scaled_down_qwen3_moe() -> None:
    """Bytes of Qwen3-30B-A3B with all sizes divided by 16 and fewer layers."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 48, "intermediate_size": 384, "head_dim": 8}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 3}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936 // 16 * 3 // 48}
    config = moe.transformers.Qwen3MoeConfig(**sizes, **heads, **experts, torch_dtype=torch.bfloat16)
    model = moe.transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    before = model.get_memory_footprint()
    share = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n) / before
    assert 0.9 < share < 0.97, "as in the real model, 95%"
    pk.quantize_model(model, experts=True)
    after = model.get_memory_footprint()
    assert after <= 0.30 * before
    held = 0
    for parameter in model.parameters():
        tensors = parameter._state.tensors().values() if isinstance(parameter, pk.NF4Weight) else [parameter]
        held += sum(t.untyped_storage().nbytes() for t in tensors)
    held += sum(buffer.nbytes for buffer in model.buffers())
    assert held <= 0.30 * before and abs(held - after) < 1e-3 * before
