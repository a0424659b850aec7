"""Training over checkpoints in other owners' formats: the dense model's losses, in the bytes of the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from all_folders import EXPERTS, FOLDERS
from flow_models import adapted
from packed_models import KINDS, awq, gptq, packed_int4
from packed_training import assert_only_packed_bytes, assert_trains_as_dense
from transformers_models import read

each_kind = pytest.mark.parametrize("kind", FOLDERS)


def adapt(model: Any, dtype: torch.dtype | None) -> Any:
    experts = any(name.endswith(".experts") for name, _ in model.named_modules())
    options: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    if experts:
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if dtype == torch.float64 and experts:
        model.set_experts_implementation("eager")  # transformers' grouped GEMM has no fp64
    tuned = adapted(model, **options)
    return tuned if dtype is None else tuned.to(dtype)


@each_kind
def test_trains_as_dense(kind: str, tmp_path: Path) -> None:
    FOLDERS[kind].write(tmp_path)
    assert_trains_as_dense(read(tmp_path, dtype=torch.float32), adapt)


LONG: dict[str, Any] = {
    "gptq": lambda *size: gptq(*size, 128),
    "gptq v2": lambda *size: gptq(*size, 128, version=2),
    "awq": lambda *size: awq(*size, 128),
    "packed zeros": lambda *size: packed_int4(*size, 128, symmetric=False),
}
"""In groups of 128, as models are published: a zero point takes a byte, and half a byte in the file."""


@each_kind
def test_packed_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = EXPERTS.get(kind, kind)
    if form in LONG:
        monkeypatch.setitem(KINDS, form, dataclasses.replace(KINDS[form], pack=LONG[form]))
    FOLDERS[kind].write(tmp_path, hidden_size=512, intermediate_size=512, num_hidden_layers=1)
    assert_only_packed_bytes(read(tmp_path, dtype="auto"), tmp_path, adapt)
