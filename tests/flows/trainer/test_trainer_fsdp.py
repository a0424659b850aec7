"""TRL's SFTTrainer under accelerate's FSDP2 in two processes, against one process on the same batches.

accelerate shards on GPUs only, so the CPU is presented to it as a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flow_checks import assert_fused, assert_near
from flow_models import adapted, llama, logged
from installed import before
from peft_models import trained_values
from ranks import MARKS, rank_tests, whole
from rounding import ONE_LAYER, ONE_STEP
from test_moe import mixture
from test_trainer_ddp import ADAPTERS, LOSSES, RANKS, STEPS, options, sft_trainer, single_process
from torch import Tensor

import peft_kernels as pk
from peft_kernels.nf4.sharded.fsdp_tensor import NF4Shard

for name in ("accelerate", "trl", "datasets"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
pytestmark = MARKS
CONFIGURATION = Path(__file__).resolve().parents[3] / "examples" / "accelerate" / "fsdp2.yaml"


MODELS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: adapted(llama("nf4"), r=4),
    "experts": lambda: adapted(pk.quantize_model(mixture(), experts=True), r=4),
}


def environment() -> dict[str, str]:
    """The environment that `accelerate launch` sets for the example configuration."""
    import yaml

    config = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in config.items()}}


@contextmanager
def fsdp2() -> Iterator[None]:
    from accelerate import state

    prepare = state.PartialState._prepare_backend
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        kind = state.DistributedType.MULTI_GPU
        patch.setattr(
            state.PartialState,
            "_prepare_backend",
            lambda self, *args, **kwargs: (prepare(self, *args, **kwargs)[0], kind),
        )
        patch.setattr(
            state.PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu"))
        )
        yield


def trained_adapters(trainer: Any) -> dict[str, Tensor]:
    return whole(trained_values(trainer.model))


# Cases: each runs in both processes.


def sft(folder: Path) -> None:
    """Losses and adapters equal those of one process, fused, with half of the base on each rank; saved as by
    PEFT."""
    import peft
    from torch.distributed.fsdp import FSDPModule

    stock = adapted(llama("nf4"), r=4)
    start = trained_values(stock)
    packed = sum(p.nbytes for p in stock.parameters() if isinstance(p, pk.NF4Weight))
    with single_process():
        one = sft_trainer(stock, folder / f"alone-{dist.get_rank()}", **options(2 * RANKS))
        one.train()
    with fsdp2():
        model = adapted(llama("nf4"), r=4)
        report = pk.patch(model)
        shared = sft_trainer(model, folder / "shared", **options(2 * RANKS))
        shared.train()
        assert_fused(model, report)
        assert shared.accelerator.is_fsdp2 and isinstance(model.base_model.model.model.layers[0], FSDPModule)
        shards = [p.to_local() for n, p in model.named_parameters() if n.endswith("base_layer.weight")]
        own = sum(shard.packed.nbytes + shard.absmax.nbytes for shard in shards)
        assert len(shards) == 14 and own <= 0.52 * packed, (own, packed)
        assert logged(shared) == pytest.approx(logged(one), rel=LOSSES) and len(logged(one)) == STEPS
        moved = [{n: p - start[n] for n, p in trained_adapters(each).items()} for each in (shared, one)]
        assert_near(*moved, ADAPTERS)
        shared.save_model(str(folder / "adapter"))
        dist.barrier()
    again = peft.PeftModel.from_pretrained(llama("nf4"), folder / "adapter")
    assert_near({n: p for n, p in again.named_parameters() if "lora_" in n}, trained_adapters(shared), 1e-9)


def resumed(folder: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    with fsdp2():
        curves = []
        for checkpoint in (None, str(folder / "checkpoint-3")):
            model = adapted(llama("nf4"), r=4)
            pk.patch(model)
            given = options(2 * RANKS, save_strategy="steps", save_steps=3) | {"steps": 6}
            made = sft_trainer(model, folder, **given)
            made.train(resume_from_checkpoint=checkpoint)
            dist.barrier()
            curves.append(logged(made))
            assert made.accelerator.is_fsdp2 and isinstance(
                model.base_model.model.model.layers[0], FSDPModule
            )
        assert len(curves[0]) == len(curves[1]) == 6
        assert curves[1] == pytest.approx(curves[0], rel=ONE_STEP)


def efficient_loading(folder: Path) -> None:
    """Rank 0 loads the model and broadcasts it: training, also of experts, is as if every rank had loaded it.
    Only rank 0 sends packed weights, and no rank sends dense ones."""
    for base in ("nf4", "experts"):
        curves = []
        for efficient in ("false", "true"):
            with fsdp2(), pytest.MonkeyPatch.context() as patch:
                patch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", efficient)
                model = MODELS[base]()
                if efficient == "true" and dist.get_rank():
                    spoil(model)
                given = options(2 * RANKS) | {"steps": 3}
                trainer = sft_trainer(model, folder / base / efficient, **given)
                trainer.train()
                curves.append((logged(trainer), trained_adapters(trainer)))
                packed = [
                    p for p in model.parameters() if isinstance(getattr(p, "_local_tensor", p), NF4Shard)
                ]
                assert packed and not any(p.is_meta for p in model.parameters())
                dist.barrier()
        assert curves[1][0] == pytest.approx(curves[0][0], rel=ONE_LAYER)
        assert_near(curves[1][1], curves[0][1], ONE_LAYER)


def spoil(model: Any) -> None:
    """Makes the model that of a rank that did not read the checkpoint."""
    with torch.no_grad():
        for p in model.parameters():
            for t in p._state.tensors().values() if isinstance(p, pk.NF4Weight) else [p]:
                t.zero_()


CASES = [sft, resumed, efficient_loading]
if before("trl", "1.15"):  # it reads logits after FSDP2 has freed the head: patch without="loss"
    CASES.remove(sft)
if before("accelerate", "1.15"):  # it does not load adapters from a checkpoint of FSDP2
    CASES.remove(resumed)
if before("accelerate", "1.14"):  # it sends tensors to the wrong names
    CASES.remove(efficient_loading)

errors, test_on_two_processes = rank_tests(2, CASES)


def test_the_configuration_is_one_of_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in CONFIGURATION.parent.glob("*.yaml"):
        config = load_config_from_file(str(path))
        assert config.num_processes == 2 and str(config.distributed_type).split(".")[-1] in (
            "FSDP",
            "MULTI_GPU",
        )
