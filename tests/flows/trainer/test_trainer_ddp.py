"""transformers' Trainer and TRL's SFTTrainer in two processes, against one process on the same batches."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import flow_models
import pytest
import torch
import torch.distributed as dist
from flow_checks import assert_near
from flow_models import adapted, arguments, ids, in_fp32, llama, logged, rows_of, tokenizer, words
from installed import before
from peft_models import trained_values
from ranks import MARKS, assert_no_errors, rank_tests

import peft_kernels as pk

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = MARKS

STEPS, RANKS = 20, 2
LOSSES, ADAPTERS = 1e-3, 1e-3
"""Bounds on the error of losses, and of changes of adapters, between several processes and one."""


def model() -> Any:
    found = adapted(llama("nf4"), r=4)
    pk.patch(found)
    return found


def options(rows: int, **more: Any) -> dict[str, Any]:
    """Arguments for a global batch of `rows`, in the same order everywhere."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    own: dict[str, Any] = {"per_device_train_batch_size": rows // ranks}
    if not before("transformers", "5.10"):  # which always shuffles, in the same order
        own["train_sampling_strategy"] = "sequential"
    return {"steps": STEPS, "learning_rate": 2e-3, "ddp_find_unused_parameters": False, **own, **more}


@contextlib.contextmanager
def single_process() -> Any:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = PartialState, AcceleratorState, GradientState
    kept = [dict(state._shared_state) for state in states]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = {name: os.environ.pop(name) for name in names}
    for state in states:
        state._shared_state.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        yield
    os.environ.update(environment)
    for state, old in zip(states, kept, strict=True):
        state._shared_state.clear()
        state._shared_state.update(old)


def compare(make: Any, folder: Path, **more: Any) -> Any:
    """Trains `make(model, folder, **options)` in one process and in all; returns the latter trainer."""
    start = trained_values(model())
    with single_process():
        one = make(model(), folder / f"alone-{dist.get_rank()}", **options(2 * RANKS, **more))
        one.train()
        assert one.args.world_size == 1
    shared = make(model(), folder / "shared", **options(2 * RANKS, **more))
    shared.train()
    assert shared.args.world_size == RANKS
    assert isinstance(shared.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    got, want = logged(shared), logged(one)
    assert len(got) == STEPS and got == pytest.approx(want, rel=LOSSES), (got, want)
    assert abs(got[-1] - got[0]) > 10 * LOSSES * got[0], f"these curves could be anything's: {got}"
    assert_near(
        *({n: p - start[n] for n, p in trained_values(each.model).items()} for each in (shared, one)),
        ADAPTERS,
    )
    for name, p in trained_values(shared.model).items():
        first = p.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p), f"{name} is not the same in each process"
    return shared


# Cases: each runs in both processes.


def trainer(folder: Path) -> None:
    """Losses and adapters equal those of one process; the adapter is saved once, as a PEFT folder."""
    import peft

    def make(model: Any, folder: Path, **options: Any) -> Any:
        return flow_models.trainer(model, folder, data=rows_of(STEPS), **options)

    for more in ({}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}):
        found = compare(make, folder / str(len(more)), **more)
    found.save_model(str(folder / "adapter"))
    dist.barrier()
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} < names
    again = peft.PeftModel.from_pretrained(llama("nf4"), folder / "adapter")
    saved = {name: p for name, p in again.named_parameters() if "lora_" in name}
    assert_near(saved, trained_values(found.model), 1e-9)


def one_bar(folder: Path) -> None:
    """Only the main process logs and shows the progress bar."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        flow_models.trainer(model(), folder, 2, rows_of(1), disable_tqdm=False).train()
    shown = err.getvalue() + out.getvalue()  # and warnings, once per process
    for text in ("2/2", "train_loss"):
        assert (text in shown) == (dist.get_rank() == 0), shown


def sft_trainer(model: Any, folder: Path, **given: Any) -> Any:
    """TRL's SFTTrainer on prompts and completions, with fp32 adapters."""
    import datasets
    import trl

    texts = [
        {"prompt": words(row[:3]), "completion": " " + words(row[3 : 5 + i % 6])}
        for seed in range(STEPS)
        for i, row in enumerate(ids(seed))
    ]
    args = arguments(trl.SFTConfig, folder, max_length=16, **given)
    data = datasets.Dataset.from_list(texts)
    return in_fp32(trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer()))


def sft(folder: Path) -> None:
    """Completions of several lengths: the loss is a mean over the tokens of all processes."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
        return  # test_sft reports it
    compare(sft_trainer, folder)


CASES = [trainer, one_bar, sft]

errors, _ = rank_tests(RANKS, CASES)


@pytest.mark.parametrize("case", ["trainer", "one_bar"])
def test_trainer(errors: dict[int, dict[str, str]], case: str) -> None:
    assert_no_errors(errors, case)


def test_sft(errors: dict[int, dict[str, str]]) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    assert_no_errors(errors, "sft")
