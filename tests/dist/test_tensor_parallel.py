"""NF4 models under transformers' tensor-parallel plans equal those of one process: two processes over gloo,
three once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import MARKS, assert_no_errors, errors_by_rank, rank_tests
from rounding import ONE_MODEL
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.quantize.report import report_of

transformers = pytest.importorskip("transformers", reason="plans are transformers', and it is not installed")
peft = pytest.importorskip("peft", reason="adapters are PEFT's, and it is not installed")
if not hasattr(transformers.PreTrainedModel, "_resolve_parallel_plans"):
    pytest.skip("transformers is older than 5.24", allow_module_level=True)

pytestmark = MARKS

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
IDS = torch.arange(3, 23).view(2, 10)
SMALL = {"vocab_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2}

# Each case runs in every process.


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    biases = {"attention_bias": True, "mlp_bias": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | sizes | biases | options))


def phi3() -> Any:
    """Its plan gathers weights split by rows, and splits whole weights by columns."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.Phi3Config(**SMALL | sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.Phi3ForCausalLM(config)


def moe() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SMALL | sizes | experts))


def saved(folder: Path, model: Callable[..., Any], **options: Any) -> Path:
    """A dense checkpoint, written by process 0."""
    torch.manual_seed(0)
    if dist.get_rank() == 0:
        made = model(**options)
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.1)
        made.save_pretrained(folder)
    dist.barrier()
    return folder


def loaded(folder: Path, parallel: bool, packed: bool = False, **options: Any) -> Any:
    """In fp32, quantised while loading or loaded in 4 bits."""
    from peft_kernels.integrations.transformers import NF4Config, read_config

    if packed:
        options = {"config": read_config(folder)}
    else:
        options = {"quantization_config": NF4Config(**options)}
    if parallel:
        options["distributed_config"] = transformers.distributed.DistributedConfig(tp_plan="auto")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def nf4_of(model: nn.Module) -> dict[str, Any]:
    """This process's slices of NF4 weights, and whole weights, by name."""
    found = {name: getattr(p, "_local_tensor", p) for name, p in model.named_parameters()}
    return {name: p for name, p in found.items() if isinstance(p, pk.NF4Weight)}


def near(got: Tensor, want: Tensor, most: float = ONE_MODEL) -> None:
    assert float((got - want).norm()) <= most * float(want.norm())


def assert_same_model(one: Any, parallel: Any) -> None:
    """Compares the bits of the weights, results with and without gradients, and tokens."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole, cuts = nf4_of(one), 0
    placed = dict(parallel.named_parameters())
    assert whole.keys() == nf4_of(parallel).keys() and whole
    for name, mine in nf4_of(parallel).items():
        want = whole[name].dequantize()
        placements = getattr(placed[name], "placements", ())
        for placement in placements:
            want, cuts = want.chunk(ranks, placement.dim)[rank], cuts + 1
        assert torch.equal(mine.dequantize(), want), name
        assert placed[name].shape == whole[name].shape
    assert cuts
    with torch.no_grad():
        near(parallel(input_ids=IDS).logits, one(input_ids=IDS).logits)
    results = []
    for model in (one, parallel):
        x = testing.tensor(2, 5, model.config.hidden_size, seed=4).requires_grad_()
        y = model(inputs_embeds=x).logits
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
        model.zero_grad()
    for got, want in zip(results[1], results[0], strict=True):
        near(got, want)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(IDS),
        "pad_token_id": 0,
    }
    assert torch.equal(parallel.generate(IDS, **options), one.generate(IDS, **options))


def loads_local_slice(folder: Path) -> None:
    """Quantised on loading or loaded in 4 bits, each process has about half of the same bits; one process and
    several save the same files."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dense = saved(folder, llama)
    for nested in (True, False):
        # One layer stays dense, and others of its kind do not.
        options: Any = {
            "double_quant": nested,
            "modules_to_not_convert": ["model.layers.1.mlp.down_proj", "lm_head"],
        }
        one, parallel = (loaded(dense, several, **options) for several in (False, True))
        assert_same_model(one, parallel)
        here, there = (sum(p.nbytes for p in nf4_of(model).values()) for model in (parallel, one))
        assert here <= 0.54 * there, (here, there)
        report = report_of(parallel)
        alone = report_of(one)
        assert report is not None and alone is not None and report.layers == alone.layers
        assert here < report.bytes_after < alone.bytes_after
        folders = [folder / f"{name}-{nested}" for name in ("one", "several")]
        if dist.get_rank() == 0:
            one.save_pretrained(folders[0])
        parallel.save_pretrained(folders[1])
        dist.barrier()
        assert_same_files(*folders)
        again = [loaded(folders[1], several, packed=True) for several in (False, True)]
        assert_same_model(*again)
        assert type(again[1].model.layers[1].mlp.down_proj) is nn.Linear


