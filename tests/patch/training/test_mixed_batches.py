"""Mixed batches, whose rows use different adapters: patched as unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from adapter_models import adapted, assert_fused, compare
from installed import before
from models import inputs
from numbers_policy import pairs
from peft_models import DTYPES
from rounding import ONE_MODEL
from torch import Tensor

import peft_kernels as pk
import testing

MIXED = (
    ("one", "two", "__base__", "three", "narrow"),
    ("narrow", "one", "two", "one", "__base__", "two", "three", "one"),
    ("two",),
    ("__base__", "__base__", "narrow"),
    ("__base__", "__base__"),
    ("three", "three", "three"),
    (),
)


@pairs(names=MIXED, dtype=DTYPES, base=models.BASES)
def test_mixed_batches(names: tuple[str, ...], dtype: torch.dtype, base: str) -> None:
    model = adapted(base, dtype).eval()
    for shape in ((len(names), 64), (len(names), 6, 64), (len(names), 1, 64)):
        compare(model, testing.tensor(*shape, dtype=dtype), adapter_names=list(names))


@pytest.mark.parametrize("base", models.BASES)
def test_each_row_of_a_mixed_batch_equals_its_adapter_alone(base: str) -> None:
    names = ["three", "__base__", "one", "narrow", "two", "one"]
    model, x = adapted(base).eval(), testing.tensor(len(names), 5, 64)
    pk.patch(model)
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(x[row : row + 1])
            else:
                model.set_adapter(name)
                alone = model(x[row : row + 1])
            assert testing.relative_error(mixed[row : row + 1], alone) < ONE_MODEL, name
        # The active adapters and the other rows have no effect.
        order = [4, 2, 0, 5, 1, 3]
        model.base_model.set_adapter(["one", "two"])
        again = model(x[order], adapter_names=[names[i] for i in order])
        assert testing.relative_error(again, mixed[order]) < ONE_MODEL
        assert torch.equal(model(x, adapter_names=names), mixed)


def test_mixed_batches_of_adapters_with_own_heads() -> None:
    model = adapted("nf4", all={"modules_to_save": ["lm_head"]}).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "modules_to_save" in name:
                parameter.copy_(testing.tensor(*parameter.shape, seed=seed))
    names = ["two", "__base__", "one", "narrow"]
    compare(model, testing.tensor(4, 3, 64), adapter_names=names)


@pytest.mark.parametrize("base", models.BASES)
def test_mixed_batches_of_adapters_of_different_types(base: str) -> None:
    model = adapted(base, torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".two." in name:
            parameter.data = parameter.data.bfloat16()
    x = testing.tensor(4, 3, 64, dtype=torch.bfloat16)
    compare(model, x, adapter_names=["two", "one", "__base__", "two"])


def merged(model: Any) -> None:
    model.merge_adapter(["one"])


WRONG_BATCHES: dict[str, tuple[list[str], Callable[[Any], Any], str]] = {
    "unknown": (["one", "other", "two"], lambda model: model.eval(), r"non-existing adapter\(s\): other"),
    "too-few": (["one", "two"], lambda model: model.eval(), "Length of `adapter_names`.*got 2 and 3"),
    "too-many": (["one"] * 4, lambda model: model.eval(), "Length of `adapter_names`.*got 4 and 3"),
    "training": (["one"] * 3, lambda model: model.train(), "in training mode"),
    "merged": (["one"] * 3, lambda model: merged(model.eval()), "merged adapters"),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
def test_mismatched_adapter_names_raise(patched: bool, case: str) -> None:
    names, prepare, message = WRONG_BATCHES[case]
    model, x = adapted(), inputs(3)
    if patched:
        pk.patch(model)
    prepare(model)
    with pytest.raises(ValueError, match=message):
        model(x, adapter_names=names)


def adapted_llama(base: str) -> Any:
    llama = models.tiny_llama(eos_token_id=None)
    if base == "nf4":
        pk.quantize_model(llama)
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
    options |= {"rank_pattern": {}, "alpha_pattern": {}}
    return adapted(llama, all=options, narrow={"r": 4}).eval()


@pytest.mark.parametrize("beams", [1, 2], ids=["greedy", "beams"])
@pytest.mark.parametrize("base", ["dense", "nf4"])  # bitsandbytes changes its weights in evaluation
def test_generating_with_mixed_batches(base: str, beams: int) -> None:
    if beams > 1 and before("peft", "0.19"):
        pytest.skip("PEFT before 0.19 has no mixed batches with beams")
    model = adapted_llama(base)
    names = ["two", "__base__", "one", "narrow", "three"]
    ids = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(1)).expand(5, -1)
    mask = torch.ones_like(ids)
    mask[1::2, :2] = 0  # left padding in some rows

    def generate(model: Any) -> Tensor:
        options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
        options |= {"pad_token_id": 0, "attention_mask": mask, "adapter_names": names}
        return model.generate(input_ids=ids, **options)

    plain = generate(model)
    with pk.patched(model) as report:
        got = generate(model)
    assert_fused(report)
    assert torch.equal(got, plain)
    assert len({tuple(row.tolist()) for row in got}) == 5, "every adapter says something else"
