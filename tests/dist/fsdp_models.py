"""NF4 models, and processes that shard them with FSDP2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nf4_weights import parts
from ranks import Case
from rounding import ONE_LAYER
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import peft_kernels as pk
import testing

RANKS = 4
VOCABULARY = 97
ADAMW = {"lr": 1e-3, "eps": 1e-4}
MOVED = 2 * ADAMW["lr"] / ADAMW["eps"] * ONE_LAYER
"""Bound for adapters after two steps: AdamW divides a gradient by eps or more."""


def line(ranks: int) -> Any:
    """A mesh of the first `ranks` processes, None in the others. Every process must call it."""
    mesh = DeviceMesh("cpu", list(range(ranks)))
    return mesh if dist.get_rank() < ranks else None


def on(ranks: int) -> Callable[[Callable[[Path, Any], None]], Case]:
    """Runs a case in the first `ranks` processes only, with their mesh."""

    def decorated(case: Callable[[Path, Any], None]) -> Case:
        @functools.wraps(case)
        def run(folder: Path) -> None:
            mesh = line(ranks)
            if mesh is not None:
                case(folder, mesh)

        return run

    return decorated


def square() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))


def weight(shape: tuple[int, ...], blocksize: int, nested: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    values = testing.tensor(*shape, seed=sum(shape)).to(dtype)
    return pk.NF4Weight.quantize(values, blocksize, nested)


def assert_same_bits(got: Any, want: Any) -> None:
    """Compares two packed weights."""
    assert type(got) is pk.NF4Weight or isinstance(got, nn.Parameter), type(got)
    mine, its = parts(got), parts(want)
    assert mine.keys() == its.keys() and got.shape == want.shape and not got.is_dense
    for name, tensor in mine.items():
        # Values of scale codes include NaN.
        torch.testing.assert_close(tensor, its[name], rtol=0, atol=0, equal_nan=True, msg=name)


def llama(layers: int = 2, patch: bool = False, **changes: Any) -> Any:
    """A small model with NF4 layers and LoRA, equal in every process."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=True, **(sizes | changes)
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    pk.quantize_model(model)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    if patch:
        assert not pk.patch(model).original
    return model


def shard(model: Any, mesh: Any, **options: Any) -> Any:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batches(ranks: int, steps: int = 3) -> Tensor:
    """(steps, sequences, tokens): two sequences for each process."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (steps, 2 * ranks, 12), generator=generator)


def adapters(model: Any) -> dict[str, Tensor]:
    """Trained parameters, gathered, by name."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in trained.items()}


def train(model: Any, optimizer: Any, data: Tensor, mesh: Any = None, ranks: int = 1) -> list[float]:
    """Losses on the global batch, of which each process of the mesh gets its own sequences."""
    losses = []
    for ids in data:
        mine = ids if mesh is None else ids.chunk(ranks)[dist.get_rank()]
        optimizer.zero_grad()
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if mesh is not None:
            for dim in range(mesh.ndim):
                dist.all_reduce(total, group=mesh.get_group(dim))
            total /= ranks
        losses.append(float(total))
    return losses


@contextmanager
def gathers() -> Iterator[list[tuple[int, torch.dtype]]]:
    """Bytes and dtype that this process sends to each all-gather of FSDP2."""
    found: list[tuple[int, torch.dtype]] = []
    original = dist.all_gather_into_tensor

    def counted(output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append((input_tensor.nbytes, input_tensor.dtype))
        return original(output_tensor, input_tensor, *args, **kwargs)

    dist.all_gather_into_tensor = counted
    try:
        yield found
    finally:
        dist.all_gather_into_tensor = original