def assert_same_files(one: Path, other: Path) -> None:
    from safetensors.torch import load_file

    files = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert tensor.dtype == files[1][name].dtype and torch.equal(tensor, files[1][name]), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


def reads_local_slice_only(folder: Path) -> None:
    """Packed bytes are views of the file until this process's slice is copied."""
    from peft_kernels.quantize.transformers import conversion as nf4_conversion

    packed = folder / "packed"
    dense = saved(folder, llama)
    if dist.get_rank() == 0:
        loaded(dense, False).save_pretrained(packed)
    dist.barrier()
    copied, aligned = [], nf4_conversion.Read._aligned
    nf4_conversion.Read._aligned = lambda self, item: copied.append(item.nbytes) or aligned(self, item)
    try:
        model = loaded(packed, True, packed=True)
    finally:
        nf4_conversion.Read._aligned = aligned
    assert not copied and nf4_of(model)


def other_plans(folder: Path) -> None:
    for model in (phi3, moe):
        dense, packed = saved(folder / model.__name__, model), folder / f"{model.__name__}-4bit"
        one = loaded(dense, False)
        if dist.get_rank() == 0:  # transformers 5.24 does not gather weights split by packed_colwise
            one.save_pretrained(packed)
        dist.barrier()
        assert_same_model(one, loaded(dense, True))
        assert_same_model(one, loaded(packed, True, packed=True))


def trains_adapters(folder: Path) -> None:
    """Gradients of a LoRA step, with and without checkpointing, patched or not, equal those of one process.
    The saved folder is PEFT's, for one process or several."""
    from torch.distributed.tensor import distribute_tensor

    dense = saved(folder, llama)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    one, parallel = (peft.get_peft_model(loaded(dense, several), config) for several in (False, True))
    theirs = dict(parallel.named_parameters())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.05)
                other = theirs[name]
                assert other.requires_grad and other.shape == p.shape, name
                whole = p.detach()
                cuts = hasattr(other, "placements")
                assert cuts == (("lora_B" if any(n in name for n in ROWS) else "lora_A") in name)
                if cuts:
                    whole = distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)
                other.copy_(whole)
    optimizers = [
        pk.optim.AdamW8bit([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (one, parallel)
    ]
    # Both are patched: a fused norm rounds in another order than stock's.
    steps = [lambda: None, lambda: (pk.patch(one), pk.patch(parallel)), lambda: checkpoint(one, parallel)]
    for step in steps:
        step()
        for model in (one, parallel):
            model.train()
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
        for name, p in one.named_parameters():
            if p.requires_grad:
                grad = theirs[name].grad
                near(grad.full_tensor() if hasattr(grad, "placements") else grad, p.grad)
        near(norm_of(parallel), norm_of(one))
        for optimizer in optimizers:
            optimizer.step()
    text = str(pk.patch(parallel))
    assert (
        "0 of 14 layers fused" in text and "tensor parallelism: its forward runs between collectives" in text
    )
    assert pk.unpatch(parallel)
    parallel.save_pretrained(folder / "adapter")
    dist.barrier()
    for several in (False, True):
        model = peft.PeftModel.from_pretrained(loaded(dense, several), folder / "adapter")
        with torch.no_grad():
            near(model(input_ids=IDS).logits, one.eval()(input_ids=IDS).logits)


def norm_of(model: Any) -> Tensor:
    """Norm of all gradients: torch's takes only DTensors or only tensors."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    cut = [g for g in gradients if hasattr(g, "placements")]
    norms = [torch.nn.utils.get_total_norm([g for g in gradients if not hasattr(g, "placements")])]
    if cut:
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append(torch.nn.utils.get_total_norm(cut).full_tensor())
    return torch.stack(norms).norm()


ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def checkpoint(*models: Any) -> None:
    for model in models:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()


def refused(kind: type[Exception], sentence: str, work: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=sentence):
        work()
    dist.barrier()  # no process waits for another


def refusals(folder: Path) -> None:
    """Every process raises, naming the layer, and nothing is written or changed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import CheckpointException

    from peft_kernels.integrations import fsdp
    from peft_kernels.integrations.peft import merge_and_unload

    dense = saved(folder / "blocks", llama, intermediate_size=576)
    name = r"model\.layers\.0\.mlp\.down_proj: "
    sentence = name + "cannot be cut rowwise while packed for 2 processes: its 576 columns, 288 for each"
    refused(ValueError, sentence, lambda: loaded(dense, True))
    packed = folder / "packed"
    if dist.get_rank() == 0:
        loaded(dense, False).save_pretrained(packed)
    dist.barrier()
    refused(ValueError, sentence, lambda: loaded(packed, True, packed=True))
    options = {"modules_to_not_convert": [f"model.layers.{i}.mlp.down_proj" for i in range(2)]}
    assert_same_model(*(loaded(dense, several, **options) for several in (False, True)))
    experts = saved(folder / "experts", moe)
    sentence = r"model\.layers\.0\.mlp\.experts: expected dense experts"
    refused(ValueError, sentence, lambda: loaded(experts, True, experts=True))

    model = loaded(saved(folder / "fits", llama), True)
    part = re.escape(WEIGHT) + ": this process has a part of it"
    refused(RuntimeError, part, lambda: model.dequantize())
    refused(RuntimeError, part, lambda: model.load_state_dict(model.state_dict()))
    refused(RuntimeError, part + ".* cast to torch.bfloat16", lambda: model.bfloat16())
    refused(RuntimeError, "q_proj.* a part of it", lambda: start(model, init_lora_weights="pissa"))
    own = {"distributed_checkpoint": True}
    with pytest.raises(CheckpointException) as error:
        model.save_pretrained(folder / "own", **own)
    assert re.search(part + ".* to be saved", str(error.value), re.DOTALL)
    with pytest.raises(CheckpointException):
        dcp.save(dict(model.named_parameters()), checkpoint_id=folder / "dcp")
    assert not [*folder.glob("own/*.safetensors"), *folder.glob("dcp/.metadata")]
    with pytest.raises(RuntimeError, match=part + ".* to be saved"):
        model.state_dict()[WEIGHT].state_dict()
    instead = r"q_proj.*weight: this process has a part of it.*expected model\.save_pretrained"
    refused(RuntimeError, instead, lambda: fsdp.checkpoint_state(model))
    refused(RuntimeError, instead, lambda: fsdp.full_state_dict(model))
    adapted = start(loaded(folder / "fits", True))
    refused(RuntimeError, instead, lambda: fsdp.save_adapter(adapted, folder / "adapter"))
    refused(RuntimeError, "expected merges of a model in one", lambda: merge_and_unload(adapted))
    before = {name: p.clone() for name, p in nf4_of(adapted).items()}
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):  # torch's own error, at the delta
        refused(RuntimeError, r"mixed torch\.Tensor and DTensor", merge)
    assert all(torch.equal(p.packed, before[name].packed) for name, p in nf4_of(adapted).items())
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    with pytest.raises(RuntimeError, match="expected calls of the layer, hooks and all"):
        pk.nn.NF4Linear.forward(layer, torch.zeros(1, 256))
    assert_same_model(loaded(folder / "fits", False), loaded(folder / "fits", True))


def plans_for_experts(folder: Path) -> None:
    """Refused for a 4-bit model; a model already split keeps its dense experts, and the report says so."""
    from peft_kernels.integrations.transformers import NF4Config

    options = {"distributed_config": transformers.distributed.DistributedConfig(tp_size=2, ep_size=2)}
    dense, read = saved(folder, moe), transformers.AutoModelForCausalLM.from_pretrained
    packed = {"quantization_config": NF4Config(experts=True)} | options
    refused(ValueError, r"tensor parallelism alone .* got ep_size=2", lambda: read(dense, **packed))
    report = report_of(pk.quantize_model(read(dense, **options), experts=True))
    assert "2 left as they are (model.layers.0.mlp.experts, model.layers.1.mlp.experts): its weights" in str(
        report
    )


def start(model: Any, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **options))


