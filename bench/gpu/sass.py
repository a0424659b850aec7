"""Registers, spills and main-loop instructions of the compiled CUDA kernels.

Needs no GPU: every .cu file of csrc/cuda is compiled for every architecture, disassembled and counted.
`limits.py` has the limits that tests/gpu/test_sass.py checks the counts against. PTXAS=FILE names the ptxas
of another toolkit, which then assembles what nvcc writes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from . import built_ptx, other_ptxas, sass_cfg, shared

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "sass"
SAME_PTX = {80: (80, 86, 89, 90), 100: (100, 120)}
"""Architectures for which nvcc writes the same PTX, by the first of them (tests/gpu/ptx/test_texts.py)."""
ARCHITECTURES = tuple(sorted(a for same in SAME_PTX.values() for a in same))
HOPPER = ("experts_wgmma", "linear_wgmma")
"""Files with instructions of sm_90a, which is all that they are compiled for."""
FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v")
JOBS = 2


@dataclass(frozen=True)
class Tools:
    nvcc: str
    nvdisasm: str
    demangler: str
    ptxas: str | None = None
    """Of another toolkit than nvcc."""


def tools() -> Tools | str:
    """The programs needed, or which are missing."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    triton = importlib.util.find_spec("triton")
    bundled = [Path(path, "backends", "nvidia", "bin") for path in _locations(triton)]
    found = {
        "nvcc": _program("nvcc", cuda),
        "nvdisasm": _program("nvdisasm", cuda, *bundled),
        "c++filt": _program("c++filt") or _program("cu++filt", cuda),
    }
    if missing := [name for name, path in found.items() if path is None]:
        return f"{', '.join(missing)} not found"
    names = [path for path in found.values() if path is not None]
    return Tools(*names, ptxas=os.environ.get("PTXAS") or None)


def _locations(spec: object) -> Sequence[str]:
    return getattr(spec, "submodule_search_locations", None) or ()


def _program(name: str, *folders: Path) -> str | None:
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=str(f)) for f in folders)), None)


@dataclass(frozen=True)
class Cubin:
    source: Path
    architecture: int
    path: Path
    log: str
    """Of ptxas."""


def sources(folder: Path = SOURCES) -> list[Path]:
    return sorted(folder.rglob("*.cu"))


def architectures_of(file: Path) -> Sequence[int]:
    """The architectures that a file is compiled for."""
    return (90,) if file.stem in HOPPER else ARCHITECTURES


