"""For which architectures nvcc writes the same PTX: `make ptx` runs the tests of kernels once for those."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType

SAME = {80: 90, 100: 120}


def test_as_many_texts_as_are_run(machine: ModuleType) -> None:
    """Of a pair, one is run; where they begin to differ, both have to be."""
    texts: dict[int, list[str]] = defaultdict(list)
    library = Path(str(machine.__file__)).read_bytes()
    for found in re.finditer(rb"\.version [\d.]+\n\.target sm_(\d+)([^\0]*)\0", library):
        texts[int(found[1])].append(found[2].decode())
    assert texts.keys() >= {80}
    for one, other in SAME.items():
        assert one not in texts or other not in texts or texts[one] == texts[other], (one, other)
