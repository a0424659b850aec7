"""Compute capabilities that CUDA code is compiled for, from TORCH_CUDA_ARCH_LIST and the cards present.

setup.py runs this file on its own, before the package can be imported, and compiles for what `chosen`
returns. The library stores that list, from which the back end reads it. Its words are "8.0", or "9.0+PTX"
where the library also holds PTX, which later cards compile when they load it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

Capability = tuple[int, int]

MINIMUM = (8, 0)
"""The kernels need bf16 tensor cores and asynchronous copies."""

ALL = ((8, 0), (9, 0), (10, 0), (12, 0))
"""The default without a card. Code for 8.0 also runs on 8.6 and 8.9; PTX serves later cards."""

NAMES = {
    "kepler": "3.5+PTX",
    "kepler+tesla": "3.7",
    "maxwell": "5.0 5.2+PTX",
    "maxwell+tegra": "5.3",
    "pascal": "6.0 6.1+PTX",
    "volta": "7.0+PTX",
    "volta+tegra": "7.2",
    "turing": "7.5+PTX",
    "ampere": "8.0 8.6+PTX",
    "ampere+tegra": "8.7",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
    "blackwell+tegra": "11.0",
}
"""Architecture names that torch's builds accept."""


def chosen(
    wanted: str, here: Collection[Capability], compiles: Collection[Capability]
) -> tuple[list[str], list[str]]:
    """The words to compile for, and a sentence for each word that was replaced or dropped.

    Parameters
    ----------
    wanted : str
        TORCH_CUDA_ARCH_LIST: numbers ("8.0", "9.0a", "9.0+PTX"), names ("Hopper") and "native", separated by
        spaces, semicolons or commas; empty is "native".
    here : collection of (major, minor)
        The cards that "native" stands for. Without any: all of `ALL` that are in `compiles`.
    compiles : collection of (major, minor)
        Targets of nvcc.

    Returns
    -------
    words : list of str
        Sorted and unique; empty where the kernels support none of the wanted ones.
    sentences : list of str

    Raises
    ------
    ValueError
        For an unknown word.
    """
    with_ptx: dict[Capability, bool] = {}
    sentences = []
    for word in _numbers(wanted, here, compiles):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)((?:\+ptx)*)", word)
        if found is None:
            raise ValueError(
                "TORCH_CUDA_ARCH_LIST: expected compute capabilities (8.0, 9.0a, 9.0+PTX), names (Ampere, "
                f"Ada, Hopper, Blackwell) or native, got {word!r}"
            )
        capability, suffix, ptx = (int(found[1]), int(found[2])), found[3], bool(found[4])
        number = _text(capability)
        if capability < MINIMUM:
            sentences.append(f"{number} is left out: the kernels need {_text(MINIMUM)} or later")
            continue
        if suffix:
            sentences.append(
                f"{number}{suffix} is compiled as {number}, which the same cards run: the one "
                "file that needs sm_90a is compiled for it with 9.0"
            )
        if capability not in compiles:
            earlier = [one for one in compiles if MINIMUM <= one < capability]
            if not earlier:
                sentences.append(f"{number} is left out: this nvcc does not compile for it")
                continue
            capability, ptx = max(earlier), True
            sentences.append(
                f"{number} is served by PTX of {_text(capability)}: this nvcc does not compile for it"
            )
        with_ptx[capability] = with_ptx.get(capability, False) or ptx
    return [_text(one) + "+PTX" * with_ptx[one] for one in sorted(with_ptx)], [*dict.fromkeys(sentences)]


def _numbers(wanted: str, here: Collection[Capability], compiles: Collection[Capability]) -> list[str]:
    """The words of the list in lower case, names replaced by their numbers."""
    cards = sorted({*here}) or [one for one in ALL if one in compiles]
    names = {**NAMES, "native": " ".join(map(_text, cards)) + "+PTX"}
    numbers: list[str] = []
    for word in re.split(r"[\s;,]+", wanted.strip(" ;,\t\n").lower() or "native"):
        name = word.removesuffix("+ptx")
        text = names.get(word) or (f"{names[name]}+ptx" if name in names else word)
        numbers += text.lower().split()
    return numbers


def gencode(words: Sequence[str]) -> list[str]:
    """nvcc's flags that compile for the words."""
    flags = []
    for word in words:
        number, _, ptx = word.partition("+")
        digits = number.replace(".", "")
        codes = ("sm", "compute") if ptx else ("sm",)
        flags += [f"-gencode=arch=compute_{digits},code={code}_{digits}" for code in codes]
    return flags


def unserved(capability: Capability, words: Sequence[str]) -> str | None:
    """Why a card of that compute capability cannot run code compiled for `words`, or None."""
    has = f"has compute capability {_text(capability)}"
    if capability < MINIMUM:
        return f"{has}, the kernels need {_text(MINIMUM)} or later"
    for word in words:
        number, _, ptx = word.partition("+")
        major, minor = (int(part) for part in number.split("."))
        if (major, minor) <= capability and (ptx or major == capability[0]):
            return None
    return f"{has}, for which there is no code: reinstall with TORCH_CUDA_ARCH_LIST={has.split()[-1]}"


def _text(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