def compile_all(
    tools: Tools,
    files: Sequence[Path],
    architectures: Sequence[int] = ARCHITECTURES,
    include: Path = SOURCES,
    cache: Path = CACHE,
) -> list[Cubin]:
    """One cubin per file and architecture that it is for. RuntimeError with nvcc's message when one does not
    compile.

    Cached under a hash of the file, everything it includes from this repository, the flags and the compiler.
    """
    cache.mkdir(parents=True, exist_ok=True)
    version = run([tools.nvcc, "--version"]).stdout
    by_nvcc = ([version, *FLAGS], [tools.nvcc, *FLAGS, f"-I{include}"])
    first = {architecture: one for one, same in SAME_PTX.items() for architecture in same}

    def build(
        source: Path,
        of: Path,
        name: str,
        *flags: str,
        text: str | None = None,
        by: tuple[list[str], list[str]] = by_nvcc,
    ) -> tuple[Path, str]:
        """Compiles a source, or stores `text` as its output. Returns the output's path and the compiler's
        messages. `by`: what identifies the compiler, and its command."""
        stem, suffix = name.split(".")
        path = cache / f"{of.stem}-{stem}-{_key(*by[0], *flags, *_texts(of, include))}.{suffix}"
        log = path.with_suffix(".log")
        if not (path.exists() and log.exists()):
            # Renamed when complete, so that an interrupted run leaves no partial result.
            unfinished, messages = path.with_suffix(f".{os.getpid()}"), ""
            if text is None:
                messages = run([*by[1], *flags, str(source), "-o", str(unfinished)]).stderr
            else:
                unfinished.write_text(text, encoding="utf-8")
            log.write_text(messages, encoding="utf-8")
            unfinished.replace(path)
        return path, log.read_text(encoding="utf-8")

    def write_ptx(job: tuple[Path, str]) -> Path:
        file, one = job
        text = built_ptx.text(file, int(one), includes(file, include)) if one.isdigit() else None
        return build(file, file, f"compute{one}.ptx", f"-arch=compute_{one}", "-ptx", text=text)[0]

    def assemble(job: tuple[Path, int]) -> Cubin:
        file, architecture = job
        text, suffix = texts[file, ptx_of(*job)], "a" if file.stem in HOPPER else ""
        name = f"sm{architecture}{suffix}"
        flag = f"-arch=sm_{architecture}{suffix}"
        if tools.ptxas is None:
            return Cubin(file, architecture, *build(text, file, f"{name}.cubin", flag, "-cubin"))
        lowered = other_ptxas.lowered(text.read_text(encoding="utf-8"), newest)
        text = build(text, text, "lowered.ptx", newest, text=lowered)[0]
        by = [run([tools.ptxas, "--version"]).stdout], [tools.ptxas, "-v"]
        return Cubin(file, architecture, *build(text, text, f"{name}.cubin", flag, by=by))

    def ptx_of(file: Path, architecture: int) -> str:
        return f"{architecture}a" if file.stem in HOPPER else str(first[architecture])

    newest = other_ptxas.newest_version(tools.ptxas, cache) if tools.ptxas else ""
    wanted = [(file, a) for file in files for a in architectures if a in architectures_of(file)]
    with ThreadPoolExecutor(JOBS) as pool:
        to_write = list(dict.fromkeys((file, ptx_of(file, a)) for file, a in wanted))
        texts = dict(zip(to_write, pool.map(write_ptx, to_write), strict=True))
        return list(pool.map(assemble, wanted))


def _texts(file: Path, include: Path) -> Iterator[str]:
    return (path.read_text(encoding="utf-8") for path in includes(file, include))


