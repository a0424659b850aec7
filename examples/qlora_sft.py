#!/usr/bin/env python3
"""QLoRA with TRL's SFTTrainer on peft_kernels: load, quantise, LoRA, patch, train, save, merge. Copy it.

Needs TRL: pip install 'peft_kernels[trl]', in a clone '.[trl]'.

python examples/qlora_sft.py [MODEL_FOLDER [OUTPUT_FOLDER [STEPS]]]
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import peft_kernels as pk


def main(model_folder: str = "", output: str = "qlora-output", steps: str = "20") -> None:
    if not model_folder:  # SmolLM2-135M-Instruct, as `make setup` installs it
        from demo_model import model_folder as demo_model

        model_folder = str(demo_model(None, Path(output)))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    pk.quantize_model(model)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    print(pk.patch(model))

    sums = [(a, b) for a in range(10) for b in range(10)]
    pairs = [{"prompt": f"What is {a} plus {b}?", "completion": f" {a + b}."} for a, b in sums]
    arguments = SFTConfig(
        output_dir=f"{output}/checkpoints",
        max_steps=int(steps),
        learning_rate=5e-4,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    data = Dataset.from_list(pairs)
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()

    trainer.save_model(f"{output}/adapter")
    merged = trainer.model.merge_and_unload()  # dense layers, in the model's dtype
    merged.save_pretrained(f"{output}/merged")
    tokenizer.save_pretrained(f"{output}/merged")


if __name__ == "__main__":
    main(*sys.argv[1:])
