"""One process has a whole state dict, and all processes get their rows: three processes over gloo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_models import RANKS, Case, assert_same_bits, batches, line, llama, on, shard, weight
from ranks import rank_tests
from rounding import ONE_MODEL
from test_fsdp_adapters import UNEVEN, empty, saved
from test_fsdp_checkpoints import assert_same_model, wiped
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

import peft_kernels as pk
from peft_kernels.checkpoints.header import CheckpointError
from peft_kernels.integrations import fsdp

pytestmark = pytest.mark.slow

# Each case runs in every process.


def of_process_0(state: Any) -> Any:
    return state if dist.get_rank() == 0 else None


def sent(folder: Path) -> None:
    """A state dict saved by one process, one gathered by torch, and a file of the base, bit for bit."""
    import peft
    from safetensors.torch import load_file

    mesh, want = line(3), llama(**UNEVEN)
    names = dict(want.named_parameters())
    alone = wiped(llama(**UNEVEN))  # whole in each process, as with DDP
    fsdp.load_full_state_dict(alone, of_process_0(want.state_dict()))
    assert_same_model(alone, names)
    if mesh is None:
        return
    whole = {"full_state_dict": True}
    gathered = get_model_state_dict(shard(llama(**UNEVEN), mesh), options=StateDictOptions(**whole))
    for state in (want.state_dict(), gathered):
        model = shard(wiped(llama(**UNEVEN)), mesh)
        fsdp.load_full_state_dict(model, of_process_0(state))
        assert_same_model(model, names)
        ids = batches(1, 1)[0]
        torch.testing.assert_close(model(ids).logits, want(ids).logits, rtol=ONE_MODEL, atol=ONE_MODEL)
    base = saved(folder, mesh)
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = empty(base.config, folder, adapter, mesh)
    fsdp.load_full_state_dict(model, of_process_0(load_file(folder / "model.safetensors")))
    assert not any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=ONE_MODEL, atol=ONE_MODEL)


def experts(folder: Path) -> None:
    """Packed experts, by the keys of their own format: from process 0, and from every process."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    mesh = line(3)
    if mesh is None:
        return
    sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=97, num_experts_per_tok=2, **sizes, **heads)
    want = pk.quantize_model(Qwen3MoeForCausalLM(config), experts=True)
    names = {n: p.clone() if isinstance(p, pk.NF4Weight) else p for n, p in want.named_parameters()}
    for way in ("sent", "loaded"):
        model = pk.quantize_model(Qwen3MoeForCausalLM(config), experts=True)
        for layer in wiped(model).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if way == "sent":
            fsdp.load_full_state_dict(model, of_process_0(want.state_dict()))
        else:
            inner = "model.layers.0.mlp.experts"
            model.get_submodule(inner).load_state_dict(want.get_submodule(inner).state_dict())
            names = {n: p for n, p in names.items() if n.startswith(inner)}
        for name, expected in names.items():
            got = fsdp._whole(model.get_parameter(name).detach())
            (assert_same_bits if isinstance(expected, pk.NF4Weight) else torch.testing.assert_close)(
                got, expected
            )


@on(3)
def refused(folder: Path, mesh: Any) -> None:
    """Raises in every process, before anything is written."""
    sizes = (96, 64), (64, 64)
    want = nn.Sequential(nn.Linear(4, 4), *(pk.nn.NF4Linear(weight(shape, 64, True)) for shape in sizes))
    state = want.state_dict()

    wrong = state | {"2.weight": torch.zeros(64, 64)}
    short = {name: t for name, t in state.items() if name != "2.weight.absmax"}
    cases = {
        r"2.weight.absmax: expected a tensor in the state dict": short,
        r"extra: the model has no tensor of this name, the state dict of process 0 has": state
        | {"extra": torch.ones(1)},
        r"0.bias: the state dict of process 0 has no tensor": {
            n: t for n, t in state.items() if n != "0.bias"
        },
        r"0.weight: expected shape \(4, 4\), got \(4, 5\)": state | {"0.weight": torch.ones(4, 5)},
        r"2.weight: expected an NF4 weight, got a plain tensor": {
            n: t for n, t in wrong.items() if not n.startswith("2.weight.")
        },
        r"0.bias: expected a tensor, got int": state | {"0.bias": 1},
    }
    model = fully_shard(wiped(copy.deepcopy(want)), mesh=mesh)
    for sentence, given in cases.items():
        with pytest.raises(CheckpointError, match=sentence):
            fsdp.load_full_state_dict(model, of_process_0(given))
    for sends in (True, False):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=sends)
        with pytest.raises(
            RuntimeError, match=r"expected peft_kernels.integrations.fsdp.load_full_state_dict"
        ):
            set_model_state_dict(
                model, dict(state) if not sends or dist.get_rank() == 0 else {}, options=options
            )
    for p in model.parameters():
        local: Any = p.to_local()
        assert not (local.dequantize() if hasattr(local, "_rows") else local).any()
    set_model_state_dict(model, get_model_state_dict(model))  # sharded state dicts work as usual
    fsdp.load_full_state_dict(model, of_process_0(state))
    assert_same_bits(fsdp._whole(model[2].weight.detach()), want[2].weight)


CASES: list[Case] = [sent, experts, refused]


errors, test_on_four_processes = rank_tests(RANKS, CASES)
