"""patch gives the same values and a reason for every unfused layer; unpatch restores the model."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import models
import pytest
import torch
from flow_checks import assert_near
from installed import before
from peft_models import DTYPES, assert_same_numbers, lora, peft, run
from rounding import ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.patch import fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("base", models.BASES)
def test_adapters_in_bf16(base: str, dtype: torch.dtype) -> None:
    """Adapters in fp32 and in the dtype of the base are in test_fused.py."""
    model = lora(models.base_model(base, dtype), torch.bfloat16)
    assert_same_numbers(model, testing.tensor(17, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", models.BASES)
def test_one_layer_on_every_back_end(backend: str, base: str, dtype: torch.dtype) -> None:
    layer = lora(models.base_model(base, dtype)).base_model.model.q
    assert_same_numbers(layer, testing.tensor(5, 64, dtype=dtype))


@pytest.mark.parametrize(
    "x",
    [
        testing.tensor(64),
        testing.tensor(0, 64),
        testing.tensor(2, 3, 4, 64),
        testing.tensor(64, 6).t(),
        testing.tensor(1, 64).expand(5, 64),
        testing.tensor(4, 128)[:, 32:96],
    ],
    ids=["1-d", "no-rows", "4-d", "transposed", "expanded", "slice"],
)
def test_inputs_of_any_shape_and_stride(x: Tensor) -> None:
    model = lora(models.base_model("nf4"))
    plain = model(x)
    with pk.patched(model):
        assert model(x).shape == plain.shape
        if x.numel():
            assert testing.relative_error(model(x), plain) < ONE_MODEL


@pytest.mark.parametrize("base", models.BASES)
def test_unpatch_restores_the_model_to_the_bit(base: str) -> None:
    model = lora(models.base_model(base, torch.bfloat16))
    x = testing.tensor(17, 64, dtype=torch.bfloat16)
    before, state = run(model, x), copy.deepcopy(model.state_dict())
    attributes = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}

    report = pk.patch(model)
    run(model, x)
    # NF4Linear needs no fused forward, so there is nothing to remove.
    assert (
        pk.unpatch(model) == sum(entry.kind != "NF4Linear" for entry in (*report.layers, *report.bases)) > 0
    )
    for name, module in model.named_modules():
        assert (type(module), set(vars(module))) == attributes[name], name
    for name, value in run(model, x).items():
        assert torch.equal(value, before[name]), name
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_patching_twice_is_harmless() -> None:
    model = lora(models.base_model("nf4"))
    first = pk.patch(model)
    cls = type(model.base_model.model.q)
    second = pk.patch(model)
    q = model.base_model.model.q
    assert type(q) is cls and fused.plain_class(q) is peft.tuners.lora.Linear
    assert [str(layer) for layer in second.layers] == [str(layer) for layer in first.layers]
    assert pk.unpatch(model) == 2 and pk.unpatch(model) == 0


def patched_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if fused.record_of(module) is not None]


def test_patch_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(models.base_model("nf4"))
    module = importlib.import_module("peft_kernels.patch.examine")
    examine = module.examine_layer

    def failing(layer: nn.Module) -> Any:
        if layer is model.base_model.model.o:
            raise RuntimeError("broken")
        return examine(layer)

    monkeypatch.setattr(module, "examine_layer", failing)
    with pytest.raises(RuntimeError, match="broken"):
        pk.patch(model)
    assert not patched_modules(model)


def test_patched_leaves_earlier_patches_in_place() -> None:
    model = lora(models.base_model("nf4"))
    pk.patch(model.base_model.model.q)
    with pk.patched(model):
        assert patched_modules(model) == ["base_model.model.q", "base_model.model.o"]
    assert patched_modules(model) == ["base_model.model.q"]


def test_dry_run_changes_nothing() -> None:
    model = lora(models.base_model("dense"))
    report = pk.patch(model, dry_run=True)
    assert str(report) == "peft_kernels: 2 of 2 layers would be fused" and not patched_modules(model)
    assert "2 of 2 layers would be fused" in pk.explain(model) and "not patched" in pk.explain(model)
    pk.patch(model)
    assert pk.explain(model) == "peft_kernels: 2 of 2 layers fused"


def test_explain_lists_quantised_layers() -> None:
    model = lora(models.base_model("nf4"))
    pk.patch(model)
    first, *rest = pk.explain(model).splitlines()
    assert first.startswith("peft_kernels: 2 layers are NF4") and "peft_kernels: 2 of 2 layers fused" in rest
    alone = models.base_model("nf4")
    assert "2 of 2 layers fused" in pk.explain(alone) and "not patched" not in pk.explain(alone)


@pytest.mark.parametrize(
    ("argument", "got"), [([1], "a list"), (nn.Linear, "the class Linear")], ids=["list", "class"]
)
@pytest.mark.parametrize("function", [pk.patch, pk.unpatch, pk.explain])
def test_non_model_raises_type_error(function: Any, argument: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"model: {function.__name__} expected an nn.Module, got {got}"):
        function(argument)


def test_report() -> None:
    model = lora(models.base_model("nf4"), use_dora=True, target_modules=["q"])
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["q", "o"]))
    model.base_model.set_adapter(["default", "plain"])
    report = pk.patch(model)
    assert [layer.name for layer in report.fused] == ["base_model.model.o"]
    assert [entry.name for entry in report.bases] == [
        "base_model.model.q.base_layer",
        "base_model.model.o.base_layer",
    ]
    q, reason = (
        "base_model.model.q (PEFT LoRA Linear on NF4Linear)",
        "DoRA together with other active adapters (default, plain); activate one at a time",
    )
    assert str(report).splitlines() == [
        "peft_kernels: 1 of 2 layers fused",
        f"original forward, 1 layer: {reason}: {q}",
    ]
    model(testing.tensor(2, 64))
    assert str(report).splitlines()[2:] == [f"original forward, 1 call of 1 layer: {reason}: {q}"]
    loaded = pickle.loads(pickle.dumps(report))
    model.set_adapter("plain")
    assert str(report).splitlines()[0] == "peft_kernels: 2 of 2 layers fused"
    model(testing.tensor(2, 64))
    assert str(report).splitlines()[1:] == [f"original forward, 1 call of 1 layer: {reason}: {q}"]
    assert str(loaded).splitlines()[0] == "peft_kernels: 1 of 2 layers fused", "a pickle tells of its time"
    assert "nothing to patch" in str(pk.patch(nn.Linear(4, 4)))


def test_report_lists_forwards_replaced_later() -> None:
    model, x = lora(models.base_model("nf4")), testing.tensor(2, 64)
    report = pk.patch(model)
    layer = model.base_model.model.q
    layer.forward = lambda x: 0 * x
    assert not layer(x).any()
    assert [entry.name for entry in report.original] == ["base_model.model.q"]
    assert "its forward was replaced on the instance, by test_report" in str(report)


@pytest.mark.parametrize("base", models.BASES)
def test_report_lists_layers_added_later(base: str) -> None:
    model = lora(models.base_model(base), target_modules=["q"])
    report = pk.patch(model)
    assert "after patch()" not in str(report)
    model.add_adapter("wide", peft.LoraConfig(r=4, target_modules=["q", "o"]))
    assert str(report).count("was added after patch(); patch again to fuse it") == 1
    pk.patch(model)
    assert "after patch()" not in str(report)


class ScaledDropout(nn.Dropout):
    """A user's class with other results than nn.Dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


