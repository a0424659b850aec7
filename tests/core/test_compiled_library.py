"""A missing, stale, broken or capped compiled library; side effects of importing the package."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fresh_process import Python
from skips import needs

import peft_kernels as pk
import ptx_backend as ptx
import testing
from peft_kernels.core import dispatch, registry
from peft_kernels.core.backends import cpu, cuda
from peft_kernels.core.backends.compiled import CompiledBackend

PACKAGE = Path(pk.__file__).parent
needs_cpu = needs("cpu")


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A copy of the package without its compiled libraries of ops; returns the folder to put on the path.

    With a wheel's libraries of kernels: its ops need them in their own folder.
    """
    target = tmp_path / "peft_kernels"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("_C*", "*.pyd", "__pycache__"))
    return tmp_path


def library() -> Path:
    return Path(cpu.BACKEND.extension.__file__)


def changed(compiled: Path, right: str, wrong: str) -> Path:
    """A library in the copy of the package that says `wrong` instead of `right`."""
    content = library().read_bytes()
    assert content.count(right.encode()) == 1
    path = compiled / "peft_kernels" / library().name
    path.write_bytes(content.replace(right.encode(), wrong.encode().ljust(len(right), b"\0")))
    return path


def built_with() -> str:
    """What the library says of its torch: a wheel's without +cpu or +cu130."""
    (said,) = re.findall(rb"PEFT_KERNELS_TORCH=([^;]+);", library().read_bytes())
    return said.decode()


LIBRARY = "from peft_kernels.core.backends import cpu; import peft_kernels; library = cpu.BACKEND.extension"

USE = """
import logging; logging.basicConfig()
import torch, peft_kernels as pk
print(pk.__file__); print(pk.explain())
w = pk.NF4Weight.quantize(torch.ones(4, 64))
x = torch.ones(2, 64, requires_grad=True)
y = pk.nf4_linear(x, w); y.sum().backward()
assert torch.allclose(y, torch.full((2, 4), 64.0)) and x.grad is not None
try:
    with pk.use_backend("cpu"): pass
except RuntimeError as error:
    print("refused:", error)
"""


def test_missing_library_falls_back_to_the_reference(python: Python, compiled: Path) -> None:
    out = python(USE, compiled).stdout
    assert str(compiled) in out
    assert re.search(r"^cpu +not usable: not built .*reinstall", out, re.M)
    assert re.search(r"^refused: back end cpu cannot be used here: not built", out, re.M)


@needs_cpu
def test_a_stale_library_is_not_loaded(python: Python, compiled: Path) -> None:
    """Loading one with other schemas would abort the process."""
    stale = changed(
        compiled, f"PEFT_KERNELS_SPEC_HASH={registry.spec_hash()}", f"PEFT_KERNELS_SPEC_HASH={'0' * 64}"
    )
    out = python(USE, compiled).stdout
    message = rf"{re.escape(str(stale))} was built from other sources than this package: rebuild it"
    assert re.search(rf"^cpu +not usable: {message}", out, re.M)
    assert re.search(rf"^refused: back end cpu cannot be used here: {message}", out, re.M)


