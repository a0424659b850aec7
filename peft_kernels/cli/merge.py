"""Merges a LoRA adapter of PEFT into its base, tensor by tensor.

OUT is bit-identical to merge_and_unload and save_pretrained of the dense model. BASE may be dense, in NF4, or
in another format that is read packed (GPTQ, AWQ, FP8, MXFP4, NVFP4). It becomes dense unless --format packed
repacks it, which can lose most of what was trained. OUT appears when it is complete; after an error nothing
is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints.merge import FORMATS, Merge, merge_checkpoint
from .output import Output, counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", type=Path, help="folder with config.json and .safetensors")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder with adapter_config.json")
    parser.add_argument("destination", metavar="OUT", type=Path, help="folder to create; must not exist")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="dense",
        help="format of weights that are packed in BASE: dense, or packed, which rounds them; nf4 is packed "
        "for a BASE in NF4 (dense)",
    )
    parser.add_argument("--partial", action="store_true", help="accept a BASE that lacks tensors")


def run(arguments: argparse.Namespace, out: Output) -> bool:
    def started(merge: Merge) -> None:
        changed = counted(len(merge.plan.changes), "tensor")
        out.say(f"{changed} of the base change, according to {merge.plan.source}")
        if merge.title and merge.dense:
            form = "nf4" if merge.title == "NF4" else "packed"
            out.say(
                f"{merge.title} becomes dense: repacking (--format {form}) can lose most of what was trained"
            )
        if merge.plan.untied:
            out.say("embeddings and head are no longer tied: the adapter replaces one of them", "yellow")
        if merge.left_out:
            left = ", ".join(merge.left_out)
            out.say(f"not copied, because they have other weights, or say how BASE is packed: {left}")

    # Approximates the total, which is known only after the headers are read.
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
            f"rounding to {done.rounding.bits} bits changed the merged weights by {share:.2f} times as much "
            "as the adapter (from 1 on, little of the training is left)",
            "yellow",
        )
    out.written(done)
    out.result(
        {
            "destination": str(done.destination),
            "format": done.form,
            "base": done.title or "dense",
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