FALLBACKS = {
    "alora": ({"alora_invocation_tokens": [1]}, "ALora is not fused"),
    "dropout_class": ({"lora_dropout": 0.5}, "lora_dropout is a ScaledDropout"),
}


@pytest.mark.parametrize("base", models.BASES)
@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias", "ignore:.*alora.*")
def test_unfused_layers_use_the_original_forward(case: str, base: str) -> None:
    if (case, base) == ("alora", "bnb") and before("peft", "0.19"):
        pytest.skip("PEFT before 0.19 leaves aLoRA out over bitsandbytes, and so do we")
    options, reason = FALLBACKS[case]
    model, x = lora(models.base_model(base), **options), testing.tensor(5, 64)
    for module in model.modules():
        if case == "dropout_class" and type(module) is nn.Dropout:
            module.__class__ = ScaledDropout
    torch.manual_seed(7)
    plain = run(model, x)
    # Linear4bit layers inside are patched too, and round differently.
    with pk.patched(model) as report:
        torch.manual_seed(7)
        got = run(model, x)
    for name in plain:
        if base == "bnb":
            assert testing.relative_error(got[name], plain[name]) < ONE_MODEL, name
        else:
            assert torch.equal(got[name], plain[name]), name
    counted = [key for layer in report.layers for key in layer.fallbacks]
    assert len(counted) == 2 and all(reason in key for key in counted), counted
    assert reason in str(report)


