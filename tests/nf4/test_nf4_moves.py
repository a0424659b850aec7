"""NF4 models that are saved, loaded, moved and shared between processes."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.nn import NF4Linear

pytestmark = pytest.mark.filterwarnings("ignore:.*bytes for each value of an NF4 weight")


def model(seed: int = 0) -> Any:
    return pk.quantize_model(models.base_model("dense", torch.bfloat16, seed))


def x() -> Tensor:
    return testing.tensor(3, 64, dtype=torch.bfloat16)


def test_share_memory() -> None:
    net = model()
    y = net(x())
    assert not net.q.weight.is_shared()
    assert net.share_memory() is net and net.q.weight.is_shared()
    assert all(t.is_shared() for t in net.q.weight._state.tensors().values())
    assert isinstance(net.q.weight, pk.NF4Weight) and torch.equal(net(x()), y)


def answer(net: nn.Module, given: torch.Tensor, queue: Any) -> None:
    queue.put(net(given).detach().float().numpy())


def test_other_process_reads_shared_memory() -> None:
    context = mp.get_context("spawn")
    net, queue = model().share_memory(), context.Queue()
    process = context.Process(target=answer, args=(net, x(), queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=120))
    process.join(timeout=60)
    assert process.exitcode == 0 and torch.equal(got, net(x()).detach().float())


@pytest.mark.parametrize("merged", [False, True], ids=["packed", "merged"])
def test_weights_only(merged: bool) -> None:
    net, delta = model(), torch.ones(128, 64, dtype=torch.bfloat16)
    if merged:
        net.q.weight.data += delta
    got = models.saved_and_loaded({"q": net.q.weight}, weights_only=True)["q"]
    assert isinstance(got, pk.NF4Weight) and isinstance(got, nn.Parameter) and not got.requires_grad
    assert torch.equal(got.dequantize(), net.q.weight.dequantize()) and got.is_merged == merged
    if merged:
        got.data -= delta
    assert not got.is_dense
    fresh = model(seed=1)
    assert not fresh.load_state_dict(
        models.saved_and_loaded(model().state_dict(), weights_only=True)
    ).missing_keys
    assert torch.equal(fresh(x()), model()(x()))


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    net, other = model(), model(seed=1)
    safetensors.save_model(net, str(tmp_path / "model.safetensors"))
    assert safetensors.load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(other(x()), net(x()))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_from_the_meta_device(assign: bool) -> None:
    net = model()
    empty = copy.deepcopy(net).to("meta")
    assert empty.q.weight.device.type == "meta" and isinstance(empty.q.weight, pk.NF4Weight)
    if not assign:
        empty.to_empty(device="cpu")
        assert isinstance(empty.q.weight, pk.NF4Weight) and empty.q.weight.device.type == "cpu"
    empty.load_state_dict(net.state_dict(), assign=assign)
    assert torch.equal(empty(x()), net(x())) and not empty.q.weight.is_dense
    empty.q.weight.data += 1
    assert not net.q.weight.is_dense


def test_fp64_is_computed_densely() -> None:
    net = model()
    want = net.q.weight.dequantize().double()
    net.double()
    assert net.q.weight.is_dense and torch.equal(net.q.weight.dequantize(), want)
    assert net(x().double()).dtype == torch.float64


def test_assigning_a_cast_keeps_the_dtype() -> None:
    """PEFT's kbit preparation runs `param.data = param.data.to(torch.float32)`; it widens nothing."""
    weight = model().q.weight
    packed = weight.packed
    weight.data = weight.data.to(torch.float32)
    weight.data = weight.data.float()
    assert weight.dtype == torch.bfloat16 and weight.packed is packed
    cast = weight.data.to(torch.float32)
    cast.copy_(model(seed=1).q.weight)
    weight.data = cast
    assert weight.dtype == torch.float32 and torch.equal(weight.packed, model(seed=1).q.weight.packed)
    cast = weight.data.half()
    cast += 1
    weight.data = cast
    assert weight.is_dense and weight.dtype == torch.float16, "what was written to a cast is not lost"
    other = model().q.weight
    other.data = model(seed=1).q.weight.data.to(torch.float32)
    assert other.dtype == torch.float32, "a cast of another weight"


@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copied_model_reports_itself(copying: Any) -> None:
    net = model()
    other = copying(net)
    for layer in (other.q, other.o):
        layer.weight.data *= 2
        layer.revert_to_linear_if_dense()
    assert type(other.q) is nn.Linear and vars(other).keys() == vars(models.Net()).keys()
    assert net.is_loaded_in_4bit and isinstance(net.q, NF4Linear)
    alone = copying(net.q)
    alone.weight.data *= 2
    assert type(alone.revert_to_linear_if_dense()) is nn.Linear and net.is_loaded_in_4bit
    assert len(pickle.dumps(net.q)) < len(pickle.dumps(net)) - 1000, "a layer does not take its model along"


def test_memory_and_parameter_counts() -> None:
    weight = model().q.weight
    assert weight.numel() == 128 * 64
    assert 0 <= weight.nelement() * weight.element_size() - weight.nbytes < weight.element_size()
    assert (weight.float().numpy() == weight.dequantize(torch.float32).numpy()).all()
    assert weight.float().tolist() == weight.dequantize(torch.float32).tolist()


@pytest.mark.parametrize(
    "version,is_old", [("1.10.1", True), ("1.13.0", True), ("1.14.0", False), ("2.0.0.dev0", False)]
)
def test_ram_efficient_loading_needs_an_accelerate_that_sends_by_name(
    version: str, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier one sends tensors to the wrong names, which ends a process or gives wrong weights."""
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(__version__=version))
    model().to("meta")  # nothing is sent
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    model().to(torch.float32)
    if is_old:
        message = rf"^FSDP_CPU_RAM_EFFICIENT_LOADING: expected accelerate 1\.14 or later, .* got {version}: "
        with pytest.raises(RuntimeError, match=message):
            model().to("meta")
    else:
        assert model().to("meta").q.weight.is_meta
