"""Several adapters on one model, and adapters that do not start as plain LoRA: patched as unpatched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import inputs
from peft_models import DTYPES, config, gradients, in_fp64, peft, run
from torch import Tensor, nn

import peft_kernels as pk
import testing

# Ranks, alphas and the layers that take the adapter differ; "narrow" is on one of the two layers.
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 8, "lora_alpha": 16},
    "two": {"r": 3, "lora_alpha": 7},
    "three": {
        "r": 16,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"o": 5},
        "alpha_pattern": {"o": 9},
    },
    "narrow": {"r": 4, "lora_alpha": 8, "target_modules": ["q"]},
}


def stir(model: nn.Module, scale: float = 0.1) -> None:
    """Draw every parameter of every adapter again, so that each does something of its own."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(testing.tensor(*parameter.shape, seed=seed, scale=scale))


def adapted(
    base: str | nn.Module = "dense", dtype: torch.dtype = torch.float32, **options: dict[str, Any]
) -> Any:
    """A PEFT model with all of ADAPTERS, "one" active. `options` are more options of an adapter by name."""
    model = models.base_model(base, dtype) if isinstance(base, str) else base
    for name, defaults in ADAPTERS.items():
        adapter = config(**defaults | options.get(name, {}) | options.get("all", {}))
        if name == "one":
            model = peft.get_peft_model(model, adapter, adapter_name=name)
        else:
            model.add_adapter(name, adapter)
    stir(model)
    return model


def activate(model: Any, names: str | list[str]) -> None:
    if isinstance(names, str):
        model.set_adapter(names)
    else:
        model.base_model.set_adapter(names)  # PeftModel's takes one name


def assert_fused(report: Any) -> None:
    assert report.fused and not report.original, report.details()
    assert not any(layer.fallbacks for layer in report.layers), str(report)


def assert_same(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor] | None) -> None:
    """Outputs and gradients of the patched model: fp32 as unpatched, else by their errors against fp64."""
    assert got.keys() == plain.keys()
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        if truth is None:
            error, allowed = testing.relative_error(value, plain[name]), 1e-5
        else:
            peer = testing.relative_error(plain[name], truth[name])
            assert peer < 0.05, f"{name}: a peer this far off ({peer:.3g}) would widen the bound"
            error = testing.relative_error(value, truth[name])
            allowed = 2 * peer + torch.finfo(got["y"].dtype).eps
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def stock(model: Any) -> Any:
    """A copy that stays unpatched. (bitsandbytes' evaluation without gradients changes a weight for good.)"""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module._parameters.get("weight"), "quant_state"):
            # In mixed batches PEFT adds to this output in place, which autograd refuses for bitsandbytes.
            module.register_forward_hook(lambda module, args, y: y.clone())
    return model


