"""from_pretrained(quantization_config=NF4Config(experts=True)), and its checkpoints."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from fresh_process import Python
from moe_checkpoints import expert_modules, items_of, loaded, saved, stored
from moe_models import IMPLEMENTATIONS, MODELS
from moe_routes import on_same_routes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_models import Auto, NF4Config, assert_same_state, ids, read, transformers

import peft_kernels as pk
import testing
from peft_kernels.integrations.transformers import read_config
from peft_kernels.nf4.experts_packing import is_experts
from peft_kernels.nf4.packed_format import METHOD
from peft_kernels.quantize.model import report_of


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dense(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture
def model(dense: Path) -> Any:
    return loaded(dense)


# Loaded models


def losses(model: Any) -> dict[str, Tensor]:
    """Logits, the loss of each token, and a gradient through all layers."""
    embeddings, tokens = model.get_input_embeddings().weight, ids(8, 16)
    out = model(input_ids=tokens, labels=tokens)
    (grad,) = torch.autograd.grad(out.loss, embeddings)
    # One loss would also compare the rounding of one of torch's sums.
    predicted, wanted = out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    by_token = nn.functional.cross_entropy(predicted, wanted, reduction="none")
    return {"logits": out.logits.detach(), "loss": by_token.detach(), "gradient": grad}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_model_of_dequantised_weights(model: Any, implementation: str) -> None:
    model.set_experts_implementation(implementation)
    plain = copy.deepcopy(model).dequantize()
    assert not expert_modules(plain) and any(is_experts(module) for module in plain.modules())
    wide = copy.deepcopy(plain).double()
    wide.set_experts_implementation("eager")
    truth, got, expected = on_same_routes(losses, wide, model, plain)
    for what, value in got.items():
        testing.assert_close(value, expected[what], truth[what], what)


def test_equals_quantize_model(model: Any, dense: Path) -> None:
    other = pk.quantize_model(Auto.from_pretrained(dense), experts=True)
    assert expert_modules(model).keys() == expert_modules(other).keys() != set()
    assert_same_state(model, other)
    assert torch.equal(model(ids()).logits, other(ids()).logits)
    ours, theirs = report_of(model), report_of(other)
    assert ours is not None and ours == theirs and set(ours.layers) >= expert_modules(model).keys()
    assert model.get_memory_footprint() == other.get_memory_footprint() < 0.35 * ours.bytes_before


# Checkpoints


@pytest.mark.parametrize("how", ["read_config", "plain"])
@pytest.mark.parametrize("shards", ["50GB", "30kB"])
def test_round_trip(model: Any, shards: str, how: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "4bit", max_shard_size=shards)
    again = read(tmp_path / "4bit") if how == "read_config" else Auto.from_pretrained(tmp_path / "4bit")
    assert expert_modules(model).keys() == expert_modules(again).keys()
    assert_same_state(model, again)
    assert torch.equal(model(ids()).logits, again(ids()).logits)
    again.save_pretrained(tmp_path / "again", max_shard_size=shards)
    for file in (tmp_path / "4bit").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_save_after_quantize_model(dense: Path, tmp_path: Path) -> None:
    options = {"blocksize": 32, "double_quant": False, "compute_dtype": torch.bfloat16}
    model = pk.quantize_model(Auto.from_pretrained(dense), experts=True, **options)
    model.save_pretrained(tmp_path)
    assert stored(tmp_path) == {
        "quant_method": METHOD,
        "blocksize": 32,
        "double_quant": False,
        "modules_to_not_convert": ["lm_head"],
        "compute_dtype": "bfloat16",
        "experts": True,
        "format": "nf4",
    }
    assert not hasattr(model.config, "quantization_config"), "it tells of 4 bits while it is written only"
    again = read(tmp_path)
    assert_same_state(model, again)
    assert {module.compute_dtype for module in expert_modules(again).values()} == {torch.bfloat16}
    assert torch.equal(model(ids()).logits, again(ids()).logits)


def test_written_files(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    items = items_of(tmp_path)
    names = ("absmax", "nested_absmax", "nested_offset", "quant_state.peft_kernels__nf4_experts")
    found = [key.removesuffix(f".{names[-1]}") for key in items if key.endswith(names[-1])]
    assert len(found) == 2 * len(expert_modules(model))
    for weight in found:
        assert {key for key in items if key.startswith(f"{weight}.")} == {f"{weight}.{n}" for n in names}
        assert items[weight].dtype == torch.uint8 and items[weight].dim() == 2


def test_dequantised_model_is_saved_in_its_original_layout(model: Any, dense: Path, tmp_path: Path) -> None:
    model.dequantize().save_pretrained(tmp_path)
    assert stored(tmp_path) is None
    items, before = items_of(tmp_path), items_of(dense)
    assert {k: t.shape for k, t in items.items()} == {k: t.shape for k, t in before.items()}
    assert torch.equal(Auto.from_pretrained(tmp_path)(ids()).logits, model(ids()).logits)


def expected_layout(experts: Any) -> Tensor:
    """A merged down_proj in the layout of the experts' class."""
    dense: Tensor = experts.down_proj.dense
    return dense.mT if experts.stored_transposed else dense


