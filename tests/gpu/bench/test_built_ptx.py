"""Reuse of PTX from the objects built for tests."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from bench.gpu import built_ptx, sass

TOOLS = sass.tools()


@pytest.mark.skipif(isinstance(TOOLS, str), reason=str(TOOLS))
@pytest.mark.parametrize("architecture", sass.SAME_PTX)
def test_what_was_built_for_tests_becomes_the_same_instructions(architecture: int, tmp_path: Path) -> None:
    assert isinstance(TOOLS, sass.Tools)
    source = sass.SOURCES / "lora" / "dropout.cu"
    built = built_ptx.text(source, architecture, sass.sources())
    if built is None:
        pytest.skip("build/ has no PTX of the sources as they are")
    assert ".loc" not in built and "debug" not in built
    (tmp_path / source.name).write_text(f'#include "{source}"\n')  # nothing was built of this file
    written = sass.compile_all(TOOLS, [tmp_path / source.name], [architecture], cache=tmp_path)
    taken = sass.compile_all(TOOLS, [source], [architecture], cache=tmp_path / "taken")
    first, second = (sass.read(TOOLS, cubins, cache=tmp_path) for cubins in (written, taken))
    assert [dataclasses.replace(k, source=source) for k in first] == second and len(first) > 1


def test_text_is_found_in_an_object() -> None:
    lines = '\t.loc 1 2 3\n.file 1 "a.cu"\n.section .debug_str\n{\n.b8 1,2\n}\n'
    data = b"".join(
        f"x.version 9.0\n.target sm_{a}\n{lines}ret; //{a}\n{lines}\0y".encode() for a in (80, 100)
    )
    assert built_ptx.in_object(data, 100) == ".version 9.0\n.target sm_100\nret; //100\n"
    assert built_ptx.in_object(data, 90) is None


def test_what_was_built_before_a_change_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built_ptx, "ROOT", tmp_path)
    source, header = tmp_path / "csrc" / "cuda" / "lora" / "a.cu", tmp_path / "a.cuh"
    built = tmp_path / "build" / "temp.x" / "build" / "ptx" / "a.o"
    for path in (source, header, built):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b".version 9.0\n.target sm_80\n\0")
        os.utime(path, (1, 1))

    def text(at: Path = source) -> str | None:
        return built_ptx.text(at, 80, [source, header])

    assert text() is None
    os.utime(built, (2, 2))
    assert text() == ".version 9.0\n.target sm_80\n" and text(tmp_path / "a.cu") is None
    os.utime(header, (3, 3))
    assert text() is None
