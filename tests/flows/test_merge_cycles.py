"""Merging and unmerging NF4 models, once and in cycles; a merged model does not need this package."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from flow_checks import assert_near
from flow_models import Logits, adapted, ids, llama, patched_copy
from rounding import ONE_MODEL
from skips import require_pickles

import peft_kernels as pk

pytestmark = pytest.mark.filterwarnings("ignore:.*merg.*")


def logits(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"logits": model(input_ids=ids()).logits}


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_training_goes_on_after_a_cycle(adapter: str) -> None:
    """As in trainers that merge for generation in each step."""
    stock = adapted(llama("nf4"), use_dora=adapter == "dora")
    model, _ = patched_copy(stock)
    cycled = copy.deepcopy(model)
    losses: list[list[float]] = []
    for each, merges in ((model, False), (cycled, True)):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for i in range(3):
            if merges:
                each.merge_adapter()
                logits(each)
                each.unmerge_adapter()
            optimizer.zero_grad()
            loss = each(input_ids=ids(i), labels=ids(i)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merged_model_does_not_need_this_package(base: str) -> None:
    """Neither do its copies, pickles and traces."""
    stock = adapted(llama(base)).eval()
    model = patched_copy(stock)[0].merge_and_unload()
    assert_near(logits(model), logits(stock), ONE_MODEL)
    assert not any(type(module).__module__.startswith("peft_kernels") for module in model.modules())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Logits(model), (ids(),), check_trace=False)
    assert "peft_kernels" not in str(traced.inlined_graph)
    assert_near({"logits": traced(ids())}, logits(model), ONE_MODEL)
    require_pickles(stock)
    for each in (model, copy.deepcopy(model)):
        assert b"peft_kernels" not in pickle.dumps(each)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_unload_leaves_a_plain_model(base: str) -> None:
    stock = llama(base).eval()
    want = logits(stock)
    model = adapted(copy.deepcopy(stock)).eval()
    pk.patch(model)
    plain = model.unload()
    assert_near(logits(plain), want, ONE_MODEL)  # norms and attention are still fused
    pk.unpatch(plain)
    assert torch.equal(logits(plain)["logits"], want["logits"])
    mlps = [module for name, module in plain.named_modules() if name.endswith("mlp")]
    assert mlps and all("forward" not in vars(mlp) for mlp in mlps)
    twin = copy.deepcopy(plain)
    assert torch.equal(logits(twin)["logits"], want["logits"])
