"""A decoded token can be captured in a CUDA graph: host code on a stub device, and the library.

In a capture nothing may synchronise with the device or read from it, memory must come from torch's allocator
(or exist already), and launches must not depend on state of earlier calls.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama
from skips import needs
from stub_device import A100, H100, Launch, Launches, stub_device
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
import testing
from peft_kernels.core.backends import cuda

needs_stub = needs("ptx")

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_dim", "_unique2", "masked_select"}
"""ATen functions that synchronise: their results, or the sizes of these, go to the host."""
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
"""Methods of tensors that synchronise, called by Python."""


class NoReads(TorchDispatchMode):
    """Raises AssertionError if an op synchronises with the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in WAITS or (func is torch.ops.aten.index.Tensor and _has_mask(args[1])):
            raise AssertionError(f"{func} in a token")
        return func(*args, **(kwargs or {}))


class NoCopies(TorchFunctionMode):
    """Raises AssertionError if Python moves a tensor to the CPU, unseen by NoReads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "to" and "cpu" in [v for v in (*args, *kwargs.values()) if type(v) is str]:
            raise AssertionError(f"Tensor.{name} in a token")
        return func(*args, **kwargs)


def _refused(name: str) -> Any:
    def read(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"Tensor.{name} in a token")

    return read


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


@contextmanager
def nothing_read() -> Iterator[None]:
    with NoReads(), NoCopies(), pytest.MonkeyPatch.context() as patch:
        # Not in NoCopies: modes do not see what the Python part of an op does.
        for name in READS:
            patch.setattr(torch.Tensor, name, _refused(name))
        yield


class Token:
    """Decodes one token with a patched Llama with NF4 weights, into a static cache."""

    def __init__(self) -> None:
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        model = tiny_llama(hidden_size=256, intermediate_size=512).to(torch.bfloat16).eval()
        self.config = model.config
        pk.quantize_model(model)
        options = {"r": 8, "lora_dropout": 0.05, "target_modules": "all-linear"}
        self.model = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
        # On the stub tensors are on the CPU, where patch would install these too.
        self.report = pk.patch(self.model, without=("attention", "loss"))
        self.cache = transformers.StaticCache(config=self.config, max_cache_len=16)
        self.inputs = {
            "input_ids": torch.tensor([[3]]),
            "position_ids": torch.tensor([[5]]),
            "cache_position": torch.tensor([5]),
        }

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.model(**self.inputs, past_key_values=self.cache, use_cache=True).logits


@needs_stub
@pytest.mark.parametrize("card", [A100, H100], ids=["A100", "H100"])
def test_a_token_on_the_stub(card: tuple[int, int, int]) -> None:
    token = Token()
    with stub_device(card) as launches:
        token()  # one-time set-up
        first = _launched(token, launches)
        with nothing_read():
            second = _launched(token, launches)
        inside = _inside_our_ops(token)
    assert not token.report.original, str(token.report)
    assert second == first
    # Two blocks, each with seven projections, two norms and rotary embeddings, and a last norm.
    kernels = Counter(launch.kernel.split("<")[0].split("::")[-1] for launch in first)
    assert (kernels["LinearSmall"], kernels["RmsNorm"], kernels["RotaryHalves"]) == (14, 5, 2)
    assert inside <= ALLOWED_INSIDE, inside - ALLOWED_INSIDE


@needs_stub
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_a_training_step_on_the_stub(autocast: bool) -> None:
    """The host does not wait for the device in norms, rotary embeddings, residual sums, MLPs and layers."""
    model, ids = Token().model.train(), torch.tensor([[3, 17, 9, 40], [5, 1, 77, 2]])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids).loss.backward()

    with stub_device() as launches:
        step()  # one-time set-up
        launches()
        with nothing_read():
            step()
        kernels = {launch.kernel.split("<")[0].split("::")[-1] for launch in launches()}
    assert kernels >= {"RmsNorm", "RmsNormBackward", "RotaryHalves", "Gated"}, kernels


ALLOWED_INSIDE = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided"),
    *("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::slice", "aten::t", "aten::transpose"),
    *("aten::as_strided", "aten::detach", "aten::to", "aten::contiguous"),
}
"""Allocations and views: the only torch functions that 16-bit ops use for a token."""


def _launched(token: Token, launches: Launches) -> list[Launch]:
    launches()
    token()
    return launches()


def _inside_our_ops(token: Token) -> set[str]:
    """The torch functions called by our ops."""
    with torch.autograd.profiler.profile() as profile:
        token()
    found: set[str] = set()

    def gather(event: Any) -> None:
        for child in event.cpu_children:
            if not child.name.startswith("peft_kernels"):
                found.add(child.name)
            gather(child)

    ours = [event for event in profile.function_events if event.name.startswith("peft_kernels")]
    assert ours
    for event in ours:
        gather(event)
    return found


@needs_stub
@pytest.mark.parametrize(
    "read", ["x.sum().item()", "x.nonzero()", "x[x > 0]", "x.cpu()", "x.to('cpu')", "bool(x.sum())"]
)
def test_reads_are_detected(read: str) -> None:
    with pytest.raises(AssertionError, match="in a token"), nothing_read():
        eval(read, {"x": testing.tensor(3)})


IN_CAPTURES = {
    "cudaLaunchKernel": "becomes a node",
    "cudaMemsetAsync": "becomes a node",
    "cudaStreamGetCaptureInfo": "a query",
    "cudaStreamGetCaptureInfo_v2": "a query",
    "cudaStreamIsCapturing": "a query",
    "cudaStreamGetId": "a query, outside of captures only",
    "cudaGetDevice": "a query",
    "cudaDeviceGetAttribute": "a query",
    "cudaGetLastError": "a query",
    "cudaGetErrorString": "a query",
    "cudaGetErrorName": "a query",
    "cudaGetDriverEntryPointByVersion": "a query",
    "cudaFuncSetAttribute": "acts on a kernel, not on a stream",
    "cudaMalloc": "only in counters.cpp, in relaxed mode",
    "cudaThreadExchangeStreamCaptureMode": "for cudaMalloc",
    "cudaUserObjectCreate": "a graph's counters",
    "cudaGraphRetainUserObject": "a graph's counters",
}
"""Every CUDA runtime function that the library calls, and why it is allowed in a capture."""
OF_TORCH = {
    "current_device",
    "getCurrentCUDAStream",
    "ExchangeDevice",
    "MaybeSetDevice",
    "CUDAStream::stream",
}
"""The functions of c10::cuda that it calls."""


def imported() -> list[str]:
    """The undefined symbols of the compiled library, without arguments."""
    nm = shutil.which("nm")
    if nm is None or cuda.BACKEND._extension is None:
        pytest.skip("no nm" if nm is None else "cuda: not built")
    command = [nm, "-D", "--undefined-only", "-C", str(Path(cuda.BACKEND.extension.__file__))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [re.sub(r"[(@].*", "", line.split(maxsplit=1)[1]) for line in output.splitlines()]


def test_every_cuda_call_is_allowed_in_a_capture() -> None:
    names = imported()
    runtime = {name for name in names if re.match(r"cuda[A-Z]", name)}
    assert "cudaLaunchKernel" in runtime
    assert runtime <= IN_CAPTURES.keys(), runtime - IN_CAPTURES.keys()
    of_torch = {name.removeprefix("c10::cuda::") for name in names if name.startswith("c10::cuda::")}
    assert of_torch - {"c10_cuda_check_implementation"} <= OF_TORCH, of_torch - OF_TORCH


def test_nothing_in_the_library_reads_from_the_device() -> None:
    called = Counter(
        match[1] for name in imported() if (match := re.match(r"at::_ops::(\w+?)(_\w+)?::call", name))
    )
    assert called["mm"], "no calls of torch found"
    words = WAITS | {"item", "is_nonzero", "_to_copy", "copy", "to_device", "nonzero_static", "unique"}
    # The loss counts its labels, outside of captures alone (test_cross_entropy_cuda.py).
    assert called.keys() & words <= {"nonzero"}, called.keys() & words
    methods = {
        name for name in imported() if re.match(r"at::Tensor(Base)?::(item|cpu|_local_scalar_dense)", name)
    }
    assert not methods, methods
