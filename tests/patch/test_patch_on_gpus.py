"""Which parts `pk.patch` installs on a GPU: those of whose ops a back end has kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels as pk
from peft_kernels.core import dispatch
from peft_kernels.core.backends import BACKENDS
from peft_kernels.core.op import OPS
from peft_kernels.patch.block import decoder_layer

NORMS = ("rms_norm", "add_rms_norm", "rms_norm_backward")
NONE = "cuda has no kernel for it here; see pk.explain()"


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """A Llama on a GPU that need not be there."""
    with FakeTensorMode(), torch.device("cuda"):
        yield models.tiny_llama()


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch, model: Any) -> Callable[..., dict[str, set[str]]]:
    """Returns a function: the reasons against each kind of block, where `cuda` has kernels of these ops."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())

    def found(*kernels: str) -> dict[str, set[str]]:
        monkeypatch.setattr(dispatch, "_has_kernel", {})
        cuda = BACKENDS["cuda"]
        monkeypatch.setattr(cuda, "probe", lambda: None)
        monkeypatch.setattr(cuda, "supports", lambda op, args: None)
        monkeypatch.setattr(cuda, "has_kernel", lambda op: not OPS[op].composite or op in kernels)
        monkeypatch.setattr(BACKENDS["triton"], "probe", lambda: "not today")
        blocks: dict[str, set[str]] = {}
        for entry in pk.patch(model, dry_run=True).blocks:
            blocks.setdefault(entry.kind, set()).add(entry.reason)
        return blocks

    return found


def test_all_parts(reasons: Callable[..., dict[str, set[str]]]) -> None:
    assert reasons(*NORMS, "rotary", "attention") == {
        "attention LlamaAttention": {""},
        "norm LlamaRMSNorm": {""},
        "decoder layer LlamaDecoderLayer": {""},
    }


def test_each_part_asks_for_its_own_op(reasons: Callable[..., dict[str, set[str]]]) -> None:
    found = reasons()
    assert len(found) == 3 and all(reason.endswith(NONE) for reasons in found.values() for reason in reasons)
    found = reasons("rotary")
    assert found["attention LlamaAttention"] == {""} and found["norm LlamaRMSNorm"] == {NONE}
    found = reasons("rms_norm")
    assert found["norm LlamaRMSNorm"] == {""} and "attention LlamaAttention" not in found
    assert found["decoder layer LlamaDecoderLayer"] == {f"input_layernorm: {NONE}"}
    found = reasons(*NORMS)
    assert found["decoder layer LlamaDecoderLayer"] == {""}


def test_the_loss_needs_kernels_for_frozen_and_trained_heads(
    reasons: Callable[..., dict[str, set[str]]], model: Any
) -> None:
    ops = "linear_cross_entropy", "linear_cross_entropy_trained"
    for kernels, reason in ((ops, ""), (ops[:1], NONE), (ops[1:], NONE)):
        reasons(*kernels)
        (entry,) = pk.patch(model, dry_run=True).losses
        assert entry.reason == reason, kernels
        assert "not fully fused" not in str(pk.patch(model, dry_run=True)), "the device has no kernel"


def test_triton_has_kernels_for_all_but_attention(
    reasons: Callable[..., dict[str, set[str]]], monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    reasons()
    monkeypatch.setattr(dispatch, "_has_kernel", {})
    monkeypatch.setattr(BACKENDS["cuda"], "probe", lambda: "not built")
    monkeypatch.setattr(BACKENDS["triton"], "probe", lambda: None)
    monkeypatch.setattr(BACKENDS["triton"], "supports", lambda op, args: None)
    report = pk.patch(model, dry_run=True)
    assert {entry.reason for entry in (*report.blocks, *report.losses)} == {""} and report.losses


def test_the_report_names_attention_that_stays(
    reasons: Callable[..., dict[str, set[str]]], model: Any
) -> None:
    reasons(*NORMS, "rotary")
    with pk.patched(model) as report:
        assert [entry.note for entry in report.blocks if "Attention" in entry.kind] == [NONE] * 2


def test_autocast_is_that_of_the_input(
    reasons: Callable[..., dict[str, set[str]]], monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    """`torch.autocast` would switch itself off without a card."""
    reasons("rotary")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    half = model.train().model.layers[0].self_attn
    with pk.patched(model):
        assert decoder_layer._rounds_to(half, {}, half.q_proj.weight) == torch.get_autocast_dtype("cuda")
        assert decoder_layer._rounds_to(half, {}, torch.empty(1, device="cpu")) is None


def test_plain_torch_is_not_installed(reasons: Callable[..., dict[str, set[str]]], model: Any) -> None:
    """Where the reference is forced, the model's own code is as fast."""
    reasons(*NORMS, "rotary")
    with pk.use_backend("reference"):
        blocks = pk.patch(model, dry_run=True).blocks
        assert {entry.reason for entry in blocks if entry.kind.startswith("norm")} == {NONE}
