"""Runs a part of CI, or skips it if it passed before with the same inputs.

    python .ci/parts.py test-gpu           # runs `make test-gpu` unless .ci/passed.json has its inputs
    python .ci/parts.py test-gpu --rerun   # runs it in any case
    python .ci/parts.py --list             # which parts would run

The inputs of a part are all files of the tree that can change its result, the compilers, torch and, where it
matters, the processor. In peft_kernels, tests and bench, Python files count that its tests import, directly
or not. A part that passes adds the digest of its inputs to .ci/passed.json, unless they changed meanwhile.
That file is committed with the change.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import translate
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECORD = ".ci/passed.json"
KEPT = 8
"""Digests kept per part: of its newest passes, on several kinds of processors."""
PAGES = ("docs/*", "*.md", "mkdocs.yml", "LICENSE", RECORD)


class Part(NamedTuple):
    tests: tuple[str, ...]
    """Folders whose tests it runs; without any, all files count."""
    leaves_out: tuple[str, ...]
    """Patterns of files that do not change its result."""
    on_processor: bool = True
    """Whether its result depends on the processor."""
    reads: tuple[str, ...] = ()
    """Files that count all the same, since its tests open them."""

    def files(self) -> list[str]:
        left_out = re.compile("|".join(map(translate, self.leaves_out)))
        there = [name for name in files() if name in self.reads or not left_out.match(name)]
        if not self.tests:
            return there
        used = Imports(there).reached(self.tests)
        return [name for name in there if name in used or not is_module(name)]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for text in (*compilers(), *([processor()] if self.on_processor else [])):
            digest.update(text.encode() + b"\0")
        for name in self.files():
            digest.update(name.encode() + b"\0" + hashlib.sha256((ROOT / name).read_bytes()).digest())
        return digest.hexdigest()


KERNELS = ("core", "ops", "nf4", "patch", "optim")
PARTS = {
    "package": Part((), ("docs/*", "examples/*", "bench/*", "tests/*", RECORD), on_processor=False),
    "test-isa": Part(KERNELS, (*PAGES, "examples/*", "csrc/cuda/*", "tests/gpu/*.cu*")),
    "test-gpu": Part(
        (*KERNELS, "gpu"), (*PAGES, "examples/*", "csrc/cpu/*"), on_processor=False, reads=("docs/gpu.md",)
    ),
    # tests/[!g]*/*: all folders of tests but gpu.
    "test-compiled": Part(
        (), (*PAGES, "peft_kernels/*", "csrc/cpu/*", "examples/*", "tests/[!g]*/*"), on_processor=False
    ),
    "test-flows": Part(("flows",), (*PAGES, "csrc/cuda/*", "tests/gpu/*.cu*")),
    "test-dist": Part(("dist",), (*PAGES, "csrc/cuda/*", "tests/gpu/*.cu*")),
}
"""By the target of make."""


def files() -> list[str]:
    """Files of the tree: tracked, or new and not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file()})


def is_module(name: str) -> bool:
    return name.endswith(".py") and name.startswith(("peft_kernels/", "tests/", "bench/"))


class Imports:
    """Which files use which, by their texts: so code counts that a file gives to another process."""

    def __init__(self, names: Sequence[str]) -> None:
        self.texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names if is_module(name)}
        self.folders: dict[str, list[str]] = defaultdict(list)
        for name in self.texts:
            self.folders[folder_of(name)].append(name)
        root = imported("peft_kernels", self.texts["peft_kernels/__init__.py"])
        self.homes = {name: f"{module}.{name}" for module, name in root}

    def reached(self, folders: Iterable[str]) -> set[str]:
        """The files in these folders of tests and in tests/ itself, and all that they use."""
        beginnings = tuple(f"tests/{folder}/" for folder in folders)
        wanted = [n for n in self.texts if n.startswith(beginnings) or re.fullmatch(r"tests/\w+\.py", n)]
        found = {*wanted, "peft_kernels/__init__.py"}
        while wanted:
            new = {*self.used(wanted.pop())} - found
            found |= new
            wanted += new
        return found

    def used(self, name: str) -> Iterator[str]:
        text, package = self.texts[name], ".".join(name.split("/")[:-1])
        modules = {*re.findall(r"\b(?:peft_kernels|bench)(?:\.\w+)+", text)}
        # The root imports everything: what its users take counts where they take it.
        modules |= {self.homes.get(word, word) for word in re.findall(r"\bpk\.(\w+)", text)}
        for module, word in imported(package, text):
            modules.add(self.homes.get(word, word) if module == "peft_kernels" else f"{module}.{word}")
        for module in modules:
            yield from self.folders.get(".".join(module.split(".")[:2]), [])
        if name.startswith("tests/"):
            for word in re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE):
                yield from self.folders.get(word, [])


