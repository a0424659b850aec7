"""Architectures for which nvcc generates the same PTX: tests run kernels for one of each pair."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.gpu import built_ptx, sass

TOOLS = sass.tools()
SAME = {80: 90, 100: 120}
SOURCES = [source for source in sass.sources() if source.stem not in sass.HOPPER]


@pytest.mark.skipif(isinstance(TOOLS, str), reason=str(TOOLS))
@pytest.mark.parametrize("pair", SAME.items(), ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_two_architectures_have_the_same_ptx(source: Path, pair: tuple[int, int], tmp_path: Path) -> None:
    """If they ever differ, `_C_ptx` must have both, and `make ptx` must run both."""
    assert isinstance(TOOLS, sass.Tools)
    path = tmp_path / "fat"
    code = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in pair]
    flags = (*sass.FLAGS, f"-I{sass.SOURCES}", "-fatbin", "--no-compress", *code)
    sass.run([TOOLS.nvcc, *flags, str(source), "-o", str(path)])
    texts = [built_ptx.in_object(path.read_bytes(), architecture) for architecture in pair]
    assert all(texts) and len({re.sub(r"\.target sm_\d+", "", text or "", count=1) for text in texts}) == 1
