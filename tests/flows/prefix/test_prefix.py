"""PEFT's prefix tuning, patched against stock: the same values, also under gradient checkpointing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import flow_families
import peft
import pytest
import torch
from flow_checks import assert_near, assert_same_numbers, step
from flow_models import in_fp64, logged, patched_copy, trainer
from prefix_models import FAMILIES, bare, batch, loss, prefixed
from rounding import BF16_STEP, ONE_LAYER, ONE_MODEL, ONE_STEP
from skips import require_pickles
from test_gradient_needs import Unused

import peft_kernels as pk
import testing
from peft_kernels.patch import fused
from peft_kernels.patch.prefix import cache as prefix_cache

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
CASES = [(family, base) for family in FAMILIES for base in ("dense", "nf4")]
CASES.remove(("gpt2", "nf4"))  # its layers are not nn.Linear


def checkpoint(model: Any, reentrant: bool = False) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize(("family", "base"), CASES)
def test_steps_equal_stock(family: str, base: str, projection: bool) -> None:
    """In training mode, with dropout."""
    stock = prefixed(bare(family, base), projection)
    want = step(stock, loss)
    assert all(want[name].abs().sum() > 0 for name in want if "transform.2.weight" in name or "embed" in name)
    model, report = patched_copy(stock)
    assert_near(step(model, loss), want)
    for reentrant in (False, True):
        checkpoint(model, reentrant)
        assert_near(step(model, loss), want)
        model.eval()  # nothing is recomputed
        assert loss(model).item() == pytest.approx(loss(stock.eval()).item(), rel=ONE_MODEL)
        model.train()
        stock.train()
    assert not report.prefixes[0].fallbacks


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_in_bf16_are_summed_like_stock_s(checkpointed: bool) -> None:
    """Gradients are summed over the batch in the prefix's fp32, not in the model's dtype."""

    def sample(i: int) -> tuple[Any, Any, Any]:
        rows = {name: value.repeat(8, 1) for name, value in batch(stock, seed=i).items()}
        return tuple(step(each, lambda model: model(**rows).loss) for each in (model, stock, truth))  # type: ignore[return-value]

    stock = prefixed(bare("llama").to(torch.bfloat16))
    stock.prompt_encoder.float()
    truth = in_fp64(stock)
    model, _ = patched_copy(stock)
    if checkpointed:
        checkpoint(model)
    assert_same_numbers(sample, bound=BF16_STEP)


def test_a_shared_prefix_rounds_its_gradient_once() -> None:
    prefix = testing.tensor(1, 2, 3, 4).requires_grad_()
    dy = testing.tensor(64, 2, 3, 4, dtype=torch.bfloat16, seed=1)
    prefix_cache.shared(prefix, 64, torch.bfloat16).backward(dy)
    assert testing.relative_error(prefix.grad, dy.double().sum(0, keepdim=True)) < ONE_LAYER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_prefix_that_no_loss_depends_on_has_no_gradient(dtype: torch.dtype) -> None:
    prefix = testing.tensor(1, 2, 3, 4).requires_grad_()
    Unused.apply(prefix_cache.shared(prefix, 64, dtype)).sum().backward()
    assert prefix.grad is None


def test_report_has_one_line_for_the_prefix() -> None:
    stock = prefixed(bare("llama"))
    line = "PEFT prefix tuning PeftModelForCausalLM: one prefix for the batch; gradient checkpointing works"
    assert line in pk.explain(stock) and "the model is not patched" in pk.explain(stock)
    model, report = patched_copy(stock)
    assert line in str(report) and line in pk.explain(model) and "nothing to patch" not in str(report)
    assert "fused" in report.details() and "not patched" not in pk.explain(model)
    assert "prefix" not in str(pk.patch(bare("llama")))
    stock.base_model.config.num_kv_shared_layers = 1
    assert "no gradient checkpointing, 1 layers of LlamaForCausalLM take keys" in str(pk.patch(stock))
    checkpoint(stock)
    with pytest.raises(RuntimeError, match="no gradient checkpointing here, 1 layers"):
        loss(stock)


def test_layers_with_another_index_name() -> None:
    """GPT-Neo's layers have a layer_id; without one they cannot be recomputed, and the report says so."""
    stock = prefixed(flow_families.tiny("gpt_neo"))
    model, report = patched_copy(stock)
    assert "gradient checkpointing works" in str(report)
    checkpoint(model)
    assert_near(step(model, loss), step(stock, loss))
    for module in model.modules():
        vars(module).pop("layer_id", None)
    assert "no gradient checkpointing, nothing in GPTNeoBlock tells which layer" in str(report)
    with pytest.raises(RuntimeError, match="no gradient checkpointing here, nothing in GPTNeoBlock"):
        loss(model)
    none = pk.explain(prefixed(flow_families.tiny("jetmoe")))
    assert "no gradient checkpointing, transformers has none for JetMoeForCausalLM" in none