def test_a_library_that_lacks_a_function_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schemas may be the same."""
    backend = cuda.CudaBackend()
    monkeypatch.setattr(registry, "install", lambda namespace: object())
    monkeypatch.setattr(backend, "_refusal_to_load", lambda: None)
    monkeypatch.setattr(backend, "namespace", "peft_kernels_of_other_sources")
    monkeypatch.setattr(torch.ops, "load_library", lambda file: None)
    backend.load()
    stale = "was built from other sources than this package: rebuild it (pip install .)"
    assert backend.probe() == f"peft_kernels._C_cuda {stale}"


@needs_cpu
@pytest.mark.parametrize("said,version", [("PEFT_KERNELS_TORCH=2.0.1;", "2.0.1"), ("", "None")])
def test_a_library_for_another_torch_is_not_loaded(
    python: Python, compiled: Path, said: str, version: str
) -> None:
    """Or for a torch that it does not name."""
    foreign = changed(compiled, f"PEFT_KERNELS_TORCH={built_with()};", said)
    out = python(USE, compiled).stdout
    message = rf"{re.escape(str(foreign))} was built with torch {version}, this is torch .*: rebuild it"
    assert re.search(rf"^cpu +not usable: {message}", out, re.M)


def in_wheel(compiled: Path, version: str, source: Path) -> Path:
    """A library in the copy of the package as a wheel has it for a version of torch."""
    path = compiled / "peft_kernels" / f"_C.torch{version}.so"
    shutil.copy(source, path)
    return path


MINOR = ".".join(torch.__version__.split(".")[:2])


@needs_cpu
def test_a_wheel_loads_the_library_for_this_torch(python: Python, compiled: Path) -> None:
    """In a folder with others, which are not libraries here."""
    fitting = in_wheel(compiled, MINOR, library())
    for version in ("2.8", "9.10"):
        in_wheel(compiled, version, Path(__file__))
    shutil.copy(Path(__file__), fitting.with_name("_C_cuda.torch2.9.so"))
    out = python(f"{LIBRARY}; print(library.__file__)", compiled).stdout
    assert Path(out.strip()) == fitting
    assert re.search(r"^cpu +usable: C\+\+", python(USE, compiled).stdout, re.M)


@needs_cpu
def test_a_wheel_without_a_library_for_this_torch_says_which_it_has(python: Python, compiled: Path) -> None:
    """A library for another torch must not be loaded, whatever it contains."""
    for version in ("2.10", "2.8", "9.9"):
        path = in_wheel(compiled, version, library())
    for name in ("_C_cuda.torch9.10.so", "_C.torch9.11.so.part"):  # of another back end, and of no torch
        shutil.copy(Path(__file__), path.with_name(name))
    out = python(USE, compiled).stdout
    message = (
        rf"this wheel has kernels for torch 2\.8, 2\.10, 9\.9, this is torch {re.escape(torch.__version__)}: "
        r"install one of these, or build from source"
    )
    assert re.search(rf"^cpu +not usable: {message}", out, re.M)
    assert re.search(rf"^refused: back end cpu cannot be used here: {message}", out, re.M)
    assert (
        "2.8, 2.10, 9.9" in python("from peft_kernels.cli.main import main; main(['info'])", compiled).stdout
    )


@needs_cpu
def test_a_misnamed_library_of_a_wheel_is_not_loaded(python: Python, compiled: Path) -> None:
    foreign = changed(compiled, f"PEFT_KERNELS_TORCH={built_with()};", "PEFT_KERNELS_TORCH=2.0.1;")
    path = foreign.rename(foreign.with_name(f"_C.torch{MINOR}.so"))
    message = rf"{re.escape(str(path))} was built with torch 2\.0\.1, this is torch"
    assert re.search(rf"^cpu +not usable: {message}", python(USE, compiled).stdout, re.M)


@pytest.mark.parametrize(
    "built_with,here,message",
    [
        ("12090", "13.0", "was built with CUDA 12, this is torch for CUDA 13.0: rebuild it"),
        ("13000", "12.8", "was built with CUDA 13, this is torch for CUDA 12.8: rebuild it"),
        ("13000", "13.2", "peft_kernels._C_cuda does not load"),  # refused for no other reason
        ("13000", None, "this torch has no CUDA"),
    ],
)
def test_a_library_for_another_cuda_is_not_loaded(
    python: Python, compiled: Path, built_with: str, here: str | None, message: str
) -> None:
    said = f"PEFT_KERNELS_SPEC_HASH={registry.spec_hash()};PEFT_KERNELS_TORCH={torch.__version__};"
    path = compiled / "peft_kernels" / f"_C_cuda.torch{MINOR}.so"
    path.write_bytes(f"{said}PEFT_KERNELS_CUDART={built_with};".encode())
    code = f"import torch; torch.version.cuda = {here!r}; import peft_kernels as pk; print(pk.explain())"
    out = python(code, compiled).stdout
    assert re.search(rf"^cuda +not usable: .*{re.escape(message)}", out, re.M), out


@needs_cpu
@pytest.mark.parametrize("which", ["ops", "kernels"])
def test_a_library_that_is_cut_off_is_not_loaded(python: Python, compiled: Path, which: str) -> None:
    """The process would end in SIGBUS. In a wheel the kernels are in a library next to that of the ops."""
    ops = in_wheel(compiled, MINOR, library())
    path = ops if which == "ops" else ops.with_name("libpeft_kernels_cpu.so")
    content = library().read_bytes()
    path.write_bytes(content[: len(content) - 100])
    out = python(USE, compiled).stdout
    assert re.search(rf"^cpu +not usable: {re.escape(str(path))} is cut off: reinstall it", out, re.M)


def test_the_reason_of_the_build_is_repeated(python: Python, compiled: Path) -> None:
    """Which pip hid."""
    (compiled / "peft_kernels" / "not_built.json").write_text('{"cpu": "clang++ does not do"}')
    out = python("from peft_kernels.cli.main import main; main(['info'])", compiled).stdout
    assert re.search(
        r"^cpu +not usable: not built: clang\+\+ does not do; then pip install .* --no-cache-dir", out, re.M
    )


def test_a_wheel_for_cpus_does_not_ask_for_nvcc(python: Python, compiled: Path) -> None:
    in_wheel(compiled, "9.10", Path(__file__))
    code = "import torch; torch.version.cuda = '13.0'; import peft_kernels as pk; print(pk.explain())"
    out = python(code, compiled).stdout
    assert re.search(
        r"^cuda +not usable: this wheel has none of its kernels: install one that has", out, re.M
    )


def test_an_empty_library_is_not_loaded(python: Python, compiled: Path) -> None:
    """As an interrupted copy leaves it."""
    (compiled / "peft_kernels" / f"_C.torch{MINOR}.so").touch()
    out = python(USE, compiled).stdout
    assert re.search(r"^cpu +not usable: peft_kernels\._C does not load: .*empty", out, re.M)


@needs_cpu
def test_a_broken_library_reports_the_loader_error(python: Python, compiled: Path) -> None:
    """A file with the right hash that is not a library."""
    broken = compiled / "peft_kernels" / library().name
    said = f"PEFT_KERNELS_SPEC_HASH={registry.spec_hash()};PEFT_KERNELS_TORCH={torch.__version__};"
    broken.write_bytes(said.encode() * 10)
    out = python(USE, compiled).stdout
    reason = r"invalid ELF header|file too short|not a mach-o file"
    assert re.search(rf"^cpu +not usable: peft_kernels\._C does not load: .*({reason})", out, re.M)


@pytest.mark.parametrize("backend", [cpu.BACKEND, cuda.BACKEND, ptx.BACKEND], ids=lambda b: b.name)
def test_a_built_library_loads(backend: CompiledBackend) -> None:
    """Without a GPU and a driver no other test would notice."""
    if backend.file is None:
        pytest.skip(f"{backend.name}: {backend.not_built}")
    assert backend._refusal is None
    assert backend.extension.spec_hash() == registry.spec_hash()


@needs_cpu
def test_isa_cap_from_the_environment(python: Python) -> None:
    code = f"{LIBRARY}; print(library.isa_level(), *library.isa_levels())"
    levels = cpu.BACKEND.extension.isa_levels()
    cap = levels[len(levels) // 2 - 1]  # below the best ISA, if there are several
    assert python(code, PEFT_KERNELS_CPU_ISA=cap).stdout.split() == [cap, *levels]


@needs_cpu
def test_an_unknown_isa_cap_is_an_error(python: Python) -> None:
    out = python(USE, PEFT_KERNELS_CPU_ISA="sse9").stdout
    levels = testing.ISA_LEVELS[0]
    assert re.search(rf"^cpu +not usable: .*PEFT_KERNELS_CPU_ISA: expected one of {levels}", out, re.M)
    assert re.search(r"^refused: .*PEFT_KERNELS_CPU_ISA", out, re.M)


@needs_cpu
def test_cpu_library_does_not_link_python() -> None:
    if (nm := shutil.which("nm")) is None:
        pytest.skip("no nm")
    told = subprocess.run(
        [nm, "-D", "--undefined-only", library()], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in told.splitlines()]
    assert len(names) > 50 and not [name for name in names if name.lstrip("_").startswith("Py")]


def test_import_has_no_side_effects(python: Python) -> None:
    code = """
import sys, os, logging, torch
def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), os.environ.copy(),
            torch.are_deterministic_algorithms_enabled(), logging.root.handlers[:], torch.nn.Linear.forward)
before, modules = state(), set(sys.modules)
import peft_kernels as pk
assert state() == before and not torch.cuda.is_initialized()
heavy = {"transformers", "peft", "bitsandbytes", "accelerate", "triton", "torch._inductor", "tqdm"}
assert not heavy & (set(sys.modules) - modules), heavy & set(sys.modules)
for name in pk.__all__: getattr(pk, name)
"""
    result = python(code)
    assert result.stdout == "" and result.stderr == ""


def test_second_import_does_not_redefine_ops() -> None:
    dispatch.install()
    assert len(dispatch._libraries) == 1


@needs_cpu
def test_an_emulated_isa_is_never_chosen_automatically(python: Python) -> None:
    extension = cpu.BACKEND.extension
    assert not set(extension.emulated_levels()) & set(extension.isa_levels())
    assert python(f"{LIBRARY}; print(library.isa_level())").stdout.strip() in extension.isa_levels()