def test_merged_weight_is_saved_dense(model: Any, tmp_path: Path) -> None:
    name, experts = next(iter(expert_modules(model).items()))
    delta = torch.full_like(experts.down_proj.dequantize(), 0.01)
    experts.down_proj.data += delta
    expected = model(ids()).logits
    model.save_pretrained(tmp_path / "merged")
    again = read(tmp_path / "merged")
    same = again.get_submodule(name)
    assert type(same.down_proj) is nn.Parameter and not same.gate_up_proj.is_dense
    assert torch.equal(same.down_proj, experts.down_proj.dense)
    assert torch.equal(again(ids()).logits, expected)
    copied = copy.deepcopy(again)
    same.down_proj.data.zero_()
    again.load_state_dict(copied.state_dict())
    assert_same_state(again, copied)
    again.save_pretrained(tmp_path / "again")
    assert_same_state(read(tmp_path / "again"), copied)
    plain = again.dequantize()
    turned = expected_layout(experts)
    assert not expert_modules(plain) and torch.equal(plain.get_submodule(name).down_proj, turned)
    experts.down_proj.data -= delta
    model.save_pretrained(tmp_path / "unmerged")
    assert_same_state(read(tmp_path / "unmerged"), model)


def test_all_experts_merged_uses_bitsandbytes_format(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "dense", "qwen3_moe"))
    for module in expert_modules(model).values():
        for weight in (module.gate_up_proj, module.down_proj):
            weight.data += torch.full_like(weight.dequantize(), 0.01)
    model.save_pretrained(tmp_path / "merged")
    assert stored(tmp_path / "merged")["quant_method"] == "bitsandbytes"
    again = read(tmp_path / "merged")
    assert not expert_modules(again)
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)


def test_transformers_alone_refuses_it(tmp_path: Path, python: Python) -> None:
    """transformers reports an unknown quantisation method, and refuses the shapes."""
    loaded(saved(tmp_path / "dense", "qwen3_moe")).save_pretrained(tmp_path / "4bit")
    python(
        "import logging, io\n"
        "import transformers\n"
        "heard = io.StringIO()\n"
        "transformers.utils.logging.get_logger().addHandler(logging.StreamHandler(heard))\n"
        "try:\n"
        f"    transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / '4bit')!r})\n"
        "except RuntimeError as error:\n"
        "    assert 'ignore_mismatched_sizes' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('it was loaded')\n"
        f"assert 'Unknown quantization type, got {METHOD}' in heard.getvalue(), heard.getvalue()\n"
    )


def test_configurations(tmp_path: Path) -> None:
    assert NF4Config(experts=True).to_dict()["quant_method"] == METHOD
    assert NF4Config().to_dict()["quant_method"] == "bitsandbytes"
    config = NF4Config(32, False, ["a"], torch.float16, experts=True)
    assert vars(NF4Config.from_dict(config.to_dict())) == vars(config)
    with pytest.raises(ValueError, match="experts: expected True or False, got 'all'"):
        NF4Config(experts="all")  # type: ignore[arg-type]
    loaded(saved(tmp_path / "dense", "olmoe")).save_pretrained(tmp_path / "4bit")
    assert read_config(tmp_path / "4bit").quantization_config["experts"] is True


