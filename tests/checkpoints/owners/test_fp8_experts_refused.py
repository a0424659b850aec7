"""Mixtures of experts in FP8 that cannot be read: loading, `inspect` and `plan` say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import change_tensors
from experts_folders import EXPERTS, in_file, make_moe
from owned_folders import FILE
from torch import Tensor
from transformers_models import read

from peft_kernels.cli.main import main

Captured = pytest.CaptureFixture[str]
Change = Callable[[dict[str, Tensor]], Any]
NONE = "expected this tensor of a packed weight, got none"
KINDS = ("qwen", "mixtral")
SEVERAL = ("no last expert", "no scales at all")
"""With several faults, of which loading names one by the model's names."""


def _as(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda t: t.update({name: change(t[name]).contiguous()})


def _without(start: str) -> Change:
    return lambda t: [t.pop(name) for name in [*t] if name.startswith(start)]


def _dense(name: str) -> Change:
    return lambda t: (t.pop(f"{name}_scale_inv"), t.update({name: t[name].bfloat16()}))


def _last(t: dict[str, Tensor], kind: str) -> None:
    for layer in range(3):
        _without(in_file(kind, 3, layer))(t)


def broken(kind: str) -> dict[str, tuple[Change, str]]:
    gate, up, down = (f"{in_file(kind, 1, layer)}.weight" for layer in range(3))
    first, last = f"{in_file(kind, 0, 0)}.weight", f"{in_file(kind, 3, 1)}.weight"
    weight = f"{EXPERTS[kind]}.down_proj"
    return {
        "no scales": (lambda t: t.pop(f"{gate}_scale_inv"), f"{gate}_scale_inv: {NONE}"),
        "no codes": (lambda t: t.pop(down), f"{down}: {NONE}"),
        "no layer": (_without(in_file(kind, 1, 1)), f"{up}: {NONE}"),
        "no last layer": (_without(in_file(kind, 3, 1)), f"{last}: {NONE}"),
        "no kind of layer": (
            lambda t: [_without(in_file(kind, e, 0))(t) for e in range(4)],
            f"{first}: {NONE}",
        ),
        "no last expert": (
            lambda t: _last(t, kind),
            f"{weight}: expected shape (4, 128, 128), got (3, 128, 128)",
        ),
        "no scales at all": (
            lambda t: [
                t.pop(f"{in_file(kind, e, layer)}.weight_scale_inv") for e in range(4) for layer in (0, 1)
            ],
            f"{first}_scale_inv: {NONE}",
        ),
        "a dense layer": (_dense(up), f"{up}_scale_inv: {NONE}"),
        "fewer rows": (
            _as(up, lambda x: x[:64]),
            f"{up}: expected shape (128, 128) in blocks of 128, as {in_file(kind, 0, 1)}.weight has it, got "
            "shape (64, 128) in blocks of 128",
        ),
        "other scales": (
            _as(f"{down}_scale_inv", lambda x: x.repeat(2, 1)),
            f"{down}_scale_inv: expected shape (1, 1), got (2, 1)",
        ),
        "E5M2": (
            _as(gate, lambda x: x.view(torch.float8_e5m2)),
            f"{gate}: expected dtype torch.float8_e4m3fn, got torch.float8_e5m2",
        ),
        "NaN": (
            lambda t: t[gate].view(torch.uint8)[5, 6:7].fill_(127),
            f"{gate}: expected codes of finite values, got 1 NaN among 16384",
        ),
        "NaN scale": (
            lambda t: t[f"{down}_scale_inv"].fill_(torch.nan),
            f"{down}_scale_inv: expected finite scales, got 1 NaN or Inf among 1",
        ),
    }


def assert_refused(
    folder: Path, capsys: Captured, expected: str, planned: bool = True, only: bool = True
) -> None:
    with pytest.raises(ValueError) as caught:
        read(folder)
    assert str(caught.value) == expected
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    found = [re.sub(", as [A-Za-z0-9]* has it", "", fault) for fault in faults]
    assert found == [expected] if only else expected in found
    assert main(["plan", str(folder)]) == planned
    assert not planned or capsys.readouterr().err.strip() == f"peft-kernels: {expected}"


@pytest.mark.parametrize("what", broken("qwen"))
def test_damaged(what: str, tmp_path: Path, capsys: Captured) -> None:
    for kind in KINDS if what not in SEVERAL else KINDS[:1]:
        make_moe(tmp_path / kind, kind)
        change, expected = broken(kind)[what]
        change_tensors(tmp_path / kind / FILE, change)
        assert_refused(tmp_path / kind, capsys, expected, what != "NaN", what not in SEVERAL)


def test_scales_of_one_expert_alone(tmp_path: Path) -> None:
    """Of activations: others would be taken for its."""
    make_moe(tmp_path, "qwen", "fp8 static")
    name = f"{in_file('qwen', 2, 1)}.activation_scale"
    change_tensors(tmp_path / FILE, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"^{name}: {NONE}$"):
        read(tmp_path)


@pytest.mark.parametrize("size", [64, 192])
def test_blocks_of_two_layers(size: int, tmp_path: Path, capsys: Captured) -> None:
    make_moe(tmp_path, "qwen", moe_intermediate_size=size)
    expected = (
        f"{in_file('qwen', 0, 0)}.weight: expected a multiple of 128 output features, since "
        f"{EXPERTS['qwen']}.gate_up_proj has its rows and others, got {size}"
    )
    assert_refused(tmp_path, capsys, expected)


def test_hidden_sizes_of_no_whole_blocks(tmp_path: Path) -> None:
    """They are no fault: rows of one layer alone share them."""
    made = make_moe(tmp_path, "qwen", hidden_size=192)
    weight = read(tmp_path).get_parameter(f"{EXPERTS['qwen']}.down_proj")
    expected = torch.stack([made.dense[f"{in_file('qwen', e, 2)}.weight"] for e in range(4)])
    assert torch.equal(weight.dequantize(torch.float32), expected)


def test_numbers_of_experts(tmp_path: Path, capsys: Captured) -> None:
    """A wild one is refused at once."""
    make_moe(tmp_path, "qwen")
    old = f"{in_file('qwen', 3, 0)}.weight"
    new = old.replace(".3.", ".999999999.")
    change_tensors(tmp_path / FILE, lambda t: t.update({new: t.pop(old)}))
    with pytest.raises(ValueError, match=f"^{old}: {NONE}$"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["qwen", "deepseek"])
def test_plan(kind: str, tmp_path: Path, capsys: Captured) -> None:
    """To the byte; routers, which transformers has in fp32, as bf16."""
    made = make_moe(tmp_path, kind)
    assert main(["plan", str(tmp_path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["methods"]["qlora"]["weights"]
    model = read(tmp_path, dtype="auto")
    routers = sum(t.numel() for n, t in made.tensors.items() if n.endswith("mlp.gate.weight"))
    wide = 2 * routers if kind == "deepseek" else 0
    assert planned == sum(parameter.nbytes for parameter in model.parameters()) - wide
