"""The back ends under test, and a summary of which ran."""

from __future__ import annotations

import os
import secrets
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Shared modules of tests are imported by name from any folder; names are unique in the tree.
TESTS = Path(__file__).resolve().parent
for _folder in sorted({path.parent for path in TESTS.rglob("*.py")}):
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))
sys.path.append(str(TESTS.parent))  # for `bench`; at the end: an installed peft_kernels takes precedence

import bitsandbytes_map
import hypothesis
import pytest
import rounding
import small_models  # noqa: F401
import torch
from copied import backend_ids as copied_ids
from fresh_process import Processes, Python
from skips import require

import peft_kernels as pk
import ptx_backend as ptx
import testing
from peft_kernels.core import dispatch
from peft_kernels.core.backends import BACKENDS
from peft_kernels.triton_kernels import backend as triton
from ptx import executed, triton_driver

if capability := triton_driver.wanted():
    triton_driver.install(capability)
elif triton.BACKEND.interpreted and testing.unavailable("triton") is None:
    import triton_interpreter

    triton_interpreter.patch_interpreter()

if not bitsandbytes_map.IS_OURS:
    bitsandbytes_map.install()

BACKEND_IDS = [*testing.backend_ids(), *copied_ids()]

_ran: Counter[str] = Counter()
_skipped: Counter[str] = Counter()


@pytest.fixture(params=BACKEND_IDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every back end, forced; skips those that this machine lacks, with the reason."""
    request.node.user_properties.append(("backend", request.param))
    require(request.param)
    is_ptx = request.param == "ptx"
    if is_ptx:
        # Three orders of threads, distributed over the cases; each case always has the same one.
        ptx.BACKEND.extension.set_seed(zlib.crc32(request.node.nodeid.encode()) % 3)
    with testing.running_on(request.param), ptx.BACKEND.asserting_wgmma() if is_ptx else nullcontext():
        yield request.param


@pytest.fixture(params=["triton"] if triton.BACKEND.interpreted else ["cpu", "ptx"])
def compiled_ops(request: pytest.FixtureRequest) -> Any:
    """The ops of a compiled back end, called without the checks of Python."""
    require(request.param)
    return getattr(torch.ops, BACKENDS[request.param].namespace)


@pytest.fixture(params=["ptx"])  # the parameter is part of test ids, for -k
def extension() -> Iterator[ModuleType]:
    """The CUDA back end as PTX, forced, with NaN-filled outputs; resets a card set by the test."""
    require("ptx")
    with testing.nan_outputs(), testing.running_on("ptx"):
        yield ptx.BACKEND.extension
    ptx.BACKEND.reset()


# The `backend` fixture applies to all examples of a test; examples are the same in every run.
hypothesis.settings.register_profile(
    "peft_kernels",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("peft_kernels")
hypothesis.configuration.set_hypothesis_home_dir(TESTS.parent / "build" / "hypothesis")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, as do processes that tests start; tests of threading set threads themselves.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# The longest files run first, so that no worker is left with one at the end.
LONGEST = [
    "cross_compilation",
    "sass",
    "docs",
    "loss_curve",
    "bench",
    "example_finetune",
    "cuda_paths",
    "gpu_check",
    "experts",
    "architectures",
    "compile",
    "large",
    "lora_multi",
    "lora",
]


# Folders with tests of other back ends than the native one.
WITH_KERNELS = ("core", "ops", "nf4", "patch", "optim", "gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        choices=("native", "isa", "ptx"),
        help="isa: only tests of instruction sets that this machine does not choose, and tests/ops/cpu; "
        "ptx: of the CUDA kernels, run as PTX, and tests/gpu; native: all others",
    )
    parser.addoption("--seed", default="0", help="added to the seeds of all inputs; random: draws a number")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before modules are imported, which make inputs too. Workers get the number that their parent drew."""
    if config.option.seed == "random":
        config.option.seed = str(secrets.randbelow(2**20))
    testing.SEED = int(config.option.seed)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    if wanted := config.getoption("--backends"):
        others = other_isas()
        for item in items:
            if (folder := item.path.relative_to(TESTS).parts[0]) not in WITH_KERNELS:
                assert backends_of(item, others) == "native", f"{folder} runs kernels: add it to WITH_KERNELS"
        left_out = [item for item in items if backends_of(item, others) != wanted]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if backends_of(item, others) == wanted]
    items.sort(key=place)


def other_isas() -> set[str]:
    """The instruction sets other than the one that this machine chooses."""
    names = {*testing.ISA_LEVELS, *testing.EMULATED.values()}
    chosen = BACKENDS["cpu"].extension.isa_levels()[-1] if testing.unavailable("cpu") is None else ""
    return names - {chosen}


def backends_of(item: pytest.Item, others: set[str]) -> str:
    """The value of --backends that selects a test, by its folder and the words of its id."""
    folders = item.path.relative_to(TESTS).parts
    callspec = getattr(item, "callspec", None)
    words = set(callspec.id.split("-")) if callspec else set()
    if folders[0] == "gpu" or words & {"ptx", "cuda"} or item.get_closest_marker("ptx"):
        return "ptx"
    return "isa" if folders[:2] == ("ops", "cpu") or words & others else "native"


# Seeding absent devices takes half a millisecond, thousands of times: torch records the caller.
seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed(testing.SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """A test whose numbers are too far off runs again, with the same fixtures and other seeds."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    first = testing.SEED

    def run(number: int) -> None:
        testing.SEED = first + number
        seed(testing.SEED)
        pyfuncitem.obj(**arguments)

    try:
        rounding.judged_over_several_inputs(run)
    finally:
        testing.SEED = first
    return True


@pytest.fixture
def nan_outputs() -> Iterator[None]:
    """Memory that an op leaves unwritten is NaN."""
    with testing.nan_outputs():
        yield


@pytest.fixture
def op_counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts calls by op."""
    counted: Counter[str] = Counter()
    call = dispatch.call

    def counting(op: str, *args: Any, **kwargs: Any) -> Any:
        counted[op] += 1
        return call(op, *args, **kwargs)

    monkeypatch.setattr(dispatch, "call", counting)
    return counted


@pytest.fixture(scope="session")
def python() -> Iterator[Python]:
    processes = Processes()
    yield Python(processes)
    processes.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Uses one thread: for tiny tensors several mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_report_header() -> list[str]:
    return [f"torch {torch.__version__}, --seed {testing.SEED}", *pk.explain().splitlines()]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name in (value for key, value in report.user_properties if key == "backend"):
        if report.when == "call" and report.passed:
            _ran[name] += 1
        elif report.skipped:
            _skipped[name] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("back ends")
    for name in BACKEND_IDS:
        reason = testing.unavailable(name)
        note = f" ({reason})" if reason else ""
        terminalreporter.line(f"{name:<12} {_ran[name]} tests passed, {_skipped[name]} skipped{note}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A back end that is usable here and whose every case was skipped has not been tested: that is a
    failure."""
    if testing.unavailable("ptx") is None:
        executed.leave(ptx.BACKEND.extension)
    for name in BACKEND_IDS:
        if testing.unavailable(name) is None and _skipped[name] and not _ran[name]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