@REENTRANT
def test_checkpointing_saves_memory(reentrant: bool) -> None:
    model = prefixed(bare("llama", num_hidden_layers=4))
    pk.patch(model)
    there = [*model.parameters(), *model.buffers()]
    whole = testing.saved_bytes(lambda: loss(model), there)
    checkpoint(model, reentrant)
    assert testing.saved_bytes(lambda: loss(model), there) < 0.5 * whole


def test_the_prefix_is_computed_once_for_the_batch() -> None:
    model = prefixed(bare("llama"), projection=True)
    rows = []
    model.prompt_encoder["default"].transform.register_forward_hook(lambda *a: rows.append(a[2].numel()))
    loss(model)
    pk.patch(model)
    loss(model)
    assert rows[0] == 2 * rows[1]
    keys = model.get_prompt(2).layers[0].keys
    assert keys.shape[0] == 2 and keys.stride(0) == 0


def test_unpatch_restores_stock() -> None:
    stock = prefixed(bare("llama"))
    model, _ = patched_copy(stock)
    with model.disable_adapter():  # leaves bound methods on the instance
        unprefixed = loss(model).item()
    assert loss(model).item() != pytest.approx(unprefixed, rel=1e-3)
    checkpoint(model)
    assert torch.isfinite(loss(model))
    assert pk.unpatch(model) > 0
    types = [type(module) for module in stock.modules()]
    assert [type(module) for module in model.modules()] == types
    assert not any(fused.RECORD in vars(module) for module in model.modules())
    for value in vars(model).values():
        assert "peft_kernels" not in getattr(getattr(value, "__func__", None), "__module__", "")
    with pytest.raises(RuntimeError, match="size of tensor"):
        loss(model)  # the mask includes the prefix, which transformers' layers lost
    refused = "(?i)prefix.tuning does not work with gradient checkpointing"
    with pytest.raises(ValueError, match=refused):
        model.add_adapter("other", model.peft_config["default"])
    pk.patch(model)
    model.add_adapter("late", model.peft_config["default"])
    assert torch.isfinite(loss(model)) and model.is_gradient_checkpointing


def test_adapters_are_switched() -> None:
    stock = prefixed(bare("llama"))
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    )
    stock.add_adapter("other", config)
    model, _ = patched_copy(stock)
    checkpoint(model)
    for name in ("other", "default"):
        for each in (stock, model):
            each.set_adapter(name)
        assert_near(step(model, loss), step(stock, loss))


def test_layers_added_later_are_refused() -> None:
    model = prefixed(bare("llama"))
    pk.patch(model)
    checkpoint(model)
    layers = model.base_model.model.layers
    fused.restore(layers[1])
    with pytest.raises(RuntimeError, match=r"model\.layers\.1 was added after patch"):
        loss(model)
    pk.patch(model)
    assert torch.isfinite(loss(model))


def test_copies_and_pickles() -> None:
    stock = prefixed(bare("llama"))
    want = step(stock, loss)
    model, _ = patched_copy(stock)
    twin = copy.deepcopy(model)
    checkpoint(twin)
    assert_near(step(twin, loss), want)
    assert not model.is_gradient_checkpointing
    require_pickles(stock)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is type(stock)
    assert_near(step(loaded, loss), want)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_trainer_checkpoints(family: str, tmp_path: Path) -> None:
    """Trainer on an NF4 base: with checkpointing it gives the losses of stock without."""
    stock = prefixed(bare(family, "nf4"), projection=True)
    model, _ = patched_copy(stock)
    rows = batch(model)
    data = [{name: rows[name][i] for name in rows} for i in (0, 1)] * 4
    losses = {}
    for name, each, more in (("stock", stock, {}), ("ours", model, {"gradient_checkpointing": True})):
        found = trainer(each, tmp_path / name, 4, data, **more)
        torch.manual_seed(0)
        found.train()
        losses[name] = logged(found)
    assert len(losses["ours"]) == 4 and losses["ours"] == pytest.approx(losses["stock"], rel=ONE_STEP)
    assert losses["ours"][-1] != losses["ours"][0]
    assert model.base_model.is_gradient_checkpointing
