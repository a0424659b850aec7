"""`peft-kernels`: what is installed, and whether it works here."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

import peft_kernels as pk


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="peft-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions and back ends: built? usable here? why not?")
    parser.parse_args(argv)
    print(f"peft_kernels {pk.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(pk.explain())
    return 0


if __name__ == "__main__":
    sys.exit(main())
