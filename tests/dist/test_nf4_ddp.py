"""NF4 models in DistributedDataParallel: the bytes it sends, and the processes' weights afterwards. Two
processes over gloo."""

from __future__ import annotations

import contextlib
import copy
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import MARKS, Sent, rank_tests
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peft_kernels as pk
import testing

peft = pytest.importorskip("peft", reason="PEFT is not installed")

pytestmark = MARKS
NEAR_NOTHING = 2048
"""Bytes of the fingerprints and of what DDP itself compares."""


class Wrapper(nn.Module):
    """A trainer's module around the model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def adapted(seed: int = 0, **options: Any) -> Any:
    model = pk.quantize_model(models.base_model("dense", seed=seed), **options)
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q", "o"], init_lora_weights=False))


def packed(model: nn.Module) -> dict[str, pk.NF4Weight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, pk.NF4Weight)}


def dense_nbytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if not isinstance(p, pk.NF4Weight))


def wrapped(model: nn.Module, **options: Any) -> tuple[DistributedDataParallel, int]:
    """Returns the wrapped model and the bytes sent for it."""
    with Sent() as sent:
        ddp = DistributedDataParallel(model, **options)
    return ddp, sent.nbytes


def assert_equal_in_all_processes(model: nn.Module) -> None:
    """Asserts equal outputs and gradients in all processes, and a packed base."""
    found = [model(testing.tensor(5, 64)).detach()]
    model(testing.tensor(5, 64, seed=dist.get_rank())).square().sum().backward()
    found += [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) > 2
    for value in found:
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(value, first)
    assert packed(model) and not any(weight.is_dense for weight in packed(model).values())


# Each case runs in both processes.


def same_bytes(folder: Path) -> None:
    """Nothing is sent for an NF4 model, however it is wrapped and whenever it is patched."""
    for case in ("bare", "adapted", "inside", "patched before", "patched after"):
        model: Any = pk.quantize_model(models.base_model("dense")) if case == "bare" else adapted()
        if case == "inside":
            model = Wrapper(model)
        if case == "patched before":
            pk.patch(model)
        before = {name: weight.packed.data_ptr() for name, weight in packed(model).items()}
        ddp, nbytes = wrapped(model)
        assert dense_nbytes(model) <= nbytes < dense_nbytes(model) + NEAR_NOTHING, case
        assert {name: weight.packed.data_ptr() for name, weight in packed(model).items()} == before
        if case == "patched after":
            pk.patch(ddp)
        assert_equal_in_all_processes(ddp)


OTHERS = ("nvfp4", "int4", "fp8", "int8")


def other_bytes(folder: Path) -> None:
    """A process with other bytes receives the packed bytes of the first, and warns."""
    rank = dist.get_rank()
    for quantise in ({}, {"double_quant": False}, {"blocksize": 128}, *({"format": f} for f in OTHERS)):
        model, first = Wrapper(adapted(seed=rank, **quantise)), adapted(**quantise)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ddp, nbytes = wrapped(model)
        seen = [str(each.message) for each in caught if "other packed weights" in str(each.message)]
        assert len(seen) == rank and all(
            "process 1 had other packed weights than process 0" in t for t in seen
        )
        size = dense_nbytes(model) + sum(weight.nbytes for weight in packed(model).values())
        assert size <= nbytes < size + NEAR_NOTHING
        for weight, want in zip(packed(model).values(), packed(first).values(), strict=True):
            assert torch.equal(weight.packed, want.packed) and torch.equal(weight.absmax, want.absmax)
            assert torch.equal(weight.dequantize(), want.dequantize())
        assert_equal_in_all_processes(ddp)


def other_layout(folder: Path) -> None:
    """Both processes raise, and neither waits."""
    for options in ({"blocksize": 64 << dist.get_rank()}, {"format": ("nf4", "fp4")[dist.get_rank()]}):
        with pytest.raises(
            RuntimeError, match=r"expected packed weights of the same .* got others in process 1"
        ):
            DistributedDataParallel(adapted(**options))


def in_one_process_only(folder: Path) -> None:
    """The process with NF4 weights raises after the timeout; the other has no error yet."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    model: Any = adapted() if dist.get_rank() == 0 else models.base_model("dense")
    if dist.get_rank() == 1:
        torch.manual_seed(3)
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q", "o"], init_lora_weights=False)
        )
        with contextlib.suppress(RuntimeError):
            DistributedDataParallel(model, process_group=group)
    else:
        with pytest.raises(
            RuntimeError, match=r"expected packed weights in every process.*one has not answered"
        ):
            DistributedDataParallel(model, process_group=group)
    dist.barrier()


