"""Parses README.md and the pages of docs/: snippets with their requirements, figures, paths."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ranks import ended, enter, forked, free_port

import peft_kernels as pk

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = Path(pk.__file__).resolve().parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
HOMES = [DOCS / "benchmarks.md", DOCS / "gpu.md"]
"""Where measured figures stand; other pages quote them."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"<!-- needs: (\w+) -->")
MEASURED = re.compile(r"\d[\d.,]*\**(?:%| ?(?:times (?:as|the)\b|ms\b|us\b|tokens/s|[MG]B\b))")


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    needs: str
    """What it requires (a key of `missing`), or ""."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def snippets(page: Path) -> Iterator[Snippet]:
    """All fenced blocks. `<!-- needs: ... -->` applies to the page if at its top, else to the next block."""
    text = page.read_text(encoding="utf-8")
    top = NEEDS.match(text)
    end = 0
    for block in FENCE.finditer(text):
        marks = NEEDS.findall(text, end, block.start())
        needs = top.group(1) if top else marks[-1] if marks else ""
        end = block.end()
        yield Snippet(name_of(page), text.count("\n", 0, block.start()) + 1, *block.groups(), needs)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@functools.cache
def missing(needs: str) -> str:
    """Why snippets with these needs cannot run here, or ""."""
    modules = {
        "trl": ("trl", "SFTTrainer"),
        "torchrun": ("torch.distributed.run", "main"),
        "": ("peft_kernels", "patch"),
    }
    module, attribute = modules[needs]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module} is not installed"
    if not hasattr(importlib.import_module(module), attribute):
        return f"{module} has no {attribute} yet"
    return ""


class Done(NamedTuple):
    returncode: int
    said: str


def command(words: str, folder: Path) -> Done:
    arguments = shlex.split(words, comments=True)
    return _run(f"import sys\nfrom peft_kernels.cli.main import main\nsys.exit(main({arguments!r}))", folder)


def torchrun(code: str, folder: Path, processes: int = 2) -> Done:
    """Runs a script in several processes, with the environment of torchrun."""
    return _run(code, folder, processes)


def _run(code: str, folder: Path, count: int = 1) -> Done:
    said, port = folder / "said.txt", free_port()
    said.write_text("")
    context: Any = forked()
    processes = [
        context.Process(target=_execute, args=(code, folder, said, rank, count, port), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return Done(max(map(abs, ended(processes))), said.read_text(encoding="utf-8"))


def _execute(code: str, folder: Path, said: Path, rank: int, count: int, port: int) -> None:
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(folder)
    torch.set_num_threads(1)
    if count > 1:
        enter(rank, count, port)
    exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})


def make_model(folder: Path) -> None:
    """A Llama of two layers with random weights and a tokenizer of bytes, as the pages' "my-model"."""
    import tokenizers
    import transformers

    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *sorted(letters)])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    sizes = {"hidden_size": 128, "intermediate_size": 256}  # whole blocks for each of two processes
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": len(vocabulary), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, **heads, **tokens)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_mixture(folder: Path) -> None:
    """A Qwen3-MoE of two layers, as the pages' "my-mixture"."""
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_packed(gpt_oss: Path, nvfp4: Path) -> None:
    """Checkpoints that others packed, as the pages' "my-gpt-oss" and "my-nvfp4"."""
    import owned_folders

    owned_folders.gpt_oss(gpt_oss)
    owned_folders.nvfp4(nvfp4, "compressed-tensors")


def make_adapter(model: Path, folder: Path) -> None:
    """LoRA on the linear layers of a model, as the pages' "my-adapter"."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder)
