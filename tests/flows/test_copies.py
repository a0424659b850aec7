"""Deep copies of patched modules in wrappers that forward attributes."""

from __future__ import annotations

import copy
from typing import Any

import models
import peft
import pytest
import torch
from flow_models import adapted, ids, llama
from peft_models import lora
from torch import nn

import peft_kernels as pk
import testing
from peft_kernels.patch import fused


class Forwarding(nn.Module):
    """Like PEFT's wrappers and torch.compile's, it forwards missing attributes to the layer inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_modules"]["inner"], name)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


def test_a_wrapper_stays_around_the_layer() -> None:
    layer = lora(models.base_model("dense")).base_model.model.q
    pk.patch(layer)
    for wrapper in (Forwarding(layer), torch.compile(layer, backend="eager")):
        twin = copy.deepcopy(wrapper)
        assert type(twin) is type(wrapper)
        inner = next(m for m in twin.modules() if fused.record_of(m) is not None)
        assert inner is not layer and type(inner) is type(layer)
        x = testing.tensor(3, 64)
        torch.testing.assert_close(twin(x), wrapper(x))


@pytest.mark.parametrize("loss", [False, True])
def test_a_head_that_peft_trains_stays_wrapped(loss: bool) -> None:
    """`modules_to_save`: the wrapper saves the trained head."""
    model = adapted(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    pk.patch(model, without=() if loss else "loss")
    twin = copy.deepcopy(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert type(twin.get_base_model().lm_head) is type(model.get_base_model().lm_head)
    saved = peft.get_peft_model_state_dict(twin)
    assert any("lm_head" in name for name in saved)
    twin(input_ids=ids(), labels=ids()).loss.backward()
    assert twin.get_base_model().lm_head.modules_to_save["default"].weight.grad is not None
