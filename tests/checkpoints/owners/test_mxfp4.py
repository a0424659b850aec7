"""GPT-OSS checkpoints in MXFP4: loaded packed, trained, and saved as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_checkpoints import expert_modules
from moe_routes import on_same_routes
from owned_folders import assert_same_file, gpt_oss, stored, trained
from rounding import ONE_STEP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_models import Auto, ids, logits, read, transformers

import testing
from peft_kernels.integrations import transformers as integration
from peft_kernels.quantize.model import report_of
from peft_kernels.quantize.transformers.mapped_files import MappedFiles

mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
peft = pytest.importorskip("peft", reason="adapters are PEFT's, and it is not installed")


@pytest.fixture(scope="module")
def tensors_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    folder = tmp_path_factory.mktemp("gpt-oss")
    return gpt_oss(folder), folder


@pytest.fixture
def folder(tensors_and_folder: tuple[dict[str, Tensor], Path]) -> Path:
    return tensors_and_folder[1]


@pytest.fixture
def tensors(tensors_and_folder: tuple[dict[str, Tensor], Path]) -> dict[str, Tensor]:
    return tensors_and_folder[0]


def twin(folder: Path, dtype: torch.dtype) -> Any:
    """The model as transformers' own reader dequantises it."""
    config = transformers.Mxfp4Config(dequantize=True)
    return Auto.from_pretrained(folder, quantization_config=config, dtype=dtype)


def assert_same_logits(ours: Any, plain: Any) -> None:
    wide = copy.deepcopy(plain).double()
    wide.set_experts_implementation("eager")
    truth, got, expected = on_same_routes(lambda model: model(ids()).logits, wide, ours, plain)
    testing.assert_close(got, expected, truth)


def frozen_logits(model: Any) -> Tensor:
    """As after training adapters. Biases of experts that need gradients are added after rounding."""
    return logits(model.requires_grad_(False))


def test_experts_stay_packed_and_the_rest_dense(folder: Path, tensors: dict[str, Tensor]) -> None:
    model = read(folder)
    experts = expert_modules(model)
    assert set(experts) == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}
    for module in experts.values():
        for weight in (module.gate_up_proj, module.down_proj):
            assert weight._state.format == "mxfp4" and weight.dtype == torch.bfloat16
        assert type(module.gate_up_proj_bias) is torch.nn.Parameter
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    report = report_of(model)
    assert report is not None and report.layers == list(experts)
    parts = sum(tensor.nbytes for tensor in (*tensors.values(), *model.buffers()))
    tables = 4 * 256 * 4 * 2 * 2  # of what scales mean: experts, weights, layers
    assert model.get_memory_footprint() == parts + tables


def test_weights_equal_transformers_to_the_bit(folder: Path, tensors: dict[str, Tensor]) -> None:
    for name, module in expert_modules(read(folder)).items():
        for key in ("gate_up_proj", "down_proj"):
            blocks, scales = (tensors[f"{name}.{key}_{what}"] for what in ("blocks", "scales"))
            for dtype in (torch.float32, torch.bfloat16):
                theirs = mxfp4._convert_moe_packed_tensors(blocks, scales, dtype=dtype)
                assert torch.equal(getattr(module, key)._state.dequantize(dtype).mT, theirs)


