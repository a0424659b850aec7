"""The layout for the Hugging Face Hub: build.toml builds without Python, and `kernels` loads the result.

Compiling takes minutes, so all but one test run only in `make hub`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import Python

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import hub_layout  # noqa: E402

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="Hugging Face kernels is not installed (make hub)"
)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of `make hub`, or a new one."""
    if made := os.environ.get("HUB_LAYOUT"):
        return Path(made).resolve()
    out = tmp_path_factory.mktemp("hub") / "layout"
    hub_layout.main([str(out), "--build"])
    return out


def variant(layout: Path) -> Path:
    return next((layout / "build").iterdir())


USE = """
import pathlib, sys, torch, kernels
if before: import peft_kernels
hub = kernels.get_local_kernel(pathlib.Path(sys.argv[1]), backend="cpu")
assert hub.__name__.startswith("_peft_kernels_cpu_"), hub.__name__
assert str(hub.__file__).startswith(sys.argv[1]), hub.__file__
import peft_kernels
assert hub is not peft_kernels and peft_kernels.core.dispatch is not hub.dispatch
print(hub.explain())
torch.manual_seed(0)
weight = hub.NF4Weight.quantize(torch.randn(96, 64), double_quant=True)
x = torch.randn(5, 64, requires_grad=True)
a, b = torch.randn(8, 64), torch.randn(96, 8)
def results():
    y = hub.nf4_linear(x, weight)
    return y, hub.lora_linear(x, weight, a, b, 2.0), torch.autograd.grad(y.square().sum(), x)[0]
with hub.use_backend("cpu"): found = results()
with hub.use_backend("reference"): wanted = results()
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
theirs = torch.ops.peft_kernels_cpu.nf4_linear, getattr(torch.ops, hub.__name__ + "_cpu").nf4_linear
assert theirs[0].default is not theirs[1].default
kernel = torch._C._dispatch_has_kernel_for_dispatch_key
for name in hub.dispatch.registry.OPS:
    ours, mine = f"peft_kernels_cpu::{name}", f"{hub.__name__}_cpu::{name}"
    assert kernel(ours, "CPU") == kernel(mine, "CPU"), name
"""


@needs_compiler
@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True], ids=["alone-first", "beside-the-package"])
def test_kernels_loads_it_beside_the_package(python: Python, layout: Path, before: bool) -> None:
    code = f"before = {before}; import sys; sys.argv = ['', {str(layout)!r}]{USE}"
    out = python(code, ROOT, HF_HUB_OFFLINE="1").stdout
    assert "\ncpu        usable: C++, instruction set " in out


@needs_compiler
@needs_kernels
@pytest.mark.slow
def test_kernel_builders_tests_pass_within_a_minute(layout: Path) -> None:
    """The command of kernel-builder's `ci-test`. Its pyproject.toml has the marker, that of this repository
    must not matter."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "kernels_ci", "-p", "no:cacheprovider"]
    command += ["-q", "-c", os.devnull, "--rootdir", "."]
    environment = os.environ | {"PYTHONPATH": str(variant(layout))}
    before = os.times()
    done = subprocess.run(
        command, cwd=layout, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    after = os.times()  # of the processor: others may run at the same time
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 40
    assert seconds < 60


@needs_compiler
@needs_kernels
@pytest.mark.slow
def test_build_toml_is_what_kernels_reads(layout: Path) -> None:
    from kernels._rust import Backend, Build, Metadata

    assert Build.open(layout).general.backends == [Backend.CPU]
    metadata = Metadata.read_from_file(variant(layout) / "metadata.json")
    assert metadata.name.python_name == hub_layout.PACKAGE and metadata.backend.backend_type == Backend.CPU


@needs_compiler
@needs_kernels
@pytest.mark.slow
def test_the_library_needs_no_python(layout: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    (library,) = variant(layout).glob("*.so")
    output = subprocess.run([nm, "-D", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in output.splitlines()]
    assert len(names) > 50 and not [name for name in names if name.lstrip("_").startswith("Py")]
    output = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in output and "python" not in output


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="expected an empty folder or a layout"):
        hub_layout.main([str(tmp_path)])
    assert (tmp_path / "mine.txt").read_text() == "mine"
