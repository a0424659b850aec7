#!/usr/bin/env python3
"""QLoRA with TRL's SFTTrainer on several devices: one script for DDP and FSDP2. Copy it.

accelerate launch --config_file examples/accelerate/ddp.yaml examples/qlora_accelerate.py \
    [MODEL_FOLDER [OUTPUT_FOLDER [STEPS]]]

Without a model it is SmolLM2-135M-Instruct. Without GPUs it runs on the CPU, under ddp.yaml.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import peft_kernels as pk
from peft_kernels.integrations.transformers import NF4Config


def main(model_folder: str = "", output: str = "qlora-output", steps: str = "20") -> None:
    # First: it sets up the distributed process and its GPU.
    arguments = SFTConfig(
        output_dir=f"{output}/checkpoints",
        max_steps=int(steps),
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every adapter is used in every step
        report_to="none",
    )
    process = PartialState()
    if not model_folder:
        from demo_model import model_folder as demo_model

        with process.main_process_first():  # converts it, once
            model_folder = str(demo_model(None, Path(output)))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.bfloat16, quantization_config=NF4Config()
    )  # on this process's GPU
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    report = pk.patch(model)
    process.print(report)

    sums = [(a, b) for a in range(10) for b in range(10)]
    pairs = [{"prompt": f"What is {a} plus {b}?", "completion": f" {a + b}."} for a, b in sums]
    data = Dataset.from_list(pairs)
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(f"{output}/adapter")  # the full adapter, by the main process


if __name__ == "__main__":
    main(*sys.argv[1:])
