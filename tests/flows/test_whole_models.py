"""Whole patched models in torch: copies, threads, export, transforms, FLOP counters, the meta device."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from flow_checks import Calls, assert_fused, assert_near, language_loss, step
from flow_models import Logits, adapted, ids, llama, patched_copy
from installed import before
from rounding import ONE_STEP
from torch import Tensor

import peft_kernels as pk
import testing

OWN = pytest.mark.parametrize("base", ["dense", "nf4"])


def one_step(model: Any) -> dict[str, Tensor]:
    return step(model, lambda m: language_loss(m, ids()))


@OWN
def test_two_threads(base: str) -> None:
    """Repeated concurrent steps on one patched model give the results of a single thread."""
    stock = adapted(llama(base))
    model, report = patched_copy(stock)
    batches = [ids(1), ids(2)]

    def results(model: Any, batch: Tensor) -> dict[str, Tensor]:
        """Gradients without `.grad`, which threads would share."""
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = language_loss(model, batch)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        return {"loss": loss.detach(), **dict(zip(parameters, grads, strict=True))}

    want = [results(stock, batch) for batch in batches]
    got: list[list[dict[str, Tensor]]] = [[], []]
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(8):
                got[i].append(results(model, batches[i]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for i in range(2):
        assert len(got[i]) == 8
        for result in got[i]:
            assert_near(result, want[i], ONE_STEP)
    with Calls() as calls:
        language_loss(model, ids())
    ops = ("gated_mlp", "multi_lora_linear", "lora_linear", "attention")
    assert all(calls.counts[op] == 2 for op in ops), calls.counts
    assert_fused(model, report, blocks=2)


@pytest.mark.slow
@OWN
def test_export(base: str) -> None:
    stock = adapted(llama(base, num_hidden_layers=1)).eval()
    model, report = patched_copy(stock)
    with torch.no_grad():
        program = torch.export.export(Logits(model), (ids(),), strict=False)
        assert_near({"y": program.module()(ids(3))}, {"y": Logits(stock)(ids(3))})
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("peft_kernels" in name and "gated_mlp" in name for name in called), called
    assert_fused(model, report, blocks=1)


@OWN
def test_functional_gradients(base: str) -> None:
    stock = adapted(llama(base, num_hidden_layers=1)).eval()
    model, report = patched_copy(stock)
    names = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def gradients(model: Any) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(
                model, parameters, (), {"input_ids": ids(), "labels": ids(), "use_cache": False}
            ).loss

        return torch.func.grad(loss)(names)

    assert_near(gradients(model), gradients(stock))
    assert_fused(model, report, blocks=1)


@OWN
def test_vmap_of_gradients(base: str) -> None:
    """Per-sample gradients of a layer."""
    stock = adapted(llama(base, num_hidden_layers=1)).eval()
    model, _ = patched_copy(stock)

    def each(model: Any, part: str) -> dict[str, Tensor]:
        layer = model.get_submodule(f"base_model.model.model.layers.0.{part}")
        names = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(names, testing.tensor(3, 5, 64))

    for part in ("mlp", "self_attn.q_proj"):
        assert_near(each(model, part), each(stock, part))


@OWN
def test_forward_under_fake_tensors(base: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, _ = patched_copy(adapted(llama(base)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = model(input_ids=torch.ones(2, 5, dtype=torch.long), use_cache=False).logits
    assert out.shape == (2, 5, 128)


@OWN
def test_state_dicts_equal_stock_s(base: str) -> None:
    stock = adapted(llama(base))
    model, _ = patched_copy(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert repr(model) == repr(stock)
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in stock.modules()]
    pk.unpatch(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert_near(one_step(model), one_step(stock), 1e-12)


@OWN
def test_a_step_on_the_meta_device(base: str) -> None:
    """Nothing reads a value: sizes of a step can be found without memory."""
    if before("transformers", "5.10"):
        pytest.skip("transformers before 5.10 asks for autocast of the meta device")
    model, _ = patched_copy(adapted(llama(base)))
    model.to("meta")
    loss = language_loss(model, ids().to("meta"))
    loss.backward()
    assert loss.is_meta and loss.shape == ()