def includes(file: Path, include: Path = SOURCES) -> Iterator[Path]:
    """A file and, once each, the files that it includes with quotes."""
    todo, seen = [file], {file}
    while todo:
        current = todo.pop()
        yield current
        for name in shared.INCLUDE.findall(current.read_text(encoding="utf-8")):
            for folder in (current.parent, include):
                path = (folder / name).resolve()
                if path.exists() and path not in seen:
                    seen.add(path)
                    todo.append(path)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def run(command: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done


@dataclass(frozen=True)
class Instruction:
    opcode: str
    """With its suffixes: LDG.E.128.CONSTANT."""
    guarded: bool
    """Predicated: it may not be executed."""
    targets: tuple[str, ...]
    """Labels."""
    operands: str = ""

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def jumps(self) -> bool:
        return self.name in JUMPS or (self.name in LABEL_JUMPS and bool(self.targets))


JUMPS = ("BRA", "BRX", "JMP", "JMX", "BRXU", "JMXU", "EXIT", "RET")
LABEL_JUMPS = ("CALL",)
"""Jumps that do not return if they name a label of the same kernel; otherwise calls of a function."""


def count(instructions: Iterable[Instruction], pattern: str) -> int:
    """Number of instructions whose opcode starts with the pattern."""
    return sum(re.match(pattern, instruction.opcode) is not None for instruction in instructions)


@dataclass
class Kernel:
    name: str
    """In the source, without namespaces: Dequantize<bf16, true>."""
    source: Path
    architecture: int
    threads: int = 0
    registers: int = 0
    shared: int = 0
    """Bytes per block that the kernel declares."""
    spill_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    """Of ptxas, such as that it waits for each instruction of a warpgroup."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Index of the instruction that follows each label."""

    def main_path(self, pattern: str, longest: bool = True) -> list[Instruction]:
        """The instructions of one iteration of the main loop: the innermost with most matches of the pattern.

        Where no match is in a loop, those of a path through the whole kernel. Of several paths, the one with
        most matches, and among these the longest (or shortest), so tails in smaller steps are not counted.
        """
        sign = 1 if longest else -1

        def gain(block: int) -> tuple[int, int]:
            return count(self._block(block), pattern), sign * len(self._block(block))

        return self._of(self._graph.best_path(self._main_loop(pattern), gain))

    def main_loop(self, pattern: str) -> list[Instruction]:
        """All instructions of the main loop; of the kernel, where no match is in a loop."""
        return self._of(sorted(self._main_loop(pattern) or self.successors))

    def reachable(self, index: int) -> list[Instruction]:
        """Those that may be executed after an instruction."""
        start = max(block for block in self.successors if block <= index)
        seen, todo = set(), [*self.successors[start]]
        while todo:
            if (block := todo.pop()) not in seen and block != sass_cfg.END:
                seen.add(block)
                todo += self.successors[block]
        return [*self.instructions[index + 1 : self._ends[start]], *self._of(sorted(seen))]

    def _main_loop(self, pattern: str) -> frozenset[int] | None:
        own: dict[frozenset[int] | None, int] = {}  # matches of a loop, without its inner loops
        for block in self.successors:
            found = count(self._block(block), pattern)
            for body in self._graph.innermost([block]) if found else ():
                own[body] = own.get(body, 0) + found
        return max(own, key=lambda body: (own[body], -len(body or ())), default=None)

    def _of(self, blocks: Iterable[int]) -> list[Instruction]:
        return [instruction for block in blocks for instruction in self._block(block)]

    @cached_property
    def _graph(self) -> sass_cfg.Graph:
        return sass_cfg.Graph(self.successors)

    def _block(self, start: int) -> list[Instruction]:
        return self.instructions[start : self._ends[start]]

    @cached_property
    def _ends(self) -> dict[int, int]:
        starts = list(self.successors)
        return dict(zip(starts, [*starts[1:], len(self.instructions)], strict=True))

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        """The basic blocks that may follow each one; blocks are named by their first instruction."""
        jumps = {i: jump for i, jump in enumerate(self.instructions) if jump.jumps}
        targets = {i: [self.labels[t] for t in jump.targets if t in self.labels] for i, jump in jumps.items()}
        starts = {0, *(i + 1 for i in jumps), *(t for found in targets.values() for t in found)}
        blocks = sorted(start for start in starts if start < len(self.instructions))
        successors: dict[int, list[int]] = {}
        for start, after in zip(blocks, [*blocks[1:], len(self.instructions)], strict=True):
            last = jumps.get(after - 1)
            falls_through = after < len(self.instructions) and (last is None or last.guarded)
            leaves = last is not None and last.name in ("EXIT", "RET")
            successors[start] = [
                *targets.get(after - 1, ()),
                *([after] if falls_through else ()),
                *([sass_cfg.END] if leaves else ()),
            ]
        return successors


def read(tools: Tools, cubins: Sequence[Cubin], include: Path = SOURCES, cache: Path = CACHE) -> list[Kernel]:
    with ThreadPoolExecutor(JOBS) as pool:
        texts = list(pool.map(lambda cubin: run([tools.nvdisasm, str(cubin.path)]).stdout, cubins))
        kernels = [kernel for cubin, text in zip(cubins, texts, strict=True) for kernel in parse(cubin, text)]
        names = run([tools.demangler], "\n".join(kernel.name for kernel in kernels)).stdout.splitlines()
        for kernel, name in zip(kernels, names, strict=True):
            kernel.name = _cpp_name(name)
        families: dict[Path, list[Kernel]] = {}
        for kernel in kernels:
            families.setdefault(kernel.source, []).append(kernel)
        list(pool.map(lambda family: _add_declared(tools, family, include, cache), families.items()))
    for kernel in kernels:
        kernel.name = _short(kernel.name)
    return kernels


def _add_declared(tools: Tools, family: tuple[Path, Sequence[Kernel]], include: Path, cache: Path) -> None:
    """Adds the shared memory that the kernels of a source declare."""
    source, kernels = family
    names = sorted({kernel.name for kernel in kernels})
    text = shared.probe(source, names)
    ptx = cache / f"{source.stem}-shared-{_key(text, *_texts(source, include))}.ptx"
    if not ptx.exists():
        file = ptx.with_suffix(".cu")
        file.write_text(text, encoding="utf-8")
        unfinished = ptx.with_suffix(f".{os.getpid()}")
        folders = [f"-I{include}", f"-I{source.parent}"]
        run([tools.nvcc, *FLAGS, "-arch=sm_90", *folders, "-ptx", str(file), "-o", str(unfinished)])
        unfinished.replace(ptx)
    found = dict(zip(names, shared.sizes(ptx.read_text(encoding="utf-8"), len(names)), strict=True))
    for kernel in kernels:
        kernel.shared += found[kernel.name]


_SECTION = re.compile(r"\s*\.section\s+(?:\.(text|nv\.info)\.([^,\s]+))?")
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"\.L_x_\d+")
_WARNING = re.compile(
    r"ptxas.*(?:warning\s*:|info\s*: (?=\(C\d+\)))\s*(.*?)(?: in (?:the )?function '\w+')?$"
)
_WORD = re.compile(r"\.word\s+(0x[0-9a-f]+)")


