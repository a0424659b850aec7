"""Two runs of the demo in turns."""

from __future__ import annotations

import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune_turns as turns  # noqa: E402

RUN = """
import sys; sys.path.insert(0, {examples!r})
from finetune_turns import inherited
name, file, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
own = inherited()
own.wait()
for i in range(rounds):
    open(file, "a").write(f"{{name}}{{i}} ")
    own.swap()
"""


def command(name: str, file: Path, rounds: int) -> list[str]:
    return [sys.executable, "-c", RUN.format(examples=str(EXAMPLES)), name, str(file), str(rounds)]


def test_runs_take_turns_and_the_longer_one_ends_alone(tmp_path: Path) -> None:
    file = tmp_path / "order"
    assert turns.run_in_turns([command("a", file, 2), command("b", file, 4)]) == 0
    assert file.read_text().split() == ["a0", "b0", "a1", "b1", "b2", "b3"]


def test_a_run_that_fails_stops_the_other() -> None:
    start = time.monotonic()
    waiting = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert turns.run_in_turns([[sys.executable, "-c", "raise SystemExit(3)"], waiting]) == 3
    assert time.monotonic() - start < 30


def test_alone_there_are_no_turns() -> None:
    assert turns.inherited() is None
