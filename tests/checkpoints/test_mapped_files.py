"""Pages of a checkpoint's file are given back, and never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors", reason="safetensors is not installed")
from safetensors import safe_open
from safetensors.torch import save_file

from peft_kernels.quantize.transformers.mapped_files import MappedFiles

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")
SIZE = 1 << 20


def resident(tensor: Tensor) -> int:
    """Bytes of the mapping that holds a tensor which are in memory."""
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


def test_what_was_read_is_given_back_and_can_be_read_again(file: str) -> None:
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
def test_nothing_else_is_touched(known: bool, file: str, tmp_path: Path) -> None:
    """To give back memory that is no file's would be to clear it."""
    files = MappedFiles([file] if known else [])
    other = str(tmp_path / "other.safetensors")
    save_file({"a": torch.ones(SIZE)}, other)
    with safe_open(file, "pt", backend="mmap") as opened, safe_open(other, "pt", backend="mmap") as others:
        mine, theirs = torch.ones(SIZE), others.get_slice("a")[...]
        theirs.add_(1)  # a private copy of the page, which the file has not
        written = opened.get_slice("a")[...]
        for tensor in (mine, theirs, mine[:10], torch.empty(0), torch.empty(3, device="meta")):
            files.release(tensor)
        assert bool((mine == 1).all()) and bool((theirs == 2).all())
        assert torch.equal(written, torch.arange(SIZE, dtype=torch.float32))


def test_a_neighbour_that_was_written_to_keeps_what_was_written(file: str) -> None:
    with safe_open(file, "pt", backend="mmap") as opened:
        a, b = (opened.get_slice(name)[...] for name in "ab")
        b.fill_(7)
        MappedFiles([file]).release(a)
        assert bool((b == 7).all())
        assert torch.equal(a, torch.arange(SIZE, dtype=torch.float32))


def test_a_file_that_is_not_mapped(file: str) -> None:
    tensor = torch.ones(SIZE)
    MappedFiles([file]).release(tensor)
    assert bool((tensor == 1).all())