def test_all_scales_equal_transformers(tmp_path: Path) -> None:
    """All codes but 255, with the largest and the smallest numbers of fp32."""
    from peft_kernels.nf4.owners import OWNERS

    scales = torch.arange(252, dtype=torch.uint8).view(1, 63, 4)
    blocks = torch.randint(0, 256, (1, 63, 4, 16), dtype=torch.uint8)
    state, aside = OWNERS["mxfp4"].read({"_blocks": blocks, "_scales": scales}, "w")
    theirs = mxfp4._convert_moe_packed_tensors(blocks, scales, dtype=torch.float64)
    assert state.shape == (1, 63, 128) and not aside
    assert torch.equal(state.dequantize(torch.float32).mT, theirs.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits(folder: Path, dtype: torch.dtype) -> None:
    plain = twin(folder, dtype)
    assert not expert_modules(plain)
    ours = read(folder, dtype=dtype)
    assert_same_logits(ours, plain)


def test_clamped_gates(tmp_path: Path) -> None:
    """A limit that most gates and values pass: the order of both in a weight's rows matters."""
    gpt_oss(tmp_path, swiglu_limit=0.5)
    ours, plain = read(tmp_path, dtype=torch.float32), twin(tmp_path, torch.float32)
    assert_same_logits(ours, plain)
    assert ours.model.layers[0].mlp.experts.limit == 0.5


def test_pages_of_packed_weights_are_released(
    tensors: dict[str, Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the codes are not resident twice."""
    released: list[int] = []
    monkeypatch.setattr(MappedFiles, "release", lambda _, tensor: released.append(tensor.nbytes))
    read(folder)
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            released.remove(tensor.nbytes)


def test_shards(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    model = read(folder)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = read(tmp_path)
    assert torch.equal(logits(model), logits(again))
    again.save_pretrained(tmp_path / "one")
    assert_same_file(tmp_path / "one", tensors)


def test_on_meta(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = read(folder, device_map={"": "meta"})
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.get_memory_footprint() == read(folder).get_memory_footprint()


class Largest(TorchDispatchMode):
    """Bytes of the largest floating-point tensor that an op makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.device.type == "cpu":
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


def test_nothing_dense_is_made(tmp_path: Path) -> None:
    gpt_oss(tmp_path, num_local_experts=8)
    with Largest() as packed:
        model = read(tmp_path)
    experts = model.model.layers[0].mlp.experts
    assert packed.nbytes <= experts.gate_up_proj.nbytes < 2 * experts.down_proj.numel()
    with Largest() as dense:
        twin(tmp_path, torch.bfloat16)
    assert dense.nbytes >= 2 * experts.gate_up_proj.numel(), "it would have been seen"


LORA: dict[str, Any] = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "task_type": "CAUSAL_LM",
}
TRAINED: dict[str, Any] = {"lr": 1e-2, **LORA}


@pytest.mark.parametrize("patch", [False, True])
def test_training_equals_the_dense_model(
    patch: bool, folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """And the base is saved as it was, after training."""
    _, expected = trained(twin(folder, torch.float32), **TRAINED)
    tuned, losses = trained(read(folder, dtype=torch.float32), patch, **TRAINED)
    assert losses == pytest.approx(expected, rel=ONE_STEP) and losses[-1] < 0.7 * losses[0]
    assert set(expert_modules(tuned)), "packed all the time"
    base = tuned.unload()
    base.save_pretrained(tmp_path)
    packed = {name: tensor for name, tensor in tensors.items() if name.endswith(("_blocks", "_scales"))}
    wide = {
        name: tensor.float() for name, tensor in tensors.items() if name not in packed
    }  # as it was loaded
    assert_same_file(tmp_path, packed | wide)


def test_round_trip(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    read(folder).save_pretrained(tmp_path)
    assert_same_file(tmp_path, tensors)
    assert stored(tmp_path) == stored(folder)
    assert torch.equal(logits(twin(tmp_path, torch.bfloat16)), logits(twin(folder, torch.bfloat16)))


def test_trainer(folder: Path, tmp_path: Path) -> None:
    tuned = peft.get_peft_model(read(folder), peft.LoraConfig(r=4, **LORA))
    options = {
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    arguments = transformers.TrainingArguments(tmp_path, max_steps=2, save_steps=2, **options)
    rows = [{"input_ids": row, "labels": row} for row in ids(4, 8)]
    transformers.Trainer(tuned, arguments, train_dataset=rows).train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(read(folder), tmp_path / "checkpoint-2")
    assert torch.equal(logits(again.eval()), logits(tuned.eval()))


# Dense weights among packed ones


def test_all_merged_is_an_ordinary_checkpoint(folder: Path, tmp_path: Path) -> None:
    merged = trained(read(folder), steps=2, **TRAINED)[0].merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert stored(tmp_path) is None
    assert torch.equal(logits(Auto.from_pretrained(tmp_path)), logits(merged))


def test_experts_of_one_layer_merged(folder: Path, tmp_path: Path) -> None:
    """They are saved dense, and the configuration tells readers."""
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    tuned, _ = trained(read(folder), steps=2, **TRAINED | {"target_parameters": names})
    merged = tuned.merge_and_unload()
    assert set(expert_modules(merged)) == {"model.layers.1.mlp.experts"}
    merged.save_pretrained(tmp_path)
    before = stored(folder)["modules_to_not_convert"]
    assert stored(tmp_path)["modules_to_not_convert"] == [*before, "model.layers.0.mlp.experts"]
    again, theirs = read(tmp_path), twin(tmp_path, torch.bfloat16)
    assert set(expert_modules(again)) == {"model.layers.1.mlp.experts"}
    assert torch.equal(frozen_logits(again), frozen_logits(merged))
    assert_same_logits(again, theirs)


def test_one_merged_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    tuned, _ = trained(
        read(folder), steps=1, **TRAINED | {"target_parameters": ["model.layers.1.mlp.experts.down_proj"]}
    )
    merged = tuned.merge_and_unload()
    expected = r"^model\.layers\.1\.mlp\.experts\.down_proj: expected both weights of experts packed or both"
    with pytest.raises(ValueError, match=expected):
        merged.save_pretrained(tmp_path)


def test_packed_again_after_a_merge(folder: Path, tmp_path: Path) -> None:
    tuned, _ = trained(read(folder), steps=2, **TRAINED)
    tuned.merge_adapter()
    for module in expert_modules(tuned).values():
        module.gate_up_proj.requantize_()
        module.down_proj.requantize_()
    base = tuned.unload()
    base.save_pretrained(tmp_path)
    assert stored(tmp_path) == stored(folder)
    assert torch.equal(frozen_logits(read(tmp_path)), frozen_logits(base))


def test_dequantize(folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    model.dequantize()
    theirs = twin(folder, torch.bfloat16).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert stored(tmp_path) is None


# Plain from_pretrained


def test_enable(folder: Path, tmp_path: Path) -> None:
    from transformers.quantizers import auto

    before = [dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)]
    integration.enable()
    integration.enable()  # twice is once
    try:
        model = Auto.from_pretrained(folder)
        assert expert_modules(model) and torch.equal(logits(model), logits(read(folder)))
        assert not expert_modules(twin(folder, torch.bfloat16)), "they asked for a dense one"
    finally:
        integration.disable()
    assert [dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)] == before
    model.save_pretrained(tmp_path)
    assert stored(tmp_path) == stored(folder)