def compare(model: Any, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """One step of the model patched, held against copies of it that were never patched."""
    plain = run(stock(model), x, **kwargs)
    truth = None if x.dtype == torch.float32 else run(in_fp64(model), x.double(), **kwargs)
    with pk.patched(model) as report:
        got = run(model, x, **kwargs)
    assert_fused(report)
    assert_same(got, plain, truth)
    return got


# One adapter trains, everything else stays.


@pytest.mark.parametrize("heads", [False, True], ids=["", "with-heads"])
@pytest.mark.parametrize("base", models.BASES)
def test_training_one_adapter_leaves_everything_else_alone(base: str, heads: bool) -> None:
    options = {"modules_to_save": ["lm_head"]} if heads else {}
    model = adapted(base, all=options)
    report = pk.patch(model)
    # All parameters are in the optimizer, with weight decay: only a gradient of None keeps one from moving.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    several = [] if heads else [["one", "two"]]  # PEFT allows one head at a time
    for trained in (["one"], ["three"], ["narrow"], *several):
        activate(model, trained if len(trained) > 1 else trained[0])
        before = copy.deepcopy(model.state_dict())
        for step in range(2):
            optimizer.zero_grad()
            model(testing.tensor(9, 64, seed=step)).square().sum().backward()
            optimizer.step()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        own = {
            name
            for name, _ in model.named_parameters()
            if set(name.split(".")) & set(trained) and ("lora_" in name or "modules_to_save" in name)
        }
        assert changed == own, trained
        assert {name for name, p in model.named_parameters() if p.grad is not None} == own, trained
    assert_fused(report)


# Ranks and alphas of all kinds; one active, several, none.

ACTIVE: list[str | list[str]] = [
    "two",
    "three",
    "narrow",
    ["one", "two"],
    ["two", "one"],
    ["narrow", "three"],
    ["one", "two", "three", "narrow"],
]


@pytest.mark.parametrize("active", ACTIVE, ids=lambda a: a if isinstance(a, str) else "+".join(a))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", models.BASES)
def test_active_adapters(base: str, dtype: torch.dtype, active: str | list[str]) -> None:
    model = adapted(base, dtype)
    activate(model, active)
    got = compare(model, inputs(dtype=dtype))
    names = [active] if isinstance(active, str) else active
    layers = sum(2 if name != "narrow" else 1 for name in names)
    assert len(got) == 2 + 2 * layers, "output, x.grad, and gradients of A and B"


@pytest.mark.parametrize("active", ["two", ["one", "two"]], ids=["one-active", "several"])
@pytest.mark.parametrize("base", models.BASES)
def test_adapters_of_different_types(base: str, active: str | list[str]) -> None:
    """fp32 adapters beside bf16 ones, on a bf16 model."""
    model = adapted(base, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".two." in name:
            parameter.data = parameter.data.bfloat16()
    activate(model, active)
    compare(model, inputs(dtype=torch.bfloat16))


@pytest.mark.parametrize("base", models.BASES)
def test_switching_keeps_nothing_of_the_adapter_before(base: str) -> None:
    model, x = adapted(base), inputs()
    plain = stock(model)
    report = pk.patch(model)
    first: dict[str, dict[str, Tensor]] = {}
    for names in ("one", "two", ["one", "three"], "one", "narrow", "two", ["one", "three"]):
        activate(model, names)
        activate(plain, names)
        got = run(model, x)
        assert_same(got, run(plain, x), None)
        for key, value in first.setdefault(str(names), got).items():
            assert torch.equal(got[key], value), (names, key)
    outputs = [entry["y"] for entry in first.values()]
    for i, y in enumerate(outputs):
        assert all(testing.relative_error(y, other) > 1e-2 for other in outputs[:i])
    assert_fused(report)


def test_scales_of_several_adapters_are_read_in_each_call() -> None:
    model = adapted()
    activate(model, ["one", "two"])
    before = compare(model, inputs())
    model.base_model.model.q.set_scale("two", 3.0)
    after = compare(model, inputs())
    assert testing.relative_error(after["y"], before["y"]) > 1e-2


@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted")
def test_adapters_that_come_and_go_while_patched() -> None:
    model = adapted()
    plain, x = stock(model), inputs()
    pk.patch(model)
    for each in (model, plain):
        each.add_adapter("four", config(r=6, lora_alpha=3))
        stir(each)
        each.delete_adapter("one")
    for names in ("four", ["four", "two"]):
        activate(model, names)
        activate(plain, names)
        assert_same(run(model, x), run(plain, x), None)
    assert pk.unpatch(model) == 2


@pytest.mark.parametrize("base", ["dense", "nf4"])  # into bitsandbytes' weights PEFT merges with a loss
def test_merging_several_adapters(base: str) -> None:
    model, x = adapted(base), inputs()
    pk.patch(model)
    activate(model, ["one", "two"])
    y = model(x)
    model.merge_adapter(["one", "two"])
    assert testing.relative_error(model(x), y) < 1e-5
    model.unmerge_adapter()
    assert testing.relative_error(model(x), y) < 1e-5


def test_weighted_sums_of_adapters() -> None:
    """add_weighted_adapter writes the new adapter while the model is patched."""
    model = adapted(all={"target_modules": ["q", "o"]})
    pk.patch(model)
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="cat")
    activate(model, "sum")
    pk.unpatch(model)
    compare(model, inputs())
    for name, layer in (("q", model.base_model.model.q), ("o", model.base_model.model.o)):
        delta = 0.7 * layer.get_delta_weight("one") - 0.4 * layer.get_delta_weight("two")
        x = testing.tensor(5, layer.in_features)
        with pk.patched(layer):
            assert testing.relative_error(layer(x) - layer.base_layer(x), x @ delta.T) < 1e-4, name


# Disabled adapters: the base model, which is also the reference model of DPO and PPO.


@pytest.mark.parametrize("active", ["two", ["one", "two"]], ids=["one-active", "several"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", models.BASES)
def test_disabled_adapters_give_the_base_model_to_the_bit(
    base: str, dtype: torch.dtype, active: str | list[str]
) -> None:
    bare, x = models.base_model(base, dtype), inputs(dtype=dtype)
    pk.patch(bare)  # Linear4bit alone is patched too, and rounds otherwise than bitsandbytes
    expected = run(bare, x)
    model = adapted(base, dtype)
    activate(model, active)
    with model.disable_adapter():
        plain = run(stock(model), x)
    pk.patch(model)
    enabled = run(model, x)
    with model.disable_adapter():
        got = run(model, x)
    assert got.keys() == {"y", "x"}, "nothing of an adapter has a gradient"
    for key, value in got.items():
        assert torch.equal(value, expected[key]), key
        if base != "bnb":
            assert torch.equal(value, plain[key]), key
    for key, value in run(model, x).items():
        assert torch.equal(value, enabled[key]), f"{key}: enabled again, the adapters are as before"


def policy_gradients(model: Any, x: Tensor, reference: Callable[[], Tensor]) -> dict[str, Tensor]:
    """One step of DPO: the reference model runs between forward and backward of the policy."""
    model.zero_grad()
    policy = model(x).log_softmax(-1)
    with torch.no_grad():
        ratio = policy - reference().log_softmax(-1)
    loss = -nn.functional.logsigmoid(0.1 * (policy * ratio.sign()).sum(-1)).mean()
    loss.backward()
    return {"y": policy.detach(), "ratio": ratio, **gradients(model)}


@pytest.mark.parametrize("reference", ["disabled", "frozen-adapter"])
@pytest.mark.parametrize("base", models.BASES)
def test_reference_logits_in_the_middle_of_a_step(base: str, reference: str) -> None:
    def logits(model: Any, x: Tensor) -> Tensor:
        if reference == "disabled":
            with model.disable_adapter():
                return model(x)
        model.set_adapter("three", inference_mode=True)
        try:
            return model(x)
        finally:
            model.set_adapter("two")

    model, x = adapted(base), inputs()
    model.set_adapter("two")
    plain = stock(model)
    report = pk.patch(model)
    with torch.no_grad():
        first = logits(model, x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    got = policy_gradients(model, x, lambda: logits(model, x))
    if base == "bnb":  # its own evaluation without gradients changes the weight and can no longer train
        plain_logits = logits(stock(plain), x.clone().requires_grad_()).detach()
        expected = policy_gradients(plain, x, lambda: plain_logits)
    else:
        expected = policy_gradients(plain, x, lambda: logits(plain, x))
    assert_same(got, expected, None)
    assert len(got) == 6, "gradients of the policy's two A and two B, and of nothing else"
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(logits(model, x), first), "the reference does not train"
        assert testing.relative_error(model(x).log_softmax(-1), got["y"]) > 1e-6, "the policy does"
    assert_fused(report)


# A name given twice.


def test_a_new_adapter_with_the_name_of_another_raises() -> None:
    model, x = adapted(), inputs()
    pk.patch(model)
    before, y = copy.deepcopy(model.state_dict()), model(x)
    for options in ({}, {"r": 4}, {"target_modules": ["q"]}):
        with pytest.raises(ValueError, match="Adapter with name 'two' already exists"):
            model.add_adapter("two", config(**options))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_a_list_of_names_is_nothing_for_peft_models_own_set_adapter() -> None:
    model = adapted()
    pk.patch(model)
    with pytest.raises(TypeError, match="unhashable"):
        model.set_adapter(["one", "one"])
    assert model.active_adapters == ["one"]


@pytest.mark.parametrize("base", models.BASES)
def test_one_adapter_active_twice_raises(base: str) -> None:
    """PEFT adds that adapter twice, without a word."""
    model, x = adapted(base), inputs()
    activate(model, ["two", "one", "two"])
    with pytest.raises(ValueError, match="two"), pk.patched(model):
        model(x)


def test_loading_under_the_name_of_another_overwrites_it(tmp_path: Path) -> None:
    """As PEFT means it: transformers' Trainer resumes and takes the best checkpoint back in this way."""
    model, x = adapted(), inputs()
    model.set_adapter("two")
    pk.patch(model)
    y = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    stir(model, scale=0.3)
    assert testing.relative_error(model(x), y) > 0.1
    parameter = model.base_model.model.q.lora_A.two.weight
    model.load_adapter(tmp_path / "two", "two")
    assert model.base_model.model.q.lora_A.two.weight is parameter
    assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path / "two", "one")
    assert torch.equal(model(x), y)


# Mixed batches: an adapter for each row.

MIXED = (
    ["one", "two", "__base__", "three", "narrow"],
    ["narrow", "one", "two", "one", "__base__", "two", "three", "one"],
    ["two"],
    ["__base__", "__base__", "narrow"],
    ["__base__", "__base__"],
    ["three", "three", "three"],
    [],
)


@pytest.mark.parametrize("names", MIXED, ids=lambda names: "-".join(names) or "no-rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", models.BASES)
def test_mixed_batches(base: str, dtype: torch.dtype, names: list[str]) -> None:
    model = adapted(base, dtype).eval()
    for shape in ((len(names), 64), (len(names), 6, 64), (len(names), 1, 64)):
        compare(model, testing.tensor(*shape, dtype=dtype), adapter_names=names)


@pytest.mark.parametrize("base", models.BASES)
def test_each_row_of_a_mixed_batch_is_that_of_its_adapter(base: str) -> None:
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
            assert testing.relative_error(mixed[row : row + 1], alone) < 1e-5, name
        # Neither the active adapters nor the other rows have a say.
        order = [4, 2, 0, 5, 1, 3]
        model.base_model.set_adapter(["one", "two"])
        again = model(x[order], adapter_names=[names[i] for i in order])
        assert testing.relative_error(again, mixed[order]) < 1e-5
        assert torch.equal(model(x, adapter_names=names), mixed)


def test_mixed_batches_of_adapters_with_heads_of_their_own() -> None:
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
def test_names_that_do_not_fit_the_batch_raise(patched: bool, case: str) -> None:
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
@pytest.mark.parametrize("base", ["dense", "nf4"])  # evaluation by bitsandbytes changes its weights
def test_generating_with_mixed_batches(base: str, beams: int) -> None:
    model = adapted_llama(base)
    names = ["two", "__base__", "one", "narrow", "three"]
    ids = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(1)).expand(5, -1)
    mask = torch.ones_like(ids)
    mask[1::2, :2] = 0  # left padding in some of the rows

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


# Adapters that start otherwise than as A drawn, B zero; and biases that train.


def eva_initialise(model: Any) -> None:
    """A takes the directions in which a layer's inputs vary most. Two for q, so that o gets more rank."""
    scale = torch.cat([torch.ones(2), torch.full((62,), 0.01)])
    batches = [testing.tensor(64, 64, seed=seed) * scale for seed in range(4)]
    peft.initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda model, x: model(x.to(model.base_model.model.lm_head.weight.dtype)),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, model_input, name: layer_input[0].float(),
        show_progress_bar=False,
    )


def loftq_config() -> Any:
    """Set afterwards: with the option in the call, LoraConfig asks for scipy, which nothing uses."""
    lora = config(lora_alpha=8)  # LoftQ reckons with a scaling of 1
    lora.init_lora_weights, lora.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 2}
    return lora


