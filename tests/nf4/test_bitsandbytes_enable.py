"""`enable` switches all of bitsandbytes' ops to our kernels, or none, and `disable` restores them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_layers import bnb
from fresh_process import Python

from peft_kernels.integrations.bitsandbytes import disable, enable
from peft_kernels.integrations.bitsandbytes import ops as bitsandbytes_ops

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = tuple(bitsandbytes_ops._KERNELS)


def state() -> list[Any]:
    """What `enable` may change in torch and in bitsandbytes."""
    modules = bnb.nn.modules
    return [
        *(torch._C._dispatch_dump(f"bitsandbytes::{name}") for name in OPS),
        set(torch.library._impls),
        dict(vars(modules)),
        dict(vars(modules.Linear4bit)),
    ]


def test_enable_is_idempotent_and_disable_restores_everything() -> None:
    before = state()
    enable()
    once = state()
    assert all(a != b for a, b in zip(once[: len(OPS)], before, strict=False))
    with enable():
        assert state() == once
    assert state() == once, "the outer one holds on"
    disable()
    assert state() == before
    disable()
    assert state() == before


def test_error_inside_the_block_restores() -> None:
    before = state()
    with pytest.raises(KeyError), enable():
        raise KeyError
    assert state() == before


def test_each_device_key_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a GPU: ops are registered under the CUDA key too, and restored."""
    before = state()
    monkeypatch.setattr(bitsandbytes_ops, "_has_back_end", lambda device_type: device_type == "cuda")
    with enable():
        dumped = state()
        for name, now, then in zip(OPS, dumped, before, strict=False):
            assert "CUDA: " in now and "CUDA: " not in then, name
            assert now.count("\nCPU: ") == then.count("\nCPU: "), name
        assert dumped[-2:] == before[-2:], "layers on the CPU stay as they are"
    assert state() == before


def test_missing_kernels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setattr(bitsandbytes_ops, "_has_back_end", lambda _: False)
    with pytest.raises(
        RuntimeError, match="bitsandbytes' ops are unchanged, because no kernels are available"
    ):
        enable()
    assert state() == before


@pytest.mark.parametrize(
    "name,schema,got",
    [("gemm_4bit", "(Tensor A) -> Tensor", r"bitsandbytes::gemm_4bit\(Tensor A, Tensor B"),
     ("gemm_3bit", "(Tensor A) -> Tensor", "None"), ("gemm_4bit.other", "(Tensor A) -> Tensor", "None")],
    ids=["schema", "op", "overload"],
)  # fmt: skip
def test_other_bitsandbytes_version_changes_nothing(
    name: str, schema: str, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state()
    monkeypatch.setitem(bitsandbytes_ops._SCHEMAS, name, schema)
    expected = rf"bitsandbytes [\d.]+: expected the op bitsandbytes::{name}\(Tensor A\) -> Tensor, got {got}"
    with pytest.raises(RuntimeError, match=expected):
        enable()
    assert state() == before


def test_no_warning(python: Python) -> None:
    """In a fresh process, as torch warns of an override only once."""
    python(
        "import warnings, bitsandbytes, torch; warnings.simplefilter('error')\n"
        "from peft_kernels.integrations.bitsandbytes import disable, enable\n"
        "for _ in range(2): enable(); disable()\n"
        "with enable(): bitsandbytes.functional.quantize_4bit(torch.ones(2, 64), quant_type='nf4')"
    )


# The entry point


@pytest.mark.parametrize("value,is_enabled", [("1", True), ("0", False), ("", False)])
def test_environment_variable(value: str, is_enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setenv("PEFT_KERNELS_BITSANDBYTES", value)
    bitsandbytes_ops.enable_if_asked()
    assert (state() != before) == is_enabled
    disable()


def test_unknown_value_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setenv("PEFT_KERNELS_BITSANDBYTES", "yes")
    with pytest.raises(ValueError, match="PEFT_KERNELS_BITSANDBYTES: expected 0 or 1, got 'yes'"):
        bitsandbytes_ops.enable_if_asked()
    assert state() == before


def test_entry_point_runs_when_bitsandbytes_is_imported(tmp_path: Path, python: Python) -> None:
    """Through the entry point in pyproject.toml, written as an installation writes it."""
    text = (ROOT / "pyproject.toml").read_text()
    entries = re.search(r'\[project\.entry-points\."(.*)"\]\n(\w+) = "(.*)"\n', text)
    assert entries is not None
    group, name, target = entries.groups()
    folder = tmp_path / "peft_kernels-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: peft_kernels\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import bitsandbytes, torch\n"
        "torch.ops.bitsandbytes.quantize_4bit(torch.full((1, 64), torch.nan), 64, 'nf4', torch.uint8)"
    )
    with pytest.raises(AssertionError, match="A: expected finite values to quantise"):
        python(code, PEFT_KERNELS_BITSANDBYTES="1")


def test_without_bitsandbytes(python: Python) -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from peft_kernels.integrations.bitsandbytes import disable, enable\n"
        "disable()\ntry: enable()\nexcept ImportError as error: print(error)"
    )
    assert "bitsandbytes" in python(code).stdout