def folder_of(name: str) -> str:
    """What a file counts with: its folder of peft_kernels or bench; in tests, where modules are imported by
    their names from any folder, itself or its package."""
    parts = name.removesuffix(".py").split("/")
    if parts[0] == "tests":
        return "ptx" if parts[-2] == "ptx" else parts[-1]
    return ".".join(parts[:2])


def imported(package: str, text: str) -> Iterator[tuple[str, str]]:
    """Module and name of each `from ... import` of our packages; `package` is where relative ones start."""
    pattern = r"from (\.*)([\w.]*) import (?:\(([^)]*)\)|(.*))"
    for dots, base, several, one in re.findall(pattern, text):
        start = package.split(".")[: len(package.split(".")) + 1 - len(dots)] if dots else []
        module = ".".join([*start, *([base] if base else [])])
        if module.split(".")[0] in ("peft_kernels", "bench"):
            for word in re.findall(r"(\w+)(?: as \w+)?", several or one):
                yield module, word


def compilers() -> list[str]:
    """The versions of what compiles and runs the tree; constraints.txt has those of other packages."""
    paths = map(shutil.which, ("c++", "nvcc", "aarch64-linux-gnu-g++", "qemu-aarch64"))
    commands = [[path, "--version"] for path in paths if path is not None]
    said = [subprocess.run(c, stdout=subprocess.PIPE, text=True, check=True).stdout for c in commands]
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy")]
    return [platform.python_version(), *packages, *said]


def processor() -> str:
    """The kind of processor and its instruction sets."""
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags")
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.partition("\t")[0] in wanted)


Record = dict[str, dict[str, str]]
"""Part -> digest of the inputs -> when it passed, and in what time; the newest last."""


def load() -> Record:
    path = ROOT / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def before(name: str, digest: str) -> str | None:
    """When the part passed with these inputs."""
    return load().get(name, {}).get(digest)


def add(name: str, digest: str, detail: str) -> None:
    record = load()
    passes = {key: value for key, value in record.get(name, {}).items() if key != digest} | {digest: detail}
    record[name] = dict(list(passes.items())[-KEPT:])
    (ROOT / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def make(name: str) -> int:
    """The whole target: what would choose some tests, or other kernels, stays outside."""
    chooses = re.compile(
        r"ARGS|TESTS|SEED|PYTEST_\w+|\w*MAKE\w*|MFLAGS|TORCH_CUDA_ARCH_LIST|PEFT_KERNELS_\w+"
    )
    kept = {word: value for word, value in os.environ.items() if not chooses.fullmatch(word)}
    return subprocess.run(["make", name], cwd=ROOT, env=kept, check=False).returncode


def run(name: str, rerun: bool) -> int:
    """Runs a part, or says why it is skipped; returns the exit status."""
    digest, begin = PARTS[name].digest(), time.monotonic()
    if not rerun and (passed := before(name, digest)):
        print(f"{name}: skipped, it passed with the same inputs ({passed}); --rerun runs it", flush=True)
        return 0
    status = make(name)
    if status == 0 and digest == PARTS[name].digest():
        today, seconds = datetime.date.today().isoformat(), time.monotonic() - begin
        add(name, digest, f"{today}, {seconds:.0f} s")
    return status


def main(words: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--rerun", action="store_true", help="run it in any case")
    parser.add_argument("--list", action="store_true", help="say which parts would run")
    options = parser.parse_args(words)
    if options.part is None and not options.list:
        parser.error("expected a part, or --list")
    if options.list:
        for name, part in PARTS.items():
            passed = before(name, part.digest())
            print(
                f"{name:<11} {len(part.files()):>5} files  {f'passed: {passed}' if passed else 'would run'}"
            )
        return 0
    return run(options.part, options.rerun)


if __name__ == "__main__":
    sys.exit(main())
