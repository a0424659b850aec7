"""Architectures for which nvcc generates the same PTX, for which `make ptx` runs the kernels' tests once."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType

SAME = {80: 90, 100: 120}


def test_pairs_of_architectures_have_the_same_ptx(machine: ModuleType) -> None:
    """Only one of each pair is tested; if they ever differ, both must be."""
    texts: dict[int, list[str]] = defaultdict(list)
    library = Path(str(machine.__file__)).read_bytes()
    for found in re.finditer(rb"\.version [\d.]+\n\.target sm_(\d+)\n([^\0]*)\0", library):
        texts[int(found[1])].append(found[2].decode())
    assert texts.keys() >= {80}
    for one, other in SAME.items():
        assert one not in texts or other not in texts or texts[one] == texts[other], (one, other)
