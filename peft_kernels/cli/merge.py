"""A LoRA adapter of PEFT into its base, tensor by tensor.

OUT has the tensors that merge_and_unload and save_pretrained make of the dense model, to the bit. BASE may be
dense or in NF4. NF4 becomes dense, unless --format nf4 packs it again, which can lose most of what was
trained. OUT appears when it is whole; after an error nothing is left of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints.merge import FORMATS, Merge, merge_checkpoint
from .output import Output, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", type=Path, help="folder with config.json and .safetensors")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder with adapter_config.json")
    parser.add_argument("destination", metavar="OUT", type=Path, help="folder to make; must not exist")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="dense",
        help="of what BASE has in NF4: dense, or nf4, packed again with the loss of 4 bits (dense)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="merge into what is there where BASE lacks tensors"
    )


def run(arguments: argparse.Namespace, out: Output) -> bool:
    def started(merge: Merge) -> None:
        out.say(f"{_counted(len(merge.plan.changes), 'tensor')} of the base change, by {merge.plan.source}")
        if merge.base_is_packed and merge.dense:
            out.say("NF4 becomes dense: packed again (--format nf4) it can lose most of what was trained")
        if merge.plan.untied:
            out.say(
                "embeddings and head are no longer tied: the adapter has its own of one of them", "yellow"
            )

        if merge.left_out:
            out.say(f"not copied, as they hold other weights: {', '.join(merge.left_out)}")

    # The total is known when the headers have been read, which is later than the bar is made.
    total = sum(file.stat().st_size for file in arguments.base.glob("*.safetensors"))
    with out.progress(total, "merging") as advance:
        done = merge_checkpoint(
            arguments.base,
            arguments.adapter,
            arguments.destination,
            arguments.format,
            arguments.partial,
            started,
            lambda name, nbytes: advance(nbytes),
        )
    share = done.rounding.share
    if share is not None:
        out.say(
            f"rounding to 4 bits moved the merged weights by {share:.2f} of what the adapter had moved them "
            "(from 1 on, little of the training is left)",
            "yellow",
        )
    out.say(
        f"{done.destination}: {size(done.bytes_after)} of {size(done.bytes_before)}"
        + (f"; copied {', '.join(done.copied)}" if done.copied else ""),
        "bold",
    )
    out.result(
        {
            "destination": str(done.destination),
            "format": "dense" if done.dense else "nf4",
            "bytes_before": done.bytes_before,
            "bytes_after": done.bytes_after,
            "changed": sorted(done.plan.changes),
            "added": sorted(done.plan.added),
            "chosen_by": done.plan.source,
            "rounding": share,
            "copied": done.copied,
            "left_out": done.left_out,
        }
    )
    return True


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
