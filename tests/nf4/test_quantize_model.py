"""quantize_model: which layers, errors, and peak memory."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import models
import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.nn import NF4Linear
from peft_kernels.quantize.report import nbytes_of, report_of


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_skip_matches_last_part_or_full_name() -> None:
    model = models.Net()
    x = torch.randn(4, 64)
    dense = model(x)
    assert pk.quantize_model(model) is model
    assert kinds(model) == {"q": NF4Linear, "o": NF4Linear, "lm_head": nn.Linear}
    assert 0 < (model(x) - dense).norm() / dense.norm() < 0.3

    model = nn.Sequential(models.Net(), models.Net())
    pk.quantize_model(model, skip=("0.q", "o"))
    assert [name for name, kind in kinds(model).items() if kind is nn.Linear] == ["0.q", "0.o", "1.o"]


def test_linear_subclasses_stay_dense() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(64, 64), nn.Linear(64, 64))
    pk.quantize_model(model)
    assert kinds(model) == {"0": Special, "1": NF4Linear}


def test_tied_weights_stay_dense() -> None:
    model = models.tiny_llama(tie_word_embeddings=True)
    pk.quantize_model(model, skip=())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[1].mlp.down_proj, NF4Linear)


def test_shared_module_stays_shared() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.Linear(64, 64), shared)
    pk.quantize_model(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear and isinstance(model[1], NF4Linear)

    block = nn.Sequential(nn.Linear(64, 64))  # a shared block is registered once, and so is its layer
    model = pk.quantize_model(nn.Sequential(block, block))
    assert model[0] is model[1] and isinstance(model[0][0], NF4Linear)


def test_options_reach_every_weight() -> None:
    model = pk.quantize_model(models.Net().eval(), skip="q", blocksize=128, double_quant=False)
    assert kinds(model) == {"q": nn.Linear, "o": NF4Linear, "lm_head": NF4Linear}
    assert model.o.weight.blocksize == 128 and not model.o.weight.double_quant
    assert not model.o.training and model.lm_head.bias.requires_grad


def test_adapters_are_never_quantised() -> None:
    """A PEFT model's adapters are plain nn.Linear, and so is the trained copy of its head."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(
        r=4, target_modules=["q", "o"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = peft.get_peft_model(models.Net(), config)
    x = torch.randn(5, 64)
    before, trained = model(x), {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    pk.quantize_model(model)
    quantised = {name for name, kind in kinds(model).items() if kind is NF4Linear}
    assert quantised == {"base_model.model.q.base_layer", "base_model.model.o.base_layer"}
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == trained.keys() and all(torch.equal(after[name], trained[name]) for name in after)
    assert 0 < (model(x) - before).norm() / before.norm() < 0.3

    pk.quantize_model(model, skip=())  # the head that PEFT keeps is the base's, its copy is trained
    assert isinstance(model.base_model.model.lm_head.original_module, NF4Linear)
    assert type(model.base_model.model.lm_head.modules_to_save["default"]) is nn.Linear


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weight_is_named_and_changes_nothing(bad: float) -> None:
    model = models.Net()
    with torch.no_grad():
        model.o.weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"o\.weight: expected finite values, got 1 NaN or Inf among 8192"):
        pk.quantize_model(model)
    assert kinds(model) == {"q": nn.Linear, "o": nn.Linear, "lm_head": nn.Linear}


def test_large_finite_weights_are_no_error() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.fill_(3e38)  # the sum overflows, no value does
    pk.quantize_model(model)
    assert isinstance(model[0], NF4Linear)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (models.Net, {"blocksize": 60}, "blocksize: expected one of .*, got 60"),
        (lambda: models.Net().double(), {}, r"q\.weight: expected float32, .*, got torch.float64"),
        (lambda: nn.Linear(4, 4), {}, "model: expected a module that contains nn.Linear layers"),
    ],
    ids=["blocksize", "dtype", "bare-linear"],
)
def test_errors(make: object, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.quantize_model(make(), **options)  # type: ignore[operator]


def test_quantising_twice_changes_nothing() -> None:
    model = pk.quantize_model(models.Net())
    layer = model.q
    pk.quantize_model(model)
    assert model.q is layer


def test_experts_in_one_parameter_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = models.Net()
    model.experts = nn.Parameter(torch.zeros(8, 512, 512))
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        pk.quantize_model(model)
    assert "1 three-dimensional" in caplog.text and "experts" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        pk.quantize_model(nn.Sequential(nn.Conv1d(512, 512, 5), nn.Linear(64, 64)))
    assert caplog.text == "", "the kernel of a convolution is no set of experts"


def test_progress_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    pk.quantize_model(models.Net(), progress=True)
    assert "quantising to NF4" in capsys.readouterr().err
    pk.quantize_model(models.Net())
    assert capsys.readouterr().err == ""


def test_dense_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    quantize = NF4Linear.from_linear.__func__

    def counting(cls: type, linear: nn.Linear, *args: object, **kwargs: object) -> NF4Linear:
        gc.collect()
        alive.append(sum(ref() is not None for ref in dense))
        return quantize(cls, linear, *args, **kwargs)

    monkeypatch.setattr(NF4Linear, "from_linear", classmethod(counting))
    pk.quantize_model(model)
    assert alive == [6, 5, 4, 3, 2, 1]


# Names in skip, and the report


def deep() -> nn.Module:
    return nn.ModuleDict(
        {"layers": nn.ModuleList([models.Net(), models.Net()]), "vision_tower": models.Net()}
    )


def packed(model: nn.Module) -> list[str]:
    return [name for name, kind in kinds(model).items() if kind is NF4Linear]


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (
            "vision_tower",
            ["layers.0.q", "layers.0.o", "layers.0.lm_head", "layers.1.q", "layers.1.o", "layers.1.lm_head"],
        ),
        (["layers.0", "vision_tower", "lm_head"], ["layers.1.q", "layers.1.o"]),
        (["layers.1.q", "vision_tower", "lm_head", "o"], ["layers.0.q"]),
        (None, ["layers.0.q", "layers.0.o", "layers.1.q", "layers.1.o", "vision_tower.q", "vision_tower.o"]),
    ],
    ids=["container", "full", "parts", "default"],
)
def test_skip_accepts_both_spellings(skip: object, expected: list[str]) -> None:
    assert packed(pk.quantize_model(deep(), skip=skip)) == expected
    assert packed(pk.quantize_model(deep(), modules_to_not_convert=skip)) == expected


