"""Quantises a model's folder to 4 or 8 bits, tensor by tensor.

NF4 and FP4 are written in bitsandbytes' format: transformers, PEFT, TRL and vLLM read it. Only peft_kernels
reads the other formats, and mixtures of experts that --experts packs. DST appears when it is complete; an
interrupted run leaves a folder .DST.partial next to it, and the same command continues from there."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from ..checkpoints.convert import Conversion, quantize_checkpoint
from ..core.formats import FORMATS
from .output import Output, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with config.json and .safetensors")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to create; must not exist")
    parser.add_argument(
        "--blocksize", type=int, help="values that share a scale (nf4: 64, or the format's own)"
    )
    parser.add_argument(
        "--format", default="nf4", choices=FORMATS, help="of the packed weights (nf4); fp4 loses more"
    )
    parser.add_argument(
        "--no-double-quant",
        action="store_true",
        help="keep the scales of nf4 and fp4 in fp32: 4.5 bits per value, not 4.13; int4: no zero points",
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modules to skip in addition to heads, embeddings and norms: a name or consecutive parts of one",
    )
    parser.add_argument(
        "--experts", action="store_true", help="also pack mixtures of experts, which only peft_kernels reads"
    )
    parser.add_argument("--partial", action="store_true", help="accept a model that lacks tensors")
    parser.add_argument("--restart", action="store_true", help="do not continue an interrupted run")


def run(arguments: argparse.Namespace, out: Output) -> bool:
    def started(conversion: Conversion) -> None:
        choice = conversion.choice
        packed = f" and {len(choice.experts)} weights of experts" if choice.experts else ""
        form = arguments.format.upper()
        out.say(f"{len(choice.quantise)} linear layers{packed} become {form}, according to {choice.source}")
        for reason, count in Counter(choice.left.values()).items():
            names = [name for name, why in choice.left.items() if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            out.say(f"{count} left ({shown}): {reason.removesuffix('; skip=() would pack it')}")
        if choice.dense_experts:
            out.say(f"{size(choice.dense_experts)} of experts stay dense: --experts packs them", "yellow")
        if choice.other_experts:
            out.say(f"{size(choice.other_experts)} of experts stay dense: they cannot be packed", "yellow")
        if conversion.left_out:
            out.say(f"not copied, because they contain other weights: {', '.join(conversion.left_out)}")
        if conversion.taken_over:
            out.say(f"continuing an interrupted run: {', '.join(conversion.taken_over)} done before")

    # Approximates the total, which is known only after the headers are read.
    total = sum(file.stat().st_size for file in arguments.source.glob("*.safetensors"))
    with out.progress(total, "quantising") as advance:
        done = quantize_checkpoint(
            arguments.source,
            arguments.destination,
            arguments.blocksize,
            False if arguments.no_double_quant else None,
            arguments.skip,
            arguments.restart,
            arguments.experts,
            arguments.partial,
            arguments.format,
            started,
            lambda name, nbytes: advance(nbytes),
        )
    out.written(done)
    out.result(
        {
            "destination": str(done.destination),
            "bytes_before": done.bytes_before,
            "bytes_after": done.bytes_after,
            "quantised": sorted(done.choice.quantise),
            "experts": sorted(done.choice.experts),
            "experts_dense_bytes": done.choice.dense_experts,
            "other_experts_dense_bytes": done.choice.other_experts,
            "left": done.choice.left,
            "chosen_by": done.choice.source,
            "copied": done.copied,
            "left_out": done.left_out,
            "taken_over": done.taken_over,
        }
    )
    return True
