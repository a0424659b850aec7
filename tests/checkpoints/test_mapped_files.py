"""Releasing the memory-mapped pages of a checkpoint, and never other memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors", reason="safetensors is not installed")
from safetensors import safe_open
from safetensors.torch import save_file

from peft_kernels.quantize.transformers.mapped_files import MappedFiles

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps of Linux"
)
SIZE = 1 << 20


def resident(tensor: Tensor) -> int:
    """Resident bytes of the mapping that holds a tensor."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            first, last = (int(address, 16) for address in head.split("-"))
            inside = first <= tensor.data_ptr() < last
        elif inside and head == "Rss:":
            found = int(line.split()[1]) * 1024
    return found


@pytest.fixture
def file(tmp_path: Path) -> str:
    values = torch.arange(SIZE, dtype=torch.float32)
    save_file({"a": values, "b": -values}, tmp_path / "some.safetensors")
    return str(tmp_path / "some.safetensors")


def test_released_pages_can_be_read_again(file: str) -> None:
    with safe_open(file, "pt", backend="mmap") as opened:
        a, b = (opened.get_slice(name)[...] for name in "ab")
        files, total = MappedFiles([file]), float(a.double().sum())
        assert resident(a) >= a.nbytes
        kept = resident(a) - a.nbytes
        files.release(a)
        assert resident(a) <= kept + 2 * 4096 + 65536, "but for its first and last page"
        assert float(a.double().sum()) == total
        assert torch.equal(b, -torch.arange(SIZE, dtype=torch.float32))


@pytest.mark.parametrize("known", [True, False])
def test_other_memory_is_kept(known: bool, file: str, tmp_path: Path) -> None:
    """Releasing anonymous memory would clear it."""
    files = MappedFiles([file] if known else [])
    other = str(tmp_path / "other.safetensors")
    save_file({"a": torch.ones(SIZE)}, other)
    with safe_open(file, "pt", backend="mmap") as opened, safe_open(other, "pt", backend="mmap") as others:
        anonymous, foreign = torch.ones(SIZE), others.get_slice("a")[...]
        foreign.add_(1)  # a private copy of the page, which differs from the file
        written = opened.get_slice("a")[...]
        for tensor in (anonymous, foreign, anonymous[:10], torch.empty(0), torch.empty(3, device="meta")):
            files.release(tensor)
        assert bool((anonymous == 1).all()) and bool((foreign == 2).all())
        assert torch.equal(written, torch.arange(SIZE, dtype=torch.float32))


def test_modified_neighbour_is_kept(file: str) -> None:
    with safe_open(file, "pt", backend="mmap") as opened:
        a, b = (opened.get_slice(name)[...] for name in "ab")
        b.fill_(7)
        MappedFiles([file]).release(a)
        assert bool((b == 7).all())
        assert torch.equal(a, torch.arange(SIZE, dtype=torch.float32))


def test_tensor_outside_a_mapping(file: str) -> None:
    tensor = torch.ones(SIZE)
    MappedFiles([file]).release(tensor)
    assert bool((tensor == 1).all())
