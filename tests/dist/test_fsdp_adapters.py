"""New adapters of every kind over a base on the meta device, of which each process reads its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_models import RANKS, Case, assert_same_bits, batches, line, llama, shard
from ranks import rank_tests
from rounding import ONE_MODEL

import peft_kernels as pk
from peft_kernels.checkpoints.header import CheckpointError, Entry
from peft_kernels.integrations import fsdp

for name in ("transformers", "peft", "accelerate"):
    pytest.importorskip(name, reason="models are transformers', adapters PEFT's, emptied by accelerate")

pytestmark = pytest.mark.slow

UNEVEN = {"hidden_size": 40, "intermediate_size": 90, "num_key_value_heads": 2, "num_attention_heads": 4}
TOKENS = [1, 5, 96]

STARTED: dict[str, dict[str, Any]] = {
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "a head that is trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "not started": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False},
}
ZERO = {"an embedding": ["lora_B", "lora_embedding_A"], "orthogonal": [], "not started": []}
"""Matrices that start as zeros, if not B alone."""
REFUSED: dict[str, dict[str, Any]] = {
    r"init_lora_weights: expected True, .* got 'eva', which": {"init_lora_weights": "eva"},
    r"use_dora: expected False for .*embed_tokens, an Embedding": {
        "use_dora": True,
        "target_modules": ["embed_tokens"],
    },
}

# Each case runs in every process.


def saved(folder: Path, mesh: Any) -> Any:
    """A base and its file."""
    from safetensors.torch import save_file

    base = llama(**UNEVEN).unload()
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        tensors = {n: t.contiguous() for n, t in base.state_dict().items() if n != "lm_head.weight"}
        save_file(tensors, folder / "model.safetensors")
    dist.barrier(group=mesh.get_group())
    return base


def empty(config: Any, path: Path, adapter: Any, mesh: Any, buffers: bool = False) -> Any:
    import accelerate
    import peft
    from transformers import LlamaForCausalLM

    with accelerate.init_empty_weights(include_buffers=buffers):
        model = LlamaForCausalLM(config)
    model.tie_weights()
    fsdp.empty_layers(model, path)
    return shard(peft.get_peft_model(model, adapter), mesh)


def whole(model: Any) -> dict[str, Any]:
    return {name: fsdp._whole(p.detach()) for name, p in model.named_parameters()}


def started(folder: Path) -> None:
    """Equals one process if the initialisation is deterministic, else is equal in all processes; trains."""
    import peft

    mesh = line(3)
    if mesh is None:
        return
    base, ids = saved(folder, mesh), batches(1, 1)[0]
    want = base(ids).logits
    for kind, options in STARTED.items():
        adapter = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)
        model = empty(base.config, folder, adapter, mesh)
        fsdp.load_checkpoint(model, folder)
        single = dict(peft.get_peft_model(llama(**UNEVEN).unload(), adapter).named_parameters())
        got = whole(model)
        assert got.keys() == single.keys(), kind
        for name, value in got.items():
            if ".lora_" not in name or ".lora_magnitude" in name:
                same = (
                    assert_same_bits if isinstance(single[name], pk.NF4Weight) else torch.testing.assert_close
                )
                same(value, single[name].detach())
            elif any(f".{matrix}." in name for matrix in ZERO.get(kind, ["lora_B"])):
                assert not value.any(), (kind, name)
            else:
                assert value.std() > 0.01 and len(torch.unique(value)) == value.numel(), (kind, name)
        if kind not in ("orthogonal", "not started"):
            torch.testing.assert_close(model(ids).logits, want, rtol=ONE_MODEL, atol=ONE_MODEL, msg=kind)
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert any(p.grad is not None for p in model.parameters()) and torch.isfinite(loss), kind
        both = [p for p in got.values() if p.dtype == torch.float32 and not isinstance(p, pk.NF4Weight)]
        sums = [torch.stack([p.detach().double().sum() for p in both])] * 3
        everyone: list[Any] = [None] * 3
        dist.all_gather_object(everyone, sums[0], group=mesh.get_group())
        assert all(torch.equal(one, everyone[0]) for one in everyone), kind


def refused(folder: Path) -> None:
    """Raises in every process, with the option's name, before anything is read; nothing is filled."""
    import peft

    mesh = line(3)
    if mesh is None:
        return
    base = saved(folder, mesh)
    adapters: dict[str, Callable[[], Any]] = {
        sentence: lambda options=options: peft.LoraConfig(r=4, **({"target_modules": ["q_proj"]} | options))
        for sentence, options in REFUSED.items()
    }
    adapters[r"ia3_l.*: expected a parameter of LoRA, .* got another of IA3"] = lambda: peft.IA3Config(
        target_modules=["q_proj"], feedforward_modules=[]
    )
    plain = peft.LoraConfig(r=4, target_modules=["q_proj"])
    original, read = Entry.read, []
    Entry.read = lambda self: read.append(self) or original(self)  # type: ignore[method-assign,func-returns-value]
    try:
        for sentence, adapter in adapters.items():
            model = empty(base.config, folder, adapter(), mesh)
            read.clear()
            with pytest.raises(CheckpointError, match=sentence):
                fsdp.load_checkpoint(model, folder)
            assert not read and all(p.is_meta for p in model.parameters()), sentence
        model = empty(base.config, folder, plain, mesh, buffers=True)
        read.clear()
        with pytest.raises(
            CheckpointError, match=r"inv_freq: expected values, got a buffer on the meta device"
        ):
            fsdp.load_checkpoint(model, folder)
        assert not read
    finally:
        Entry.read = original  # type: ignore[method-assign]


CASES: list[Case] = [started, refused]


errors, test_on_four_processes = rank_tests(RANKS, CASES)
