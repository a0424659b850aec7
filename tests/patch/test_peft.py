"""PEFT on models of NF4Linear layers: injecting, initialising, saving, without bitsandbytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from installed import before
from models import inputs
from peft_models import config, gradients, lora, peft
from rounding import ONE_MODEL, ONE_STEP
from torch import nn

import peft_kernels as pk
import testing


def adapted(
    base: str = "nf4", dtype: torch.dtype = torch.bfloat16, patched: bool = True, **options: Any
) -> Any:
    model = lora(models.base_model(base, dtype), **options)
    if patched:
        pk.patch(model)
    return model


PATCHED = pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])


def test_only_the_adapters_train(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all("lora_" in name for name in trainable)
    model.print_trainable_parameters()
    assert "trainable params: 3,072 || all params: 20,234" in capsys.readouterr().out
    model(inputs(dtype=torch.bfloat16)).sum().backward()
    assert set(gradients(model)) == set(trainable)


@PATCHED
@pytest.mark.parametrize(("writer", "reader"), [("nf4", "nf4"), ("nf4", "bnb"), ("bnb", "nf4")])
def test_adapters_saved_on_one_base_load_on_another(
    tmp_path: Path, writer: str, reader: str, patched: bool
) -> None:
    model = adapted(writer, torch.float32, patched)
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    other = peft.PeftModel.from_pretrained(models.base_model(reader, torch.float32), tmp_path).train()
    if patched:
        assert not pk.patch(other).original
    x = inputs().requires_grad_()  # bitsandbytes does not repack in this mode
    difference = testing.relative_error(other(x), model(x))
    # A few double-quantised scales differ between the libraries.
    assert difference == 0 if writer == reader else difference < 5e-3


def test_unload_without_merging_gives_the_base_back() -> None:
    model = adapted()
    weight = model.base_model.model.q.base_layer.weight
    assert model.unload().q.weight is weight


def test_all_linear_targets_nf4_layers() -> None:
    model = peft.get_peft_model(pk.quantize_model(models.tiny_llama()), config(target_modules="all-linear"))
    assert sum(isinstance(module, peft.tuners.lora.Linear) for module in model.modules()) == 14
    report = pk.patch(model)
    assert len(report.fused) == 14 and not report.original


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", "mica"])
def test_initialisations_that_read_or_change_the_base_weight(init: str) -> None:
    """PiSSA and OLoRA subtract the adapter from the base weight, which becomes dense and must keep that."""
    if init == "mica" and before("peft", "0.20"):
        pytest.skip("PEFT before 0.20 has no mica")
    adapter = config(init_lora_weights=init, lora_alpha=8)
    base, x = models.base_model("nf4", torch.float32), inputs()
    expected = base(x)
    model = peft.get_peft_model(base, adapter)
    pk.patch(model)
    changes_base = init.startswith("pissa") or init == "olora"
    assert model.base_model.model.q.base_layer.weight.is_dense is changes_base
    if init != "orthogonal":  # the others are initialised to the identity
        assert testing.relative_error(model(x), expected) < ONE_STEP
    with model.disable_adapter():
        if changes_base:
            assert testing.relative_error(model(x), expected) > 0.05
        else:
            assert torch.equal(model(x), expected)


def test_a_base_like_linear_of_the_user() -> None:
    """PEFT's dynamic dispatch: a module without any bias under a LoRA layer of its own class."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 64, 128
            self.weight = nn.Parameter(testing.tensor(128, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    class OwnLora(peft.tuners.lora.Linear):
        pass

    base = models.base_model("dense", torch.float32)
    base.q = Own()
    adapter = config(target_modules=["q", "o"])
    adapter._register_custom_module({Own: OwnLora})
    model, x = peft.get_peft_model(base, adapter), inputs()
    expected = model(x)
    report = pk.patch(model)
    assert testing.relative_error(model(x), expected) < ONE_MODEL
    assert len(report.fused) == 2 and not report.original and not report.blocks, report.details()


def test_a_second_adapter_of_trained_tokens_is_deleted() -> None:
    """PEFT 0.18 wraps the wrapper of a tied head again."""
    adapter = config(target_modules=["q_proj"], trainable_token_indices=[0, 1, 3])
    model = peft.get_peft_model(models.tiny_llama(tie_word_embeddings=True), adapter)
    stock = copy.deepcopy(model)
    pk.patch(model)
    ids = torch.arange(32)[None]
    for each in (model, stock):
        each.add_adapter("other", adapter)
        each.set_adapter("other")
        each.delete_adapter("other")
    got, want = (each(input_ids=ids, labels=ids) for each in (model, stock))
    assert testing.relative_error(got.loss, want.loss) < ONE_MODEL
    assert testing.relative_error(got.logits, want.logits) < ONE_MODEL
