"""Training over checkpoints in other owners' formats: the dense model's losses, in the bytes of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import adapted
from owned_folders import NVFP4, gpt_oss, nvfp4
from packed_training import assert_only_packed_bytes, assert_trains_as_dense
from transformers_models import read

Write = Callable[..., Any]
FOLDERS: dict[str, Write] = {"mxfp4": gpt_oss} | {
    owner: lambda folder, owner=owner, **options: nvfp4(folder, owner, **options) for owner in NVFP4
}
each_owner = pytest.mark.parametrize("owner", FOLDERS)


def adapt(model: Any, dtype: torch.dtype | None) -> Any:
    experts = model.config.model_type == "gpt_oss"
    options: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    if experts:
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if dtype == torch.float64 and experts:
        model.set_experts_implementation("eager")  # transformers' grouped GEMM has no fp64
    tuned = adapted(model, **options)
    return tuned if dtype is None else tuned.to(dtype)


@each_owner
def test_losses_of_20_steps(owner: str, tmp_path: Path) -> None:
    FOLDERS[owner](tmp_path)
    assert_trains_as_dense(read(tmp_path, dtype=torch.float32), adapt)


@each_owner
def test_packed_bytes(owner: str, tmp_path: Path) -> None:
    FOLDERS[owner](tmp_path, hidden_size=512, intermediate_size=512, num_hidden_layers=1)
    assert_only_packed_bytes(read(tmp_path, dtype="auto"), tmp_path, adapt)
