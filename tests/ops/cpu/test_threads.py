"""The threads that CPU kernels run in: OpenMP's on a quiet machine, our own on a busy one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_kernels as pk
import testing
from bench.models.noisy_neighbour import neighbours
from peft_kernels.core.backends import cpu

if reason := testing.unavailable("cpu"):
    pytest.skip(f"cpu: {reason}", allow_module_level=True)
LIBRARY: Any = cpu.BACKEND.extension
if not hasattr(LIBRARY, "count_tasks"):
    pytest.skip("built without what tests add (PEFT_KERNELS_EMULATE=1)", allow_module_level=True)

NEVER = -1
SANITIZER = testing.sanitizer()
by_times = pytest.mark.skipif(SANITIZER != "", reason="times under a sanitizer mean nothing")


@contextmanager
def default_afterwards() -> Iterator[None]:
    """Lets the library measure contention again afterwards, from the state of a quiet machine."""
    try:
        yield
    finally:
        LIBRARY.set_busy(False)
        LIBRARY.set_busy(None)


@pytest.fixture(params=[False, True], ids=["quiet", "busy"])
def is_busy(request: pytest.FixtureRequest) -> Iterator[bool]:
    if SANITIZER == "thread" and not request.param:
        pytest.skip("ThreadSanitizer does not see OpenMP's ordering: only our own threads are tested")
    with default_afterwards():
        LIBRARY.set_busy(request.param)
        assert LIBRARY.is_busy() is request.param
        yield request.param


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def count(tasks: int, threads: int, ms: float = 0.0, inner: int = 0, fails_at: int = NEVER) -> Any:
    return LIBRARY.count_tasks(tasks, threads, ms, inner, fails_at)


@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 100])
def test_every_task_is_run_once(tasks: int, is_busy: bool, threads: int) -> None:
    for _ in range(20):
        assert count(tasks, threads)[0] == [1] * tasks


def test_tasks_run_in_the_requested_number_of_threads(is_busy: bool, threads: int) -> None:
    assert count(40, threads, ms=2.0)[1] == threads
    assert count(40, 2, ms=2.0)[1] == 2
    assert count(40, 1, ms=0.1)[1] == 1


@pytest.mark.skipif(SANITIZER != "", reason="sanitizer builds always use several threads")
def test_one_thread_if_torch_has_one(is_busy: bool, one_thread: None) -> None:
    assert LIBRARY.parts(0, 10**6, 1) == [0, 10**6]


@pytest.mark.parametrize("size", [1, 7, 4096, 100_003])
def test_parts_cover_the_range(size: int, is_busy: bool, threads: int) -> None:
    for grain in (1, 100, 10**6):
        flat = LIBRARY.parts(5, 5 + size, grain)
        begins, ends = flat[::2], flat[1::2]
        assert [5, *ends] == [*begins, 5 + size]  # contiguous
        assert all(
            end - begin >= min(grain, size) for begin, end in list(zip(begins, ends, strict=True))[:-1]
        )
        assert len(begins) <= threads * (8 if is_busy else 1)
    assert LIBRARY.parts(5, 5, 1) == []


def test_parts_are_small_on_a_busy_machine(is_busy: bool, threads: int) -> None:
    assert len(LIBRARY.parts(0, 10**6, 1)) // 2 == (8 * threads if is_busy else threads)


@pytest.mark.skipif(SANITIZER == "", reason="built for no sanitizer")
def test_sanitizers_see_small_work_in_several_threads(one_thread: None) -> None:
    """The kernels' tests run with one torch thread, in which sanitizers would find nothing."""
    assert len(LIBRARY.parts(0, 8192, 2048)) // 2 == 4


@pytest.mark.parametrize("fails_at", [0, 1, 50])
def test_exceptions_of_tasks_reach_the_caller(fails_at: int, is_busy: bool, threads: int) -> None:
    for _ in range(5):
        with pytest.raises(RuntimeError, match=f"task {fails_at} fails"):
            count(100, threads, ms=0.1, fails_at=fails_at)
    assert count(100, threads, ms=0.1) == ([1] * 100, threads, 0)


def test_a_nested_region_runs_in_the_calling_thread(is_busy: bool, threads: int) -> None:
    counts, used, inner = count(30, threads, ms=0.5, inner=10)
    assert counts == [1] * 30 and used == threads and inner == 300


def test_concurrent_callers(is_busy: bool, threads: int) -> None:
    with ThreadPoolExecutor(6) as pool:
        for counts, _, inner in pool.map(lambda _: count(50, threads, ms=0.05, inner=3), range(60)):
            assert counts == [1] * 50 and inner == 150


def test_a_caller_does_not_wait_for_threads_in_use(threads: int) -> None:
    with default_afterwards():
        LIBRARY.set_busy(True)
        other = threading.Thread(target=lambda: count(2 * threads, threads, ms=1000.0))
        other.start()
        time.sleep(0.3)
        started = time.perf_counter()
        counts, used, _ = count(10, threads, ms=1.0)
        waited = time.perf_counter() - started
        assert counts == [1] * 10 and used == 1 and other.is_alive() and waited < 1.0
        other.join()


