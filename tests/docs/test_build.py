"""Messages of setup.py when the CUDA back end cannot be built. Only a probe is compiled."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension
from setuptools import Distribution
from setuptools.command.build_py import build_py
from tool_modules import tool_module

import testing
from peft_kernels.core.backends import architectures, cpu

ROOT = Path(__file__).parent.parent.parent
Setup = Callable[..., "tuple[int, str]"]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Setup:
    """Runs setup.py with a torch built for a CUDA version or without CUDA; returns exit status and output."""

    def run(cuda: str | None, **environment: str) -> tuple[int, str]:
        for name in [name for name in os.environ if name.startswith("PEFT_KERNELS_")]:
            monkeypatch.delenv(name)
        for name, value in ({"PEFT_KERNELS_CPU": "0"} | environment).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        # torch looks for a toolkit once, and only if it was built with CUDA.
        home = os.environ.get("CUDA_HOME") if cuda else None
        monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", home)
        monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
        monkeypatch.chdir(ROOT)
        status: Any = 0
        try:
            runpy.run_path("setup.py", run_name="__main__")
        except SystemExit as end:
            status = end.code
        said = "".join(capfd.readouterr())
        return (1, said + status) if isinstance(status, str) else (status or 0, said)

    return run


KNOWN = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}


def toolkit(folder: Path, version: str) -> str:
    """A folder with an nvcc stub that reports its version and KNOWN."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    lines = [f"Cuda compilation tools, release {version}, V{version}.1"]
    lines += [f"compute_{major}{minor}" for major, minor in sorted(KNOWN)]
    nvcc.write_text("#!/bin/sh\n" + "".join(f'echo "{line}"\n' for line in lines))
    nvcc.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("wanted", ["", "1"], ids=["unset", "asked-for"])
@pytest.mark.parametrize(
    "cuda,version,words",
    [
        ("13.0", None, "nvcc was not found in .*: install the CUDA 13.0 toolkit"),
        ("13.0", "12.6", "nvcc is of CUDA 12.6, this torch needs 13.x: install that toolkit"),
        ("12.8", "13.0", "nvcc is of CUDA 13.0, this torch needs 12.4 or later"),
        ("12.4", "12.1", "nvcc is of CUDA 12.1, this torch needs 12.4 or later"),
        (None, "13.0", "is built without CUDA"),
    ],
    ids=["no-nvcc", "too-old", "too-new", "old-minor", "torch-without"],
)
def test_no_suitable_nvcc(
    setup: Setup, tmp_path: Path, cuda: str | None, version: str | None, words: str, wanted: str
) -> None:
    home = str(tmp_path / "absent") if version is None else toolkit(tmp_path, version)
    status, said = setup(cuda, CUDA_HOME=home, PEFT_KERNELS_CUDA=wanted)
    if wanted:
        assert status != 0 and "CUDA back end was requested, but cannot be built: " in said
    else:
        assert status == 0 and said.startswith("peft_kernels")
        # Without CUDA in torch the back end is not expected.
        assert ("WARNING" in said) == (cuda is not None)
    if wanted or cuda is not None:
        assert re.search(words, said), said


