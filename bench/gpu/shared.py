"""How much dynamic shared memory kernels declare: the size of their `Shared`, which is not in a cubin.

It is read from the PTX of a small probe that names the types.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PROBE = """
#include <type_traits>
{includes}
template <class Kernel, class = void>
struct Declared {{
  static constexpr unsigned kBytes = 0;
}};
template <class Kernel>
struct Declared<Kernel, std::void_t<typename Kernel::Shared>> {{
  static constexpr unsigned kBytes = sizeof(typename Kernel::Shared);
}};
{variables}
"""
VARIABLE = 'extern "C" __device__ unsigned shared_{number} = Declared<{name}>::kBytes;'
INCLUDE = re.compile(r'^\s*#\s*include\s*"(.+)"', re.MULTILINE)


def probe(source: Path, names: Sequence[str]) -> str:
    """Source whose PTX has the sizes for the kernels of a source file, named as in C++."""
    includes = INCLUDE.findall(source.read_text(encoding="utf-8"))
    return PROBE.format(
        includes="\n".join(f'#include "{name}"' for name in includes),
        variables="\n".join(VARIABLE.format(number=i, name=name) for i, name in enumerate(names)),
    )


def sizes(ptx: str, count: int) -> list[int]:
    """In bytes, in the order of the names."""
    found = dict(re.findall(r"\.u32 shared_(\d+)(?: = (\d+))?;", ptx))
    return [int(found[str(i)] or 0) for i in range(count)]