def damaged(folder: Path) -> None:
    """Every process raises the error that names the tensor."""
    from safetensors.torch import load_file, save_file

    dense = saved(folder, llama)
    packed, key = folder / "packed", "model.layers.1.self_attn.o_proj.weight"
    if dist.get_rank() == 0:
        loaded(dense, False).save_pretrained(packed)
        tensors = load_file(packed / "model.safetensors")
        tensors[f"{key}.absmax"] = tensors[f"{key}.absmax"][:-1].clone()
        save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    dist.barrier()
    refused(ValueError, rf"{re.escape(key)}\.absmax: ", lambda: loaded(packed, True, packed=True))


def three(folder: Path) -> None:
    """Heads and blocks for three processes, and rows that do not divide evenly."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 3, "num_key_value_heads": 3}
    dense = saved(folder, llama, **sizes)
    # The vocabulary of 128 is split into 43, 43 and 42 rows, and gathered.
    one, parallel = (loaded(dense, several, modules_to_not_convert=[]) for several in (False, True))
    assert nf4_of(parallel)["lm_head.weight"].shape[0] == (43, 43, 42)[dist.get_rank()]
    assert_same_model(one, parallel)
    if dist.get_rank() == 0:
        one.save_pretrained(folder / "one")
    parallel.save_pretrained(folder / "several")
    dist.barrier()
    assert_same_files(folder / "one", folder / "several")


CASES = [
    *(loads_local_slice, reads_local_slice_only, other_plans, trains_adapters),
    *(refusals, plans_for_experts, damaged),
]


errors, test_two_processes = rank_tests(2, CASES)


def test_three_processes() -> None:
    assert_no_errors(errors_by_rank(3, [three]), "three")