@pytest.mark.parametrize(
    "version,words",
    [
        ("12.4", None),
        ("14.0", None),
        ("12.1", r"^--cuda: .*nvcc is of CUDA 12\.1, expected 12\.4 or later: install that toolkit"),
        ("11.8", r"^--cuda: .*nvcc is of CUDA 11\.8, expected 12\.4 or later: install that toolkit"),
        (None, r"^--cuda: nvcc was not found in .*: install the CUDA 12 or 13 toolkit, and set CUDA_HOME"),
    ],
)
def test_a_wheel_is_built_with_any_major_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, words: str | None
) -> None:
    """Whatever the torch that is installed was built for."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path) if version is None else toolkit(tmp_path, version))
    wheels = tool_module("wheels")
    if words is None:
        found = wheels.toolkit()
        assert (found.home, f"{found.version[0]}.{found.version[1]}") == (str(tmp_path), version)
        assert found.compiles() == KNOWN
        return
    with pytest.raises(SystemExit) as caught:
        wheels.toolkit()
    assert re.search(words, str(caught.value))


def test_reasons_are_written_into_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So `peft-kernels info` can repeat them."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PEFT_KERNELS_CUDA", "0")
    for name in ("CPU", "EMULATE", "PTX", "ISA"):
        monkeypatch.delenv(f"PEFT_KERNELS_{name}", raising=False)
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    found, commands = build["extensions"]()
    assert not found
    monkeypatch.setattr(build_py, "run", lambda self: None)
    command = commands["build_py"](Distribution())
    command.build_lib = str(tmp_path)
    (tmp_path / "peft_kernels").mkdir()
    command.run()
    reasons = json.loads((tmp_path / "peft_kernels" / "not_built.json").read_text())
    assert reasons["cpu"].startswith("no C++ compiler (") and "no-such-compiler" in reasons["cpu"]


def test_clang_is_told_apart_from_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho unknown pragma >&2; exit 1\n")
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    needed = "GCC 10 or later; not yet with clang" if build["IS_X86"] else "a C++17 compiler"
    told = f"{clang} does not compile a small file (needed: {needed}): unknown pragma"
    assert build["compiler_problem"]() == told


def test_the_readme_of_an_index_has_no_links_to_files() -> None:
    text = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["readme"]()
    assert re.findall(r"\]\((?!https?:)[^)]*\)", text) == [] and "![" not in text
    named = re.findall(r"\(((?:docs|examples)/[^)#]+|CONTRIBUTING.md)", text)
    assert len(named) > 20 and "(docs/gpu.md)" in text
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_left_out_on_request(setup: Setup, tmp_path: Path) -> None:
    status, said = setup(torch.version.cuda, CUDA_HOME=str(tmp_path), PEFT_KERNELS_CUDA="0")
    assert status == 0 and "WARNING" not in said


def test_switches_are_0_or_1(setup: Setup) -> None:
    status, said = setup(torch.version.cuda, PEFT_KERNELS_CUDA="yes")
    assert status != 0 and "PEFT_KERNELS_CUDA: expected 0 or 1, got 'yes'" in said


def test_the_native_build_has_the_isa_that_is_chosen_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """setup.py asks gcc, the library asks the processor."""
    if reason := testing.unavailable("cpu"):
        pytest.skip(f"cpu: {reason}")
    monkeypatch.setenv("PEFT_KERNELS_ISA", "native")
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    if not build["IS_X86"]:
        pytest.skip("off x86 all instruction sets are built")
    best = cpu.BACKEND.extension.isa_levels()[-1]
    built = [Path(source).stem for source in build["isa_sources"]()]
    assert built == (["avx512_bf16", "amx"] if best == "amx" else [best])


def test_isa_is_native_or_unset(setup: Setup) -> None:
    status, said = setup(
        torch.version.cuda, PEFT_KERNELS_CPU="1", PEFT_KERNELS_CUDA="0", PEFT_KERNELS_ISA="avx2"
    )
    assert status != 0 and "PEFT_KERNELS_ISA: expected native, or unset, got 'avx2'" in said


def test_the_kernels_as_ptx_need_nvcc(setup: Setup, tmp_path: Path) -> None:
    status, said = setup("13.0", CUDA_HOME=str(tmp_path), PEFT_KERNELS_CUDA="0", PEFT_KERNELS_PTX="1")
    assert status != 0 and "was requested, but cannot be built: nvcc was not found" in said


LISTS: dict[str, tuple[str, list[str]]] = {
    "8.0;9.0+PTX": ("8.0 9.0+PTX", []),
    "7.5 8.0 8.6 9.0 10.0 12.0+PTX": ("8.0 8.6 9.0 10.0 12.0+PTX", ["7.5 is left out: the kernels need 8.0"]),
    "7.0;7.5+PTX": ("", ["7.0 is left out", "7.5 is left out"]),
    "9.0a": ("9.0", ["9.0a is compiled as 9.0"]),
    "10.0f+PTX, 9.0": ("9.0 10.0+PTX", ["10.0f is compiled as 10.0"]),
    "Hopper": ("9.0+PTX", []),
    "Ada+PTX; ampere": ("8.0 8.6+PTX 8.9+PTX", []),
    "Turing;Hopper": ("9.0+PTX", ["7.5 is left out"]),
    "Ampere+Tegra": ("8.6+PTX", ["8.7 is served by PTX of 8.6: this nvcc"]),
    "Blackwell": ("10.0+PTX 12.0+PTX", ["10.3 is served by PTX of 10.0", "12.1 is served by PTX of 12.0"]),
    "9.0 9.0+PTX 9.0": ("9.0+PTX", []),
    "native": ("8.9+PTX", ["7.5 is left out"]),
    "native 8.0": ("8.0 8.9+PTX", ["7.5 is left out"]),
    " ; ": ("8.9+PTX", ["7.5 is left out"]),
}
"""TORCH_CUDA_ARCH_LIST, with cards 7.5 and 8.9 present: architectures compiled for, and messages."""


@pytest.mark.parametrize("wanted", LISTS)
def test_selected_architectures(wanted: str) -> None:
    words, said = LISTS[wanted]
    got, sentences = architectures.chosen(wanted, [(8, 9), (7, 5), (8, 9)], KNOWN)
    assert " ".join(got) == words
    assert len(sentences) == len(said), sentences
    for sentence, part in zip(sentences, said, strict=True):
        assert part in sentence
    # The back end reads what the library carries.
    assert all(architectures.unserved((99, 0), [word]) is None for word in got if "+PTX" in word)
    for word in got:
        major, minor = word.removesuffix("+PTX").split(".")
        assert architectures.unserved((int(major), int(minor)), [word]) is None


def test_all_architectures_without_a_card() -> None:
    assert architectures.chosen("", [], KNOWN) == (["8.0", "9.0", "10.0", "12.0+PTX"], [])
    assert architectures.chosen("native", [], {(8, 0), (9, 0)}) == (["8.0", "9.0+PTX"], [])


def test_card_too_old_for_nvcc() -> None:
    words, said = architectures.chosen("8.0", [], {(9, 0)})
    assert words == [] and said == ["8.0 is left out: this nvcc does not compile for it"]


@pytest.mark.parametrize("word", ["hoper", "9", "sm_90", "9.0b", "9.0-PTX", "+PTX", "90"])
def test_an_unknown_architecture_is_an_error(word: str) -> None:
    with pytest.raises(ValueError, match=r"^TORCH_CUDA_ARCH_LIST: expected compute .*, got '") as raised:
        architectures.chosen(f"8.0;{word}", [], KNOWN)
    assert repr(word.lower()) in str(raised.value)


def test_nvcc_gets_the_architectures_of_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch, which does not know all of them, adds none itself."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", toolkit(tmp_path, "13.0"))
    monkeypatch.setenv("PEFT_KERNELS_CPU", "0")
    monkeypatch.setenv("PEFT_KERNELS_CUDA", "1")
    for name in ("EMULATE", "PTX", "ISA"):
        monkeypatch.delenv(f"PEFT_KERNELS_{name}", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 9.0a Blackwell")
    (found,), _ = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["extensions"]()
    (carried,) = (value for name, value in found.define_macros if name.endswith("_ARCHITECTURES"))
    assert carried == "9.0:10.0+PTX:12.0+PTX"
    flags = found.extra_compile_args["nvcc"]
    assert [flag for flag in flags if "arch" in flag] == [
        f"-gencode=arch=compute_{number},code={code}_{number}"
        for number, codes in (("90", ["sm"]), ("100", ["sm", "compute"]), ("120", ["sm", "compute"]))
        for code in codes
    ]
    assert torch.utils.cpp_extension._get_cuda_arch_flags(flags) == []
    said = capfd.readouterr().err
    assert "CUDA back end: compute capability 7.5 is left out: the kernels need 8.0 or later" in said


@pytest.mark.parametrize("wanted", ["", "1"], ids=["unset", "asked-for"])
def test_no_supported_architecture(setup: Setup, tmp_path: Path, wanted: str) -> None:
    home = toolkit(tmp_path, "13.0")
    status, said = setup("13.0", CUDA_HOME=home, PEFT_KERNELS_CUDA=wanted, TORCH_CUDA_ARCH_LIST="7.0;Turing")
    assert (status != 0) == bool(wanted)
    assert "7.0 is left out: the kernels need 8.0 or later; 7.5 is left out" in said


def test_misspelled_architecture(setup: Setup, tmp_path: Path) -> None:
    status, said = setup("13.0", CUDA_HOME=toolkit(tmp_path, "13.0"), TORCH_CUDA_ARCH_LIST="hoper")
    assert status != 0 and "TORCH_CUDA_ARCH_LIST: expected" in said and "got 'hoper'" in said


def test_every_command_line_has_the_version_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Objects that were compiled for another torch would be linked into a library with the new version."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    changes = {"ROOT": tmp_path, "headers": lambda *_: [], "isa_sources": list, "spec_hash": str}
    for name, value in changes.items():
        monkeypatch.setitem(build["cpu_extension"].__globals__, name, value)
    found = []
    for version in ("2.98.0", "2.99.0+cpu"):
        monkeypatch.setattr(torch, "__version__", version)
        extension = build["cpu_extension"](False)
        found.append([folder for folder in extension.include_dirs if version in folder])
        assert f'PEFT_KERNELS_TORCH "{version}"' in Path(*found[-1], "generated.h").read_text()
    assert found[0] != found[1]


def included(path: Path, seen: set[Path]) -> str:
    """The text of a file and of the files that it includes with quotes."""
    seen.add(path)
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r'^#\s*include "([^"]+)"', text, re.MULTILINE):
        other = (path.parent / name).resolve()
        if other.exists() and other not in seen:
            text += included(other, seen)
    return text


def test_files_with_large_torch_headers_begin_with_the_precompiled_one() -> None:
    """A precompiled header is only used if it is included first; parsing torch's takes seconds."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    sources = [
        ROOT / name for name in (*build["CPU_SOURCES"], *build["CUDA_OPS"], *build["EMULATED_SOURCES"])
    ]
    if not all(path.exists() for path in sources):
        pytest.skip("no sources here")
    much = [path for path in sources if re.search(r"<ATen/ATen.h>|<torch/", included(path, set()))]
    assert len(much) > 25
    late = [
        path.name
        for path in much
        if f"{re.search(r'^#include .*$', path.read_text(encoding='utf-8'), re.MULTILINE)[0]}\n"  # type: ignore[index]
        != build["PRECOMPILED"]
    ]
    assert late == []


def test_a_wrapped_file_begins_with_the_precompiled_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the wrapped file: a precompiled header is ignored in files it includes."""
    wrapped = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["wrapped"]
    monkeypatch.setitem(wrapped.__globals__, "ROOT", tmp_path)
    (tmp_path / "ops.cpp").write_text("// Ops.\n#include <ATen/ATen.h>\n")
    (tmp_path / "kernel.cu").write_text("// A kernel.\n")
    wrapped("in", {"ops.cpp": "ops_of_two.cpp", "kernel.cu": "kernel.cu"})
    texts = [(tmp_path / "build" / "in" / name).read_text() for name in ("ops_of_two.cpp", "kernel.cu")]
    assert texts == [
        f'#include <ATen/ATen.h>\n#include "{tmp_path}/ops.cpp"\n',
        f'#include "{tmp_path}/kernel.cu"\n',
    ]
