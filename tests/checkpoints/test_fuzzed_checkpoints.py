"""Random checkpoints are refused in a sentence, or usable."""

from __future__ import annotations

import json
import logging
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_folders
import pytest
import torch
import transformers
from all_folders import EXPERTS
from checkpoint_damage import DAMAGE, STATE, WILD
from fuzz_checkpoints import EVERY, run
from fuzz_checks import check_sentence
from hypothesis import given
from hypothesis import strategies as st

import peft_kernels as pk
from peft_kernels.checkpoints.header import CheckpointError, read_header
from peft_kernels.core.formats import FORMATS
from peft_kernels.nf4 import bitsandbytes_format, packed_format
from peft_kernels.nf4.owners import OWNERS, mxfp4, nvfp4

PRINTABLE = [value for value in WILD if value != 10**5000]  # hypothesis cannot print it
JSON: Any = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.sampled_from(PRINTABLE)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(("dtype", "shape", "data_offsets", "__metadata__", "a", "a.absmax")),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(header=JSON, data=st.binary(max_size=24))
def test_random_header(header: Any, data: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    try:
        text = json.dumps(header).encode()
    except ValueError:  # an integer too long for Python to print
        return
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    try:
        entries, _ = read_header(path)
    except CheckpointError as error:
        check_sentence(str(error))
    else:
        assert sum(entry.read().nbytes for entry in entries.values()) == len(data)


@given(fields=JSON)
def test_random_quant_state(fields: Any) -> None:
    state = pk.NF4Weight.quantize(torch.ones(2, 32), 32).state_dict()
    try:
        text = json.dumps(fields).encode()
    except ValueError:
        return
    state[f"weight.{STATE}"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(ValueError, match="weight") as caught:
        pk.NF4Weight.from_state_dict(state)
    check_sentence(str(caught.value))


def test_fuzzer(tmp_path: Path) -> None:
    outcomes = run(range(400), tmp_path)
    kinds = {outcome.rpartition(" ")[0] for outcome in outcomes}
    assert kinds == {*DAMAGE, "edit_config"} and sum(outcomes.values()) == 400
    assert any(outcome.endswith("accepted") for outcome in outcomes)


def test_every_format_has_a_folder(tmp_path: Path) -> None:
    names = {folder.name for folder in fuzz_folders.folders(tmp_path)}
    assert names == {*FORMATS, *(f"of {owner}" for owner in OWNERS), *EXPERTS}


LAYERS = [number for number in range(1000) if number % EVERY != EVERY - 1]


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """Restores what the fuzzer silences, for the tests after it."""
    logs = transformers.utils.logging
    ours, verbosity, shows = (
        logging.getLogger("peft_kernels"),
        logs.get_verbosity(),
        logs.is_progress_bar_enabled(),
    )
    level = ours.level
    yield
    ours.setLevel(level)
    logs.set_verbosity(verbosity)
    if shows:
        logs.enable_progress_bar()


@pytest.fixture
def only_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damages tensors in every case, which finds a missing check of them soon."""
    for kind in DAMAGE.keys() - {"edit_tensor"}:
        monkeypatch.delitem(DAMAGE, kind)


@pytest.mark.usefixtures("only_tensors")
@pytest.mark.parametrize("format", FORMATS)
def test_fuzzer_finds_a_missing_check(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer fails when the check of scales, and of codes of NaN, is removed."""
    for module in (bitsandbytes_format, packed_format):
        monkeypatch.setattr(module, "check_scales", lambda *_: None)
    with pytest.raises(
        AssertionError, match=r"case \d+: AssertionError: (scales that no weight|weights that)"
    ):
        run(LAYERS, tmp_path, [format])


@pytest.mark.usefixtures("only_tensors")
def test_fuzzer_finds_a_missing_check_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_format, "expect", lambda *_: None)
    with pytest.raises(AssertionError, match=r"case \d+: "):
        run(LAYERS, tmp_path, ["nf4"])


@pytest.mark.usefixtures("only_tensors")
@pytest.mark.parametrize(("name", "module"), [("of mxfp4", mxfp4), ("of modelopt", nvfp4)])
def test_fuzzer_finds_a_missing_check_of_an_owner(
    name: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = fuzz_folders.folders(tmp_path, {name})
    monkeypatch.setattr(module, "check_scales", lambda *_: None)
    with pytest.raises(AssertionError, match="scales that no weight has"):
        for number in range(500):
            folder.case(tmp_path / "broken", random.Random(number))