def flattened(folder: Path) -> None:
    """Flattened as by FSDP1 and DeepSpeed's ZeRO-3: every process raises, naming the weight and a fix."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted()
    with pytest.raises(ValueError, match=r"q.weight: data: expected shape .* FSDP1 .*fully_shard"):
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    weight = adapted().base_model.model.o.base_layer.weight
    with pytest.raises(ValueError, match=r"o.weight: data: expected shape \(64, 128\), got \(0,\): FSDP1"):
        weight.data = torch.empty(0, dtype=weight.dtype)
    assert not weight.is_dense


def other_adapters(folder: Path) -> None:
    """DDP's own error is raised in both processes."""
    model = adapted()
    if dist.get_rank() == 1:
        model.add_adapter("more", peft.LoraConfig(target_modules=["q"], r=4))
        model.base_model.set_adapter(["default", "more"])
    with pytest.raises(RuntimeError, match="expects same model across all ranks"):
        DistributedDataParallel(model)


def uint8_tensors(folder: Path) -> None:
    """The model's own uint8 tensors are sent as well as the packed ones."""
    for other in (0, 1):
        model = Wrapper(adapted(seed=other * dist.get_rank()))
        mine = torch.full((3, 5), 7 + dist.get_rank(), dtype=torch.uint8)
        model.register_buffer("mask", mine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ddp, _ = wrapped(model)
        assert model.mask.eq(7).all()
        assert_equal_in_all_processes(ddp)


def dense_and_merged(folder: Path) -> None:
    """A dense weight is copied from the first process; a merged one stays merged, and unmerges."""
    rank = dist.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, merged = adapted(), adapted()
        weight = model.base_model.model.q.base_layer.weight
        weight.copy_(testing.tensor(128, 64, seed=rank))
        before = copy.deepcopy(packed(merged))
        merged.merge_adapter()
        for each in (model, merged):
            each.extra = nn.Parameter(torch.ones(3))  # nothing else trains in a merged model
            wrapped(each)
        assert weight.is_dense and torch.equal(weight.dequantize(), testing.tensor(128, 64))
        assert all(each.is_merged for each in packed(merged).values())
        merged.unmerge_adapter()
    for name, each in packed(merged).items():
        assert not each.is_dense and torch.equal(each.packed, before[name].packed)


def experts(folder: Path) -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dense = testing.tensor(3, 32, 64, seed=dist.get_rank())
            self.weight = nn.Parameter(pk.NF4Weight.quantize(dense), requires_grad=False)
            self.router = nn.Linear(64, 3)

    model = Mixture()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, nbytes = wrapped(model)
    assert nbytes < dense_nbytes(model) + model.weight.nbytes + NEAR_NOTHING
    assert not model.weight.is_dense
    assert torch.equal(model.weight.packed, pk.NF4Weight.quantize(testing.tensor(3, 32, 64)).packed)


def mixed_precision(folder: Path) -> None:
    """DDP's mixed precision would keep a dense copy of each frozen parameter that it does not ignore."""
    from torch.nn.parallel.distributed import _MixedPrecision, _setup_mixed_precision_params

    model = adapted()
    _setup_mixed_precision_params(_MixedPrecision(param_dtype=torch.bfloat16), model)
    assert not any(hasattr(weight, "_mp_param") for weight in packed(model).values())
    assert all(hasattr(p, "_mp_param") for p in model.parameters() if p.requires_grad)


CASES = [
    same_bytes, other_bytes, other_layout, flattened, other_adapters, uint8_tensors, dense_and_merged,
    experts, mixed_precision, in_one_process_only,
]  # fmt: skip


errors, test_on_two_processes = rank_tests(2, CASES)


def test_detach_keeps_nf4() -> None:
    """For all callers but DDP, which is recognised by its function's code."""
    weight = adapted().base_model.model.q.base_layer.weight

    def _sync_module_states() -> Tensor:
        return weight.detach()

    assert isinstance(_sync_module_states(), pk.NF4Weight)
    assert isinstance(weight.detach(), pk.NF4Weight)