# Devices and memory


def test_experts_stay_dense_by_default_with_a_warning(
    dense: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        model = loaded(dense, nf4={"experts": False})
    assert "experts=True packs them" in caplog.text and not expert_modules(model)
    model.save_pretrained(tmp_path)
    assert stored(tmp_path)["quant_method"] == "bitsandbytes"


def test_modules_to_not_convert(tmp_path: Path) -> None:
    saved(tmp_path / "dense", "gpt_oss")
    skip = ["layers.1.mlp.experts", "lm_head"]
    model = loaded(tmp_path / "dense", nf4={"modules_to_not_convert": skip})
    assert list(expert_modules(model)) == ["model.layers.0.mlp.experts"]
    report = report_of(model)
    assert report is not None and report.left["model.layers.1.mlp.experts"] == "named in skip"
    model.save_pretrained(tmp_path / "4bit")
    again = read(tmp_path / "4bit")
    assert_same_state(model, again)
    assert torch.equal(again(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("kind", ["qwen3_moe"])
@pytest.mark.parametrize("stored_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("asked", ["auto", torch.float32, None], ids=str)
def test_requested_dtype(kind: str, stored_dtype: torch.dtype, asked: Any, tmp_path: Path) -> None:
    saved(tmp_path, kind, stored_dtype)
    options = {} if asked is None else {"dtype": asked}
    model = loaded(tmp_path, **options)
    other = Auto.from_pretrained(tmp_path, **options)
    assert {w.dtype for m in expert_modules(model).values() for w in (m.gate_up_proj, m.down_proj)} == {
        other.dtype
    }
    assert_same_state(model, pk.quantize_model(other, experts=True))


@pytest.mark.parametrize("kind", ["mixtral"])
def test_other_ways_to_load(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    one, many = tmp_path / "one", tmp_path / "many"
    model = loaded(saved(one, kind))
    saved(many, kind, max_shard_size="30kB")
    assert len(list(many.glob("*.safetensors"))) > 3
    assert_same_state(loaded(many), model)
    assert_same_state(loaded(one, device_map={"": "cpu"}), model)
    base = transformers.AutoModel.from_pretrained(one, quantization_config=NF4Config(experts=True))
    model.save_pretrained(tmp_path / "4bit")
    again = transformers.AutoModel.from_pretrained(tmp_path / "4bit", config=read_config(tmp_path / "4bit"))
    assert expert_modules(base).keys() == expert_modules(again).keys() != set()
    assert_same_state(base, again)
    meta = loaded(one, device_map={"": "meta"})
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta.get_memory_footprint() == model.get_memory_footprint()
    assert meta.state_dict().keys() == model.state_dict().keys()


class Largest(TorchDispatchMode):
    """Bytes of the largest floating-point tensor that an op allocates."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.device.type == "cpu":
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_separately_stored_experts_are_packed_one_by_one(kind: str, tmp_path: Path) -> None:
    """transformers would stack them and concatenate gate and up."""
    saved(tmp_path, kind)
    assert any(".experts.3." in key for key in items_of(tmp_path))
    with Largest() as dense:
        Auto.from_pretrained(tmp_path)
    with Largest() as packed:
        model = loaded(tmp_path)
    module = next(iter(expert_modules(model).values()))
    experts, *one = module.gate_up_proj.shape
    assert dense.nbytes == experts * one[0] * one[1] * 4
    assert packed.nbytes <= one[0] * one[1] * 4


@pytest.mark.parametrize("copying", [copy.deepcopy, models.pickled])
def test_copied_model_saves(copying: Any, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "dense", "gpt_oss"))
    copied = copying(model)
    assert expert_modules(copied).keys() == expert_modules(model).keys()
    copied.save_pretrained(tmp_path / "4bit")
    assert_same_state(read(tmp_path / "4bit"), model)
    copied.dequantize()
    assert not expert_modules(copied) and expert_modules(model)