def results() -> list[torch.Tensor]:
    """Results of ops that divide their work in every way there is."""
    weight = pk.NF4Weight.quantize(testing.tensor(480, 320, seed=1, dtype=torch.bfloat16))
    x = testing.tensor(300, 320, seed=2, dtype=torch.bfloat16).requires_grad_()
    a, b = (testing.tensor(*s, seed=3, scale=0.1).requires_grad_() for s in ((8, 320), (480, 8)))
    q, k, v = (
        testing.tensor(2, 130, 4, 32, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (4, 5, 6)
    )
    head = testing.tensor(1000, 320, seed=7, dtype=torch.bfloat16)
    labels = torch.arange(300)
    y = pk.lora_linear(x, weight, a, b, 0.5)
    attended = pk.attention(q, k, v, is_causal=True)
    loss = pk.linear_cross_entropy(x, head, labels)
    total = y.float().sum() + attended.float().square().sum() + loss
    gradients = torch.autograd.grad(total, (x, a, b, q, k, v))
    return [weight.dequantize(torch.bfloat16), y, attended, loss, *gradients]


def test_bits_do_not_depend_on_the_threads(threads: int) -> None:
    found = []
    with testing.running_on("cpu"), default_afterwards():
        for busy in (False, True):
            LIBRARY.set_busy(busy)
            for number in (1,) if SANITIZER == "thread" else (1, 2, 3):
                torch.set_num_threads(number)
                found.append(results())
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def run(code: str) -> str:
    """The output of `code` in a new process, outside the source tree, to import the tested package."""
    tests = Path(__file__).resolve().parent.parent.parent
    folders = os.pathsep.join([str(Path(pk.__file__).resolve().parent.parent), str(tests)])
    script = f"import os, time, torch\nfrom peft_kernels.core.backends.cpu import BACKEND\n{code}"
    command = [sys.executable, "-c", script.replace("LIBRARY", "BACKEND.extension")]
    environment = os.environ | {"PYTHONPATH": folders}
    result = subprocess.run(
        command, cwd=tests, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(SANITIZER == "thread", reason="ThreadSanitizer does not allow new threads after a fork")
def test_a_forked_process_gets_its_own_threads() -> None:
    output = run("""
torch.set_num_threads(2)
LIBRARY.set_busy(True)
assert LIBRARY.count_tasks(20, 2, 2.0, 0, -1)[1] == 2
child = os.fork()
if child == 0:
    import signal
    signal.alarm(60)
    LIBRARY.set_busy(True)
    print(LIBRARY.count_tasks(20, 2, 2.0, 0, -1), flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert output.splitlines() == [str(([1] * 20, 2, 0)), "0"]


@by_times
@pytest.mark.skipif(sys.platform != "linux", reason="contention is measured with Linux' thread clocks")
def test_contention_is_detected() -> None:
    code = f"""
torch.set_num_threads({os.cpu_count()})
end = time.monotonic() + 60
x, w = torch.randn(512, 1024), torch.randn(1024, 1024)
import peft_kernels as pk
weight = pk.NF4Weight.quantize(w)
while not LIBRARY.is_busy() and time.monotonic() < end:
    pk.nf4_linear(x, weight)
print(LIBRARY.is_busy())
"""
    with neighbours(os.cpu_count() or 1, is_other_session=False):
        assert run(code) == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="specific to GNU OpenMP")
@pytest.mark.skipif(SANITIZER == "thread", reason="only our own threads are used")
def test_threads_that_keep_openmp_from_spinning_end() -> None:
    output = run("""
torch.set_num_threads(2)
torch.randn(1 << 20).add_(1.0)

def threads():
    return len(os.listdir("/proc/self/task"))

def wait_until(met):
    end = time.monotonic() + 60
    while not met() and time.monotonic() < end:
        time.sleep(0.01)
    assert met(), threads()

before = threads()
for _ in range(3):
    LIBRARY.set_busy(True)
    wait_until(lambda: threads() == before + max(len(os.sched_getaffinity(0)) - 2, 0) + 2)
    LIBRARY.set_busy(False)
    wait_until(lambda: threads() == before)
print("ended")
""")
    assert output == "ended\n"


SPINNING = """
torch.set_num_threads(2)
x = torch.randn(1 << 20)
for busy in (False, True):
    LIBRARY.set_busy(busy)
    spent = 0.0
    for _ in range(50):
        x.add_(1.0)
        before = time.process_time()
        time.sleep(0.003)
        spent += time.process_time() - before
    print(spent / (50 * 0.003))
"""


@by_times
@pytest.mark.skipif(sys.platform != "linux", reason="specific to GNU OpenMP")
def test_torch_threads_do_not_spin_on_a_busy_machine() -> None:
    """Measures the share of idle time between regions in which an OpenMP thread uses the processor."""
    for _ in range(3):  # concurrent tests may take the processor from a thread that spins
        quiet, busy = map(float, run(SPINNING).split())
        if quiet >= 0.2:
            break
    if quiet < 0.2:
        pytest.skip(f"torch's threads do not spin here: {quiet:.2f} of the time")
    assert busy < 0.3 * quiet
