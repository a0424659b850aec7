"""The hash of a tensor's bits on CUDA is that of torch's functions."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import testing
from peft_kernels.core import fingerprint


@pytest.mark.parametrize("count", [0, 1, 31, 256, 257, 5000, 20_000])
def test_the_hash_is_the_same(extension: ModuleType, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    words = testing.tensor(2 * count).view(torch.int64)
    got = torch.ops.peft_kernels_ptx_library.bits_hash(words)
    assert got.dtype == torch.int64 and got.dim() == 0
    monkeypatch.setattr(fingerprint, "NAMESPACE", "nothing_compiled")
    assert torch.equal(got, fingerprint.bits_hash(words))


def test_each_bit_and_each_place_counts(extension: ModuleType) -> None:
    """Also past the words that all threads read once."""
    words = testing.tensor(2 * 5000).view(torch.int64)
    before = torch.ops.peft_kernels_ptx_library.bits_hash(words)
    for i in (0, 255, 4096, 4999):
        changed, swapped = words.clone(), words.clone()
        changed[i] ^= 1 << 40
        swapped[[i, 7]] = words[[7, i]]
        for other in (changed, swapped):
            assert not torch.equal(torch.ops.peft_kernels_ptx_library.bits_hash(other), before), i


def test_words_of_another_layout_are_refused(extension: ModuleType) -> None:
    for words in (torch.ones(4, 4, dtype=torch.int64).t(), torch.ones(4)):
        with pytest.raises(RuntimeError, match="words: expected"):
            torch.ops.peft_kernels_ptx_library.bits_hash(words)
