"""Tiny models with nonzero adapters, a local tokenizer, and data for the flow tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
import transformers
from flow_checks import assert_near
from installed import before
from peft_models import trained_values
from rounding import CURVE
from torch import Tensor, nn

import peft_kernels as pk

VOCABULARY = 128
BASES = models.BASES


def llama(base: str = "dense", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A Llama of two layers, with weights large enough that a different forward changes the losses."""
    defaults = {"intermediate_size": 128, "initializer_range": 0.2, "pad_token_id": 0}
    model = models.tiny_llama(**defaults | overrides).to(dtype)
    if base == "nf4":
        pk.quantize_model(model)
    elif base == "bnb":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                model.set_submodule(name, models.to_linear4bit(module))
        model.is_loaded_in_4bit = True
    return model


def bnb_llama(folder: Path) -> Any:
    """The same Llama loaded as in tutorials: `from_pretrained` with a BitsAndBytesConfig."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    llama(dtype=torch.bfloat16).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def config(**options: Any) -> Any:
    """A LoraConfig for all linear layers whose B is not zero."""
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.LoraConfig(**defaults | options)


def adapted(model: Any, **options: Any) -> Any:
    """A PEFT model in training mode, with the same adapters for each call."""
    torch.manual_seed(3)
    targets = config(**options).target_modules
    try:
        return peft.get_peft_model(model, config(**options)).train()
    except ValueError:
        if isinstance(targets, str) and before("peft", "0.20") and not before("peft", "0.19"):
            pytest.skip("PEFT 0.19 takes target_modules for a set of letters in some mixtures of experts")
        raise


def patched_copy(stock: nn.Module) -> tuple[Any, Any]:
    model = copy.deepcopy(stock)
    return model, pk.patch(model)


def in_fp64(model: Any) -> Any:
    """A copy in fp64 with dequantised weights, the ground truth."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if isinstance(weight, pk.NF4Weight):
            packed = weight
        elif hasattr(weight, "quant_state"):
            packed = pk.NF4Weight.from_bnb(weight)
        else:
            continue
        dense = packed.dequantize(torch.float32).detach()
        if isinstance(module, nn.Linear):
            new: nn.Module = nn.Linear(dense.shape[1], dense.shape[0], bias=False)
        else:  # Conv1D stores its weight transposed
            new = transformers.pytorch_utils.Conv1D(module.nf, module.nx)
            dense = dense if dense.shape == new.weight.shape else dense.T
        new.weight = nn.Parameter(dense.clone(), requires_grad=False)
        new.bias = module.bias
        model.set_submodule(name, new)
    for flag in ("is_loaded_in_4bit", "is_quantized"):
        for part in (model, model.get_base_model() if hasattr(model, "get_base_model") else model):
            if flag in vars(part):
                setattr(part, flag, False)
    for parameter in [*model.parameters(), *model.buffers()]:
        if parameter.is_floating_point():
            parameter.data = parameter.data.double()
    model.config.dtype = torch.float64
    return model


def tokenizer() -> Any:
    """A tokenizer for the words w3 ... w127."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    words_ = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words_.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


def ids(seed: int = 1, rows: int = 4, length: int = 10, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def words(row: Tensor | list[int]) -> str:
    return " ".join(f"w{int(i)}" for i in row)


def arguments(kind: Any, folder: Path, steps: int, **more: Any) -> Any:
    """Arguments of a Trainer of transformers or TRL: constant learning rate, every step logged, nothing
    saved."""
    defaults = {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2, "seed": 0}
    defaults |= {"learning_rate": 5e-3, "lr_scheduler_type": "constant", "bf16": False, "use_cpu": True}
    quiet = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return kind(**defaults | quiet | more)


def rows_of(batches: int = 2) -> list[dict[str, Tensor]]:
    """A data set for language models: the rows of `ids(0)`, `ids(1)`, ..."""
    return [{"input_ids": row, "labels": row} for i in range(batches) for row in ids(i)]


def trainer(model: Any, folder: Path, steps: int, data: Any = None, given: Any = None, **more: Any) -> Any:
    """A Trainer of transformers with `arguments(**more)` and `given`, on `rows_of()` by default."""
    options = arguments(transformers.TrainingArguments, folder, steps, **more)
    data = rows_of() if data is None else data
    return transformers.Trainer(model=model, args=options, train_dataset=data, **given or {})


def logged(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same_logs(got: Any, want: Any) -> None:
    """All logged values of two trainers except times, and the trained adapters."""
    for one, other in zip(got.state.log_history, want.state.log_history, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {k for k in one if "time" in k or "per_second" in k}:
            assert one[key] == pytest.approx(other[key], rel=CURVE, abs=1e-4), key  # four decimals
    assert_near(*(trained_values(each.model) for each in (got, want)), bound=CURVE)


def in_fp32(trainer: Any) -> Any:
    """Casts adapters to fp32: TRL makes those of a 4-bit model bf16, where one rounding changes the
    samples."""
    for p in trainer.model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    return trainer


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


class Tokens:
    """Counts the tokens that a model's layers process."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        layer = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
        layer.register_forward_pre_hook(lambda _, args: self.shapes.append(tuple(args[0].shape[:2])))

    @property
    def total(self) -> int:
        return sum(rows * length for rows, length in self.shapes)
