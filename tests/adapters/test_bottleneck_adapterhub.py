"""Adapters written by AdapterHub's library (tools/adapterhub_samples.py) compute the same here."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_json, change_tensors
from rounding import ONE_MODEL

import peft_kernels as pk
import testing
from peft_kernels.checkpoints.header import CheckpointError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

SAMPLES = Path(__file__).parent / "adapterhub"
_TOOL = SAMPLES.parents[2] / "tools" / "adapterhub_samples.py"
_spec: Any = importlib.util.spec_from_file_location("adapterhub_samples", _TOOL)
samples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)


def make(case: str, head: str = "Model") -> Any:
    family = samples.CASES[case][0]
    model = getattr(transformers, family + head)(getattr(transformers, family + "Config")(**samples.SIZES))
    samples.filled(model if head == "Model" else model.base_model)
    return model.eval()


@pytest.mark.parametrize("case", samples.CASES)
def test_computes_the_same(case: str) -> None:
    model = make(case)
    with torch.no_grad():
        bare = model(samples.inputs())[0]
        assert pk.adapters.load(model, SAMPLES / case) == "sample"
        assert torch.equal(model(samples.inputs())[0], bare)
        pk.adapters.set_active(model, "sample")
        got = model(samples.inputs())[0]
    want = safetensors.load_file(SAMPLES / case / "expected.safetensors")["output"]
    assert testing.relative_error(got, want) < ONE_MODEL < 1e-2 < testing.relative_error(bare, want)


def test_rows_training_and_saving(tmp_path: Path) -> None:
    """The norm is read on every path: rows, gradients, files, a model with a head."""
    case = "bert-seq_bn"
    model, ids = make(case, "ForSequenceClassification"), samples.inputs()
    pk.adapters.load(model, SAMPLES / case, load_as="mine")
    pk.adapters.add(model, "other", "houlsby")
    want = safetensors.load_file(SAMPLES / case / "expected.safetensors")["output"]
    with torch.no_grad(), pk.adapters.rows(model, ["mine", None]):
        mixed = model.base_model(ids)[0]
    with torch.no_grad():
        bare = model.base_model(ids)[0]
    assert testing.relative_error(mixed[0], want[0]) < ONE_MODEL and torch.equal(mixed[1], bare[1])
    pk.adapters.train(model, ["mine", "other"])
    model(ids)[0].square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if ".mine." in name}
    assert grads and all(grad is not None and bool(grad.any()) for grad in grads.values())
    pk.adapters.save(model, "mine", tmp_path)
    fresh = make(case)
    pk.adapters.load(fresh, tmp_path)
    pk.adapters.set_active(fresh, "mine")
    with torch.no_grad():
        assert testing.relative_error(fresh(ids)[0], want) < ONE_MODEL


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "adapter_config.json", change)


def edit(**changes: Any) -> Callable[[Path], None]:
    return described(lambda about: about["config"].update(changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / "adapter.safetensors", change)


def drop(*fields: str) -> Callable[[Path], None]:
    return described(lambda about: [about["config"].pop(field) for field in fields])


def about(**changes: Any) -> Callable[[Path], None]:
    return described(lambda found: found.update(changes))


def compute(model: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        pk.adapters.set_active(model, pk.adapters.load(model, folder))
        output: torch.Tensor = model(samples.inputs())[0]
    return output


def copied(case: str, folder: Path) -> Path:
    for file in (SAMPLES / case).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("case", samples.CASES)
def test_missing_fields_have_defaults(case: str, tmp_path: Path) -> None:
    """As in files of older versions."""
    fields = json.loads((copied(case, tmp_path) / "adapter_config.json").read_text())["config"]
    defaults = {
        "original_ln_before": False, "original_ln_after": True, "ln_before": False, "ln_after": False,
        "is_parallel": False, "scaling": 1.0, "residual_before_ln": True,
    }  # fmt: skip
    required = {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity"}
    required |= {name for name, value in defaults.items() if fields[name] != value}
    drop(*(fields.keys() - required))(tmp_path)
    assert torch.equal(compute(make(case), tmp_path), compute(make(case), SAMPLES / case))


@pytest.mark.parametrize(
    "case,fields",
    [
        ("bert-seq_bn", {"reduction_factor": 7}),  # 32 / 7 is 4.57
        ("bert-seq_bn", {"reduction_factor": 6.5}),
        ("roberta-par_bn", {"original_ln_before": True}),
        ("bert-double_seq_bn", {"residual_before_ln": False}),
        ("bert-seq_bn", {"init_weights": "mam_adapter", "phm_dim": 2, "shared_W_phm": True}),
    ],
    ids=["rounded-down", "not-whole", "beside-a-norm", "without-a-norm", "how-it-began"],
)
def test_ignored_fields(case: str, fields: dict[str, Any], tmp_path: Path) -> None:
    edit(**fields)(copied(case, tmp_path))
    assert torch.equal(compute(make(case), tmp_path), compute(make(case), SAMPLES / case))


def test_names_of_a_model_with_a_head(tmp_path: Path) -> None:
    rename = tensors(lambda t: [t.update({"bert." + key: t.pop(key)}) for key in list(t)])
    rename(copied("bert-seq_bn", tmp_path))
    got, want = (compute(make("bert-seq_bn"), folder) for folder in (tmp_path, SAMPLES / "bert-seq_bn"))
    assert torch.equal(got, want)


def test_other_prefixes_layers_and_adapter_names(tmp_path: Path) -> None:
    """A head prefix other than BERT's, two-digit layers, a name that is no identifier."""
    name, count = "nli/rte@ukp-2", 11

    def rename(found: dict[str, torch.Tensor]) -> None:
        of_first = {key: found[key] for key in found if key.startswith("encoder.layer.0.")}
        found.clear()
        for i in range(count):
            for key, t in of_first.items():
                other = key.replace("layer.0.", f"layer.{i}.").replace(".sample.", f".{name}.")
                found["xlm_roberta." + other] = t + i

    tensors(rename)(copied("bert-seq_bn", tmp_path))
    about(name=name)(tmp_path)
    config = transformers.BertConfig(**samples.SIZES | {"num_hidden_layers": count})
    model = transformers.BertModel(config)
    assert pk.adapters.load(model, tmp_path, load_as="mine") == "mine"
    want = safetensors.load_file(tmp_path / "adapter.safetensors")
    for i, site in enumerate(pk.adapters.manage.sites(model)):
        key = f"xlm_roberta.encoder.layer.{i}.output.adapters.{name}.adapter_up.weight"
        assert torch.equal(site.get("mine").up, want[key])
    assert i == count - 1