def test_unmatched_skip_name_raises() -> None:
    model = deep()
    message = r"^skip: expected names of modules of the model, got 'vision_towr', .*near it are vision_tower"
    with pytest.raises(ValueError, match=message):
        pk.quantize_model(model, skip=["lm_head", "vision_towr"])
    with pytest.raises(ValueError, match="got 'ayers', which fits none"):
        pk.quantize_model(model, modules_to_not_convert="ayers")
    with pytest.raises(ValueError, match="expected it or modules_to_not_convert"):
        pk.quantize_model(model, skip="q", modules_to_not_convert="q")
    with pytest.raises(
        ValueError, match=r"compute_dtype: expected float32, bfloat16 or float16, got torch.int8"
    ):
        pk.quantize_model(model, compute_dtype=torch.int8)
    assert not packed(model)
    pk.quantize_model(nn.Sequential(nn.Linear(64, 64)))  # default names need not match


def test_compute_dtype_reaches_every_layer() -> None:
    assert pk.quantize_model(models.Net().bfloat16()).q.compute_dtype is None
    assert pk.quantize_model(models.Net(), compute_dtype=torch.float16).o.compute_dtype == torch.float16


class Special(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_report() -> None:
    model = models.Net()
    assert report_of(model) is None
    model.special, model.twin = Special(64, 64), nn.Linear(128, 64, bias=False)
    model.other = nn.Linear(128, 64)
    model.other.weight = model.twin.weight
    before = sum(p.nbytes for p in model.parameters())
    pk.quantize_model(model)
    report = report_of(model)
    assert report.layers == ["q", "o"] and report.bytes_before == before
    assert report.bytes_after == sum(p.nbytes for p in model.parameters()) < before
    assert report.left == {
        "lm_head": "a head that may be trained; skip=() would pack it",
        "special": "a subclass of nn.Linear with a forward of its own, Special",
        "twin": "it shares its weight with another place in the model",
        "other": "it shares its weight with another place in the model",
    }
    text = str(report).splitlines()
    assert text[0].startswith("peft_kernels: 2 layers are NF4, the model takes 0.") and len(text) == 4
    assert "2 left as they are (twin, other): it shares its weight with another place in the model" in text
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert report_of(twin) == report and report_of(twin) is not report
    assert report_of(nn.ModuleDict({"inner": model})) is report
    assert len(pickle.dumps(report)) < 2000


@pytest.mark.parametrize("name", ["lm_head", "o"])
def test_a_tied_head_is_not_said_to_be_packed_by_skip(name: str) -> None:
    model = models.Net()
    model.embedding = nn.Embedding(*model.get_submodule(name).weight.shape)
    model.embedding.weight = model.get_submodule(name).weight
    for skip in (None, ()):
        left = report_of(pk.quantize_model(copy.deepcopy(model), skip=skip)).left
        assert left[name] == "it shares its weight with another place in the model"


def test_explain_says_what_the_model_takes_now() -> None:
    model = pk.quantize_model(models.Net().to(torch.bfloat16)).float()
    now, before = (f"{n / 1e6:.3g} MB" for n in (nbytes_of(model), report_of(model).bytes_before))
    assert nbytes_of(model) != report_of(model).bytes_after
    assert f"the model takes {now} of {before}\n" in pk.explain(model)


def test_second_call_adds_to_the_report() -> None:
    model = models.Net()
    before = sum(p.nbytes for p in model.parameters())
    pk.quantize_model(model, skip=["o", "lm_head"])
    assert report_of(model).layers == ["q"]
    pk.quantize_model(model)
    assert report_of(model).layers == ["q", "o"] and report_of(model).bytes_before == before


@pytest.mark.parametrize("call", ["model", "layer"])
def test_full_fine_tuning_raises(call: str) -> None:
    model = nn.ModuleDict({"mlp": models.Net()})
    pk.quantize_model(model)
    with pytest.raises(
        ValueError, match=r"^mlp\.q: NF4 weights are frozen; for full fine-tuning load the model"
    ):
        (model if call == "model" else model["mlp"].q).requires_grad_(True)