def test_layers_of_other_types_are_reported() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.q, self.conv = nn.Embedding(8, 64), nn.Linear(64, 64), nn.Conv1d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.q(self.emb(x)))

    model = lora(Two(), target_modules=["emb", "q", "conv"])
    x = torch.tensor([[1, 2, 3, 4]])
    plain = model(x)
    report = pk.patch(model)
    assert [layer.name.rpartition(".")[2] for layer in report.fused] == ["q"]
    assert {layer.reason.rpartition(".")[2] for layer in report.original} == {
        f"{kind}; nothing to do" for kind in ("Embedding", "Conv1d")
    }
    assert testing.relative_error(model(x), plain) < ONE_MODEL


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_transformers_conv1d(options: dict[str, Any]) -> None:
    """GPT-2's linear layers have a transposed weight."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    model = nn.Sequential()
    model.q = pytorch_utils.Conv1D(96, 64)
    model = lora(model, target_modules=["q"], fan_in_fan_out=True, **options)
    x = testing.tensor(3, 64)
    plain = run(model, x)
    report = pk.patch(model)
    assert_near(run(model, x), plain)
    assert len(report.fused) == 1 and not report.layers[0].fallbacks, str(report)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_weight_is_not_copied(backend: str, dtype: torch.dtype, rows: int) -> None:
    w, a, b = (testing.tensor(*s, dtype=dtype, seed=i) for i, s in enumerate([(64, 96), (8, 64), (96, 8)]))
    magnitude, dy = testing.tensor(96, seed=4), testing.tensor(rows, 96, dtype=dtype, seed=5)

    def results(weight: Tensor) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (testing.tensor(rows, 64, dtype=dtype, seed=6), a, b)]
        found = []
        for y in (
            pk.lora_linear(inputs[0], weight, *inputs[1:], 0.5),
            pk.dora_linear(inputs[0], weight, *inputs[1:], magnitude, 0.5),
        ):
            found += [y.detach(), *torch.autograd.grad(y, inputs, dy)]
        return found

    for got, expected in zip(results(w.t()), results(w.t().contiguous()), strict=True):
        assert testing.relative_error(got, expected) <= 2 * torch.finfo(dtype).eps


def test_subclass_with_own_forward_is_not_fused() -> None:
    class Doubled(peft.tuners.lora.Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(x, *args, **kwargs)

    model, x = lora(models.base_model("nf4")), testing.tensor(3, 64)
    model.base_model.model.q.__class__ = Doubled
    plain = model.base_model.model.q(x)
    report = pk.patch(model)
    assert [layer.name for layer in report.original] == ["base_model.model.q"]
    assert report.original[0].reason.startswith("no fused forward for") and "Doubled" in str(report)
    assert torch.equal(model.base_model.model.q(x), plain)


def test_a_layer_without_the_active_adapter_is_its_base() -> None:
    model, x = lora(models.base_model("nf4")), testing.tensor(3, 128)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False))
    report = pk.patch(model)
    model.set_adapter("other")
    layer = model.base_model.model.o
    assert torch.equal(layer(x), layer.base_layer(x)) and not any(entry.fallbacks for entry in report.layers)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_inference(base: str, mode: Any) -> None:
    model, x = lora(models.base_model(base)).eval(), testing.tensor(3, 64)
    pk.patch(model)
    expected = model(x).detach()
    with mode():
        y = model(x)
    assert torch.equal(y, expected) and not y.requires_grad


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_replica_computes_with_its_own_weights(base: str, patched: bool) -> None:
    """A replica of torch.nn.DataParallel copies the instance's dictionary and replaces parameters by plain
    tensors."""
    model, x = lora(models.base_model(base)), testing.tensor(3, 64)
    report = pk.patch(model) if patched else None

    def own(parameter: Tensor) -> Tensor:
        return parameter if isinstance(parameter, pk.NF4Weight) else 2 * parameter

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            setattr(replica, name, replicate(child))
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else own(parameter))
        return replica

    layer, twin = model.base_model.model.q, copy.deepcopy(model.base_model.model.q)
    for parameter in twin.parameters():
        parameter.data = own(parameter.data)
    assert testing.relative_error(replicate(layer)(x), twin(x)) < ONE_MODEL
    assert report is None or not report.layers[0].fallbacks


@pytest.mark.parametrize("base", models.BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_dtype_equals_peft_s(base: str, dtype: torch.dtype) -> None:
    model, x = lora(models.base_model(base)), testing.tensor(3, 64, dtype=dtype)
    layer = model.base_model.model.q
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = layer(x)
        with pk.patched(model) as report:
            got = layer(x)
    assert got.dtype == plain.dtype and not any(entry.fallbacks for entry in report.layers), str(report)
    assert testing.relative_error(got, plain) < 0.01


@pytest.mark.parametrize("base", models.BASES)
def test_autocast_rounds_adapters(base: str) -> None:
    """Like weights of nn.Linear; their gradients stay fp32."""
    model, x = lora(models.base_model(base)), testing.tensor(17, 64)
    layer = model.base_model.model.q
    if base == "bnb":  # else it computes in fp32 like x
        layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set = torch.bfloat16, True
    pk.patch(model)

    def found() -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(layer, x)

    results = found()
    assert {value.dtype for name, value in results.items() if "lora_" in name} == {torch.float32}
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            assert bool((parameter != parameter.bfloat16()).any()), name
            parameter.data.copy_(parameter.bfloat16())
    for name, value in found().items():
        assert torch.equal(value, results[name]), name