def test_adapter_after_attention_only(tmp_path: Path) -> None:
    edit(output_adapter=False)(copied("roberta-seq_bn", tmp_path))
    file = tmp_path / "pytorch_adapter.bin"
    torch.save({key: t for key, t in torch.load(file).items() if ".attention." in key}, file)
    model = make("roberta-seq_bn")
    pk.adapters.load(model, tmp_path)
    assert [site.place.last for site in pk.adapters.manage.sites(model)] == [
        f"encoder.layer.{i}.attention.output.dense" for i in range(2)
    ]


class Evil:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code of a file was run",)


def pickled(value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "adapter.safetensors").unlink()
        torch.save(value, folder / "pytorch_adapter.bin")

    return change


def without_downs(found: dict[str, torch.Tensor]) -> None:
    for key in [key for key in found if ".adapter_down." in key]:
        del found[key]


def with_up(make: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    """All parameters in a .bin file, with adapter_up of one layer replaced by `make`'s result."""

    def change(folder: Path) -> None:
        found = safetensors.load_file(folder / "adapter.safetensors")
        pickled(found | {KEY: make(found[KEY])})(folder)

    return change


def compressed(folder: Path) -> None:
    with_up(lambda t: t)(folder)
    path = folder / "pytorch_adapter.bin"
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for record, data in records.items():
            archive.writestr(record, data)


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([tensor, tensor[:2]])


@pytest.mark.parametrize("form", ["expanded", "transposed", "with-gradient"])
@pytest.mark.filterwarnings("ignore:.*is not a leaf")
def test_tensors_that_share_memory_become_parameters(form: str, tmp_path: Path) -> None:
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "expanded": lambda t: t[:1, :1].expand(t.shape),
        "transposed": lambda t: t.t().contiguous().t(),
        "with-gradient": lambda t: t.clone().requires_grad_(),
    }
    with_up(forms[form])(copied("bert-seq_bn", tmp_path))
    model = make("bert-seq_bn")
    name = pk.adapters.load(model, tmp_path)
    pk.adapters.train(model, name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(samples.inputs())[0].square().sum().backward()
    optimizer.step()
    up = next(iter(pk.adapters.manage.sites(model))).get(name).up
    assert up.is_contiguous() and up.untyped_storage().nbytes() == up.nbytes
    assert len(up.detach().unique()) > 1


KEY = "encoder.layer.0.output.adapters.sample.adapter_up.weight"
DOWN = "encoder.layer.0.output.adapters.sample.adapter_down.0.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ln_after": (edit(ln_after=True), "ln_after: expected false, the only supported value, got true"),
    "residual": (edit(residual_before_ln="post_add"), "residual_before_ln: expected true, .* got post_add"),
    "scaling": (edit(scaling="learned"), "scaling: expected one number, got learned"),
    "by-layer": (edit(reduction_factor={"default": 8}), "reduction_factor: expected one number, got"),
    "invertible": (edit(inv_adapter="nice"), "inv_adapter: expected null, .* got nice"),
    "compacter": (edit(phm_layer=True), "phm_layer: expected false"),
    "no-norm-behind": (edit(original_ln_after=False), "original_ln_after: expected true, .* got false"),
    "gating": (edit(use_gating=True), "use_gating: expected false, .* got true"),
    "crossing": (edit(cross_adapter=True), "cross_adapter: expected false, .* got true"),
    "left-out": (edit(leave_out=[1]), r"leave_out: expected \[\], .* got \[1\]"),
    "dropout": (edit(dropout=0.1), r"dropout: expected 0.0, .* got 0.1"),
    "depth": (edit(stochastic_depth=0.1), r"stochastic_depth: expected 0.0, .* got 0.1"),
    "residual-if-any": (edit(residual_before_ln=1), "residual_before_ln: expected true, .* got 1"),
    "almost-known": (edit(phm_dim_2=4, learn_phm_2=1), "BnConfig, got learn_phm_2"),
    "list-of-json": (lambda f: (f / "adapter_config.json").write_text("[]"), "expected one of AdapterHub's"),
    "no-name": (about(name=3), "adapter_config.json: expected a name, got 3"),
    "no-attention": (drop("mh_adapter"), "expected mh_adapter, as AdapterHub's bottlenecks have, got none"),
    "no-feed-forward": (drop("output_adapter"), "expected output_adapter, as AdapterHub's"),
    "no-reduction": (drop("reduction_factor"), "expected reduction_factor, as AdapterHub's"),
    "no-activation": (drop("non_linearity"), "expected non_linearity, as AdapterHub's"),
    "activation": (edit(non_linearity="tanh"), "activation: expected one of"),
    "other-kind": (edit(architecture="lora"), "expected fields of AdapterHub's BnConfig, got"),
    "of-peft": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "adapter_config.json: expected one of AdapterHub's",
    ),
    "list": (pickled([torch.ones(1)]), "pytorch_adapter.bin: expected a dict of tensors, got list"),
    "key": (pickled({3: torch.ones(1)}), "bin: 3: expected parameters of adapter sample only"),
    "numbers": (pickled({"x": 1.0}), "pytorch_adapter.bin: expected a dict of tensors, got dict"),
    "sparse": (
        with_up(lambda t: t.to_sparse()),
        "expected a dense tensor, got one of layout torch.sparse_coo",
    ),
    "csr": (
        with_up(lambda t: t.to_sparse_csr()),
        "expected a dense tensor, got one of layout torch.sparse_csr",
    ),
    "meta": (
        with_up(lambda t: t.to("meta")),
        "adapter_up.weight: expected a dense tensor, got one without val",
    ),
    "nested": (with_up(nested), "adapter_up.weight: expected a dense tensor, got a nested one"),
    "quantised": (
        with_up(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        "adapter_up.weight: expected a dense tensor, got a quantised one",
    ),
    "compressed": (compressed, "pytorch_adapter.bin: expected a file of torch.save, got compressed records"),
    "code": (pickled({"x": Evil()}), r"pytorch_adapter.bin: expected tensors that torch.load\(weights"),
    "none": (lambda f: (f / "adapter.safetensors").unlink(), "expected adapter.safetensors or pytorch"),
    "foreign": (tensors(lambda t: t.update(x=torch.ones(1))), "parameters of adapter .*sample.* only"),
    "other-adapter": (
        tensors(lambda t: t.update({KEY.replace("sample", "other"): torch.ones(32, 4)})),
        "parameters of adapter sample only",
    ),
    "other-layer": (
        tensors(lambda t: t.update({KEY.replace("adapter_up", "adapter_gate"): torch.ones(32, 4)})),
        "adapter_gate.weight: expected parameters of adapter sample only",
    ),
    "norm": (
        tensors(lambda t: t.update({KEY.replace("adapter_up", "adapter_norm_before"): torch.ones(32)})),
        "adapter_norm_before.weight: expected parameters of adapter sample only",
    ),
    "no-down": (tensors(without_downs), r"expected adapter_down of shape \(r, features\), got \[\]"),
    "vector": (tensors(lambda t: t.update({DOWN: torch.ones(32)})), r"\(r, features\), got \[\(32,\)\]"),
    "no-rows": (tensors(lambda t: t.update({DOWN: torch.ones(0, 32)})), r"got \[\(0, 32\)\]"),
    "missing": (tensors(lambda t: t.pop(KEY)), r"expected encoder.layer.0.output.dense.up, as this model"),
    "shape": (tensors(lambda t: t.update({KEY: torch.ones(32, 3)})), r"shape \(32, 4\), got .* of \(32, 3\)"),
    "nan": (tensors(lambda t: t[KEY].fill_(float("nan"))), "expected finite numbers, got NaN or Inf"),
}


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated)")
@pytest.mark.parametrize("name", DAMAGES)
def test_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    damage(copied("bert-seq_bn", tmp_path))
    model = make("bert-seq_bn")
    with pytest.raises(CheckpointError, match=message):
        pk.adapters.load(model, tmp_path)
    assert pk.adapters.names(model) == []


def test_misplaced_norms_are_refused() -> None:
    sizes = samples.SIZES | {"num_key_value_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with pytest.raises(ValueError, match=r"layers\.0: expected one layer norm next to mlp.down_proj"):
        pk.adapters.add(llama, "one", pk.adapters.AdapterConfig.pfeiffer(after_norm=True))
