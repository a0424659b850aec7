"""QLoRA of SmolLM2-135M in several processes beside one: `python -m bench.models.distributed`.

Twenty steps in fp32 on the task of `examples/finetune.py`, with the same batches: in one process, under DDP,
under FSDP2 in two and three processes, and under FSDP2 killed halfway (SIGKILL of one process, and of all)
and resumed from its last checkpoint. Prints the largest relative difference from one process of a loss and of
the adapters' change, and the share of the base in each process. Runs on the CPU with gloo; nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ranks import ended, enter, forked, free_port
from torch import Tensor, nn

from ..lib import examples

MAX_LENGTH, RANK, LR, SEED, BATCH = 64, 8, 5e-4, 0, 6


class Result(NamedTuple):
    """Of a run: losses by step, change of the adapters, the largest share of the base in one process."""

    losses: dict[int, float]
    change: dict[str, Tensor]
    share: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=20, help="of each run (20); checkpoints are taken halfway")
    add("--model", type=Path, help="a folder, instead of SmolLM2-135M")
    add("--data", type=Path, help="JSON lines, as of examples/finetune.py")
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error(f"--steps: expected at least 4, got {options.steps}")
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))
    return 0


def compare(options: Any, folder: Path) -> None:
    one = run(options, "one", 1, folder / "one")
    assert one is not None
    print(f"one process: losses {one.losses[0]:.4f} to {one.losses[options.steps - 1]:.4f}", flush=True)
    for title, strategy, ranks in (("DDP, 2", "ddp", 2), ("FSDP2, 2", "fsdp2", 2), ("FSDP2, 3", "fsdp2", 3)):
        compare_with(title, run(options, strategy, ranks, folder / title), one)
    for victims, ranks in (("1", 2), ("01", 3)):
        where = folder / f"killed-{victims}"
        if run(options, "fsdp2", 2, where, killed=victims) is not None:
            raise RuntimeError(f"processes {victims}: expected to be killed, but finished")
        title = f"FSDP2, {len(victims)} of 2 killed, then {ranks}"
        compare_with(title, run(options, "fsdp2", ranks, where / "again", resume=where / "checkpoint"), one)


def compare_with(title: str, found: Result | None, one: Result) -> None:
    if found is None:
        raise RuntimeError(f"{title}: did not finish, see above")
    loss = max(abs(found.losses[step] / one.losses[step] - 1) for step in found.losses)
    squares = [
        (float((found.change[name] - change).square().sum()), float(change.square().sum()))
        for name, change in one.change.items()
    ]
    apart = (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5
    print(
        f"{title}: {len(found.losses)} steps, losses within {loss:.1e}, adapters within {apart:.1e} of their "
        f"change, base in a process at most {found.share:.1%}",
        flush=True,
    )


def run(
    options: Any, strategy: str, ranks: int, out: Path, resume: Path | None = None, killed: str = ""
) -> Result | None:
    """None if it did not finish."""
    out.mkdir(parents=True, exist_ok=True)
    setup = Setup(strategy, ranks, out, resume, killed)
    context: Any = forked()
    port = free_port()
    processes = [
        context.Process(target=child, args=(options, setup, rank, port), daemon=True) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    if any(ended(processes, seconds=3600)):
        return None
    return Result(**torch.load(out / "found.pt"))


class Setup(NamedTuple):
    """Of a run."""

    strategy: str
    ranks: int
    out: Path
    resume: Path | None
    killed: str
    """Ranks that kill themselves halfway."""


def child(options: Any, setup: Setup, rank: int, port: int) -> None:
    enter(rank, setup.ranks, port)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if setup.killed:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    dist.init_process_group("gloo")
    model, base = make(options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    run_model, share = distribute(model, setup.strategy, setup.ranks, base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    first = 0
    if setup.resume is not None:
        first = options.steps // 2
        resume(model, optimizer, setup.resume)
    losses = {}
    for step, batch in enumerate(batches(options)):
        if step < first:
            continue
        losses[step] = train_step(run_model, optimizer, batch, setup.ranks, rank)
        if step + 1 == options.steps // 2 and setup.strategy == "fsdp2" and setup.resume is None:
            save(model, optimizer, setup.out / "checkpoint")
        if step == options.steps // 2 + 1 and str(rank) in setup.killed:
            os.kill(os.getpid(), signal.SIGKILL)
    after = {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        change = {name: after[name] - start[name] for name in start}
        torch.save({"losses": losses, "change": change, "share": share}, setup.out / "found.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may wait for objects that are freed after them


def make(options: Any) -> tuple[Any, int]:
    """The patched model with adapters, the same in every process, and the bytes of its NF4 weights."""
    import peft

    import peft_kernels as pk

    lib = examples.module("finetune_model")
    folder = lib.model_folder(options.model, examples.MODELS)
    torch.manual_seed(SEED)
    model = lib.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pk.quantize_model(model)
    base = sum(p.nbytes for p in model.parameters() if isinstance(p, pk.NF4Weight))
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    pk.patch(model)
    return model, base


def distribute(model: Any, strategy: str, ranks: int, base: int) -> tuple[Any, float]:
    """The distributed model, and the largest share of the base in a process."""
    if strategy != "fsdp2":
        return (nn.parallel.DistributedDataParallel(model) if strategy == "ddp" else model), 1.0
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = [getattr(p, "_local_tensor", None) for n, p in model.named_parameters() if "base_layer" in n]
    mine = torch.tensor(sum(t.packed.nbytes + t.absmax.nbytes for t in local if hasattr(t, "packed")))
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    return model, int(mine) / base


def batches(options: Any) -> Iterator[dict[str, Tensor]]:
    from transformers import DataCollatorForSeq2Seq

    lib, data = map(examples.module, ("finetune_model", "finetune_data"))
    tokenizer = lib.load_tokenizer(lib.model_folder(options.model, examples.MODELS))
    pairs = data.read_jsonl(options.data) if options.data else data.docstring_examples()
    rows = data.encode(data.split(pairs)[0], tokenizer, MAX_LENGTH)
    rows = data.in_order(rows, BATCH, options.steps, SEED)
    collate = DataCollatorForSeq2Seq(tokenizer)
    for step in range(options.steps):
        yield collate([dict(row) for row in rows[step * BATCH : (step + 1) * BATCH]])


def train_step(model: Any, optimizer: Any, batch: dict[str, Tensor], ranks: int, rank: int) -> float:
    """A step on this process's rows. Returns the loss over all rows."""
    counted = (batch["labels"][:, 1:] != -100).sum()
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    part = {name: value[rows] for name, value in batch.items()}
    # Gradients are averaged over processes, so the loss is scaled up.
    loss = model(**part, num_items_in_batch=counted).loss * ranks
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    shared = loss.detach() / ranks
    dist.all_reduce(shared)
    return float(shared)


def save(model: Any, optimizer: Any, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(_state(model, optimizer), checkpoint_id=folder)


def resume(model: Any, optimizer: Any, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    from peft_kernels.integrations import fsdp

    return {
        "model": fsdp.checkpoint_state(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def whole(p: Tensor) -> Tensor:
    full: Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p
    return full.detach().clone()


if __name__ == "__main__":
    sys.exit(main())