def parse(cubin: Cubin, text: str) -> list[Kernel]:
    """The kernels in nvdisasm's output, under mangled names."""
    kernels: dict[str, Kernel] = {}
    current, section, threads_follow = Kernel("", cubin.source, cubin.architecture), None, False
    for line in text.splitlines():
        if found := _SECTION.match(line):
            section, name = found.groups()
            if section:
                current = kernels.setdefault(name, Kernel(name, cubin.source, cubin.architecture))
        elif section == "nv.info":
            if "nvinfo :" in line:
                threads_follow = "EIATTR_MAX_THREADS" in line
            elif threads_follow and (word := _WORD.search(line)):
                current.threads, threads_follow = int(word.group(1), 16), False
        elif section == "text":
            if found := _LABEL.match(line):
                current.labels[found.group(1)] = len(current.instructions)
            elif found := _INSTRUCTION.match(line):
                guard, opcode, operands = found.groups()
                targets = tuple(_TARGET.findall(operands))
                # `BRA P1, ...` and `BRA.U !UP0, ...` are guarded by an operand.
                guarded = guard is not None or re.match(r"\s*!?U?P[\dT]", operands) is not None
                current.instructions.append(Instruction(opcode, guarded, targets, operands))
    _read_log(cubin.log, kernels)
    return [kernel for kernel in kernels.values() if kernel.instructions]


def _read_log(log: str, kernels: dict[str, Kernel]) -> None:
    kernel = None
    for line in log.splitlines():
        if found := _WARNING.match(line):
            named = [kernel for name, kernel in kernels.items() if name in re.findall(r"\w+", line)]
            for one in named or kernels.values():
                one.warnings.append(found.group(1))
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = kernels.get(found.group(1))
        if kernel is None:
            continue
        if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.spill_bytes += sum(map(int, found.groups()))
        if found := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(found.group(1))
        if found := re.search(r"(\d+) bytes smem", line):
            kernel.shared = int(found.group(1))


def _cpp_name(demangled: str) -> str:
    """`void ns::entry<ns::Kernel<ns::bf16, 8> >(ns::Kernel<...>::Params)` -> `ns::Kernel<ns::bf16, 8>`."""
    found = re.match(r"void [\w:]*\bentry<(.*)>\(", demangled)
    return (found.group(1).strip() if found else demangled).replace("> >", ">>")


def _short(name: str) -> str:
    """Without namespaces."""
    return re.sub(r"\b(?:\w+::)+", "", name.replace("(anonymous namespace)::", ""))