@pytest.fixture
def loftq_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ computes on "cuda" whatever the model is on. Without one, read that as "cpu"."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if torch.cuda.is_available():
        return

    def on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
        def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            kwargs = {key: "cpu" if str(value) == "cuda" else value for key, value in kwargs.items()}
            return to(tensor, *("cpu" if str(arg) == "cuda" else arg for arg in args), **kwargs)

        return moved

    for owner in (torch.Tensor, bnb.nn.Params4bit):
        monkeypatch.setattr(owner, "to", on_cpu(owner.to))


INITIALISED: dict[str, Callable[[], Any]] = {
    **{
        init: (lambda init=init: config(init_lora_weights=init))
        for init in ("pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal")
    },
    "eva": lambda: config(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)),
    "rslora": lambda: config(use_rslora=True),
    "bias-lora-only": lambda: config(bias="lora_only"),
    "bias-all": lambda: config(bias="all"),
    "lora-bias": lambda: config(lora_bias=True),
}


def compare_from_the_start(model: Any, dtype: torch.dtype) -> None:
    """As initialised (some start with B at zero, and so no gradient in A) and somewhere else."""
    compare(model, inputs(dtype=dtype))
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += testing.tensor(*parameter.shape, dtype=parameter.dtype, seed=seed, scale=0.05)
    got = compare(model, inputs(dtype=dtype))
    assert all(value.count_nonzero() for value in got.values())


