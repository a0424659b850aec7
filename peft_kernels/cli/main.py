"""Kernels for LoRA and QLoRA: checks the installation, converts checkpoints, and plans memory."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from .. import __version__
from ..checkpoints.header import CheckpointError
from . import doctor, info, inspect, merge, plan, quantize
from .output import Output

_COMMANDS = (info, quantize, merge, inspect, plan, doctor)

OK, FAILED = 0, 1  # argparse exits with 2


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0 on success, 1 if it failed or found faults."""
    parser = argparse.ArgumentParser(
        prog="peft-kernels",
        description=__doc__,
        epilog="exit codes: 0 all is well, 1 it failed or faults were found, 2 wrong arguments",
    )
    parser.add_argument("--version", action="version", version=f"peft-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        text = (module.__doc__ or "").strip()
        name = module.__name__.rpartition(".")[2]
        summary = text.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", action="store_true", help="print JSON and nothing else")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    out = Output(arguments.json)
    # Its warnings concern a model that is never run.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        well = arguments.run(arguments, out)
        sys.stdout.flush()
        return OK if well else FAILED
    except CheckpointError as error:
        out.error(str(error))
    except KeyboardInterrupt:
        out.error("interrupted")
    except BrokenPipeError:  # as in `| head`; Python's final flush must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        out.error(f"{error.filename or 'system'}: {error.strerror or error}")
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
