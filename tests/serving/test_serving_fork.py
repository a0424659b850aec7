"""An engine in a process forked from the one that serves: errors, and no endless waits."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_models import llama, prompt

from peft_kernels.serving import Engine

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


def in_child(check: Callable[[], Any], report: Path, seconds: int = 60) -> str:
    """The error of a check in a forked process, or an empty string."""
    report.write_text("it did not end by itself")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            check()
            report.write_text("")
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return report.read_text()


def test_child_does_not_wait_for_threads_of_the_parent(tmp_path: Path) -> None:
    engine = Engine(llama(), max_batch=2)
    held, go = threading.Event(), threading.Event()

    def step() -> bool:
        """A long step that holds all locks."""
        with engine._model_lock, engine._queue, running._changed:
            held.set()
            go.wait(120)
        return False

    done = engine.submit([5, 6], max_new_tokens=2)
    engine.run()
    running = engine.submit([5, 6], max_new_tokens=2)
    usual, engine.step = engine.step, step  # type: ignore[method-assign]
    engine.start()
    assert held.wait(60)

    def check() -> None:
        assert done.result() == list(done) == done.tokens
        for ask in (running.result, lambda: list(running)):
            with pytest.raises(RuntimeError, match=r"the engine does not run: expected engine.start\(\)"):
                ask()
        for ask in (
            engine.start, engine.run, lambda: usual(), engine.stop, lambda: engine.adapters,
            lambda: engine.submit([5], max_new_tokens=1), lambda: engine.load("one", tmp_path),
            lambda: engine.register("one", tmp_path), lambda: engine.unload("one"),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="ran in another process when this one was forked from it"):
                ask()
        engine.close()

    try:
        assert in_child(check, tmp_path / "report") == ""
    finally:
        engine.step = usual  # type: ignore[method-assign]
        go.set()
    assert len(running.result(60)) <= 2
    engine.close()


def test_idle_engine_starts_in_the_child(tmp_path: Path) -> None:
    with Engine(llama(), max_batch=2) as engine:
        engine.generate([prompt(0, 5)], max_new_tokens=2)
        engine.stop()

        def check() -> None:
            with engine:
                engine.register("one", tmp_path)
                assert [one.name for one in engine.adapters] == ["one"] and engine._serves()

        assert in_child(check, tmp_path / "report") == ""