@pytest.mark.parametrize("init", INITIALISED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias", "ignore:.*eva initialization")
def test_initialised_adapters(dtype: torch.dtype, init: str) -> None:
    model = peft.get_peft_model(models.base_model("dense", dtype), INITIALISED[init]())
    if init == "eva":
        with pk.patched(model):  # it replaces adapters by ones of another rank, under our forward
            eva_initialise(model)
        ranks = [model.base_model.model.get_submodule(name).r["default"] for name in ("q", "o")]
        assert ranks[0] < ranks[1] and sum(ranks) == 16, ranks
    compare_from_the_start(model, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loftq(loftq_without_gpu: None, dtype: torch.dtype) -> None:
    base = models.base_model("dense", dtype)
    weight = base.q.weight.detach().clone()
    model = peft.get_peft_model(base, loftq_config())
    layer = model.base_model.model.q
    assert not torch.equal(layer.base_layer.weight, weight), "the base is what NF4 makes of it"
    each = torch.eye(64, dtype=dtype)
    with pk.patched(layer):
        error = testing.relative_error(layer(each) - layer.base_layer.bias, weight.T)
    without = testing.relative_error(layer.base_layer.weight, weight)
    assert error < 0.9 * without, f"the adapter gives back a part of what packing took: {error}, {without}"
    compare_from_the_start(model, dtype)


@pytest.mark.parametrize("option", ["bias-lora-only", "bias-all", "lora-bias"])
@pytest.mark.parametrize("base", ["nf4", "bnb"])
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")
def test_biases_that_train_over_4_bit_weights(base: str, option: str) -> None:
    model = peft.get_peft_model(models.base_model(base), INITIALISED[option]())
    compare_from_the_start(model, torch.float32)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")
def test_lora_biases_of_several_adapters_and_of_mixed_batches() -> None:
    model = adapted(two={"lora_bias": True}, three={"lora_bias": True})
    activate(model, ["one", "two", "three"])
    got = compare(model, inputs())
    assert len(got) == 2 + 3 * 2 * 2 + 2 * 2
    names = ["two", "one", "__base__", "three"]
    compare(model.eval(), testing.tensor(4, 3, 64), adapter_names=names)
