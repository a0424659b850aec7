"""A fault in a checkpoint is reported in a sentence with the tensor's name; the model stays unchanged."""

from __future__ import annotations

import json
import math
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import INDEX, STATE, Net, change_json, change_tensors, tensors, write, write_checkpoint
from fuzz_checkpoints import same, use
from fuzz_checks import check_sentence
from torch import Tensor, nn

import peft_kernels as pk
import testing
from peft_kernels.checkpoints.folder import Checkpoint
from peft_kernels.checkpoints.header import CheckpointError, read_header
from peft_kernels.checkpoints.writer import ShardWriter

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def trained() -> Net:
    """A Net with other weights than the checkpoint's."""
    model = Net()
    for name, parameter in model.named_parameters():
        if "weight" in name and isinstance(parameter, pk.NF4Weight):
            dense = testing.tensor(*parameter.shape, seed=5)
            parameter.data = pk.NF4Weight.quantize(dense, 32, parameter.double_quant)
        else:
            parameter.data = torch.full_like(parameter, 0.25)
    return model


def refused(folder: Path, message: str, model: Any = None) -> None:
    """Asserts that loading raises `message` and changes nothing in the model."""
    model = model or trained()
    before = tensors(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        pk.load_checkpoint(model, folder)
    check_sentence(str(caught.value))
    after = tensors(model)
    assert before.keys() == after.keys() and all(same(before[name], after[name]) for name in before)


def test_valid_checkpoint_loads(folder: Path) -> None:
    model = trained()
    pk.load_checkpoint(model, folder)
    got, want = tensors(model), tensors(Net())
    assert all(same(got[name], want[name]) for name in want)
    use(model)


def edit(change: Callable[[dict[str, Tensor]], Any], file: str = FIRST) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / file, change)


def replaced(name: str, make: Callable[[Tensor], Tensor], file: str = FIRST) -> Callable[[Path], None]:
    return edit(lambda state: state.update({name: make(state[name])}), file)


def first_is(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def edit_blob(state: dict[str, Tensor], **changes: Any) -> None:
    name = f"up.weight.{STATE}"
    text = json.dumps(json.loads(bytes(state[name].tolist())) | changes)
    state[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)


def blob(**changes: Any) -> Callable[[Path], None]:
    """Changes fields of up.weight's quant_state JSON."""

    return edit(lambda state: edit_blob(state, **changes))


def header(change: Callable[[dict[str, Any]], Any], length: Callable[[int], int] | None = None) -> Any:
    """Changes the header of the first shard."""

    def damage(folder: Path) -> None:
        path = folder / FIRST
        data = path.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8:end])
        change(found)
        text = json.dumps(found).encode()
        stated_length = len(text) if length is None else length(len(data))
        path.write_bytes(struct.pack("<Q", stated_length) + text + data[end:])

    return damage


def raw(change: Callable[[bytes], bytes], file: str = FIRST) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return damage


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / INDEX, lambda found: change(found["weight_map"]))


def overlapping(found: dict[str, Any]) -> None:
    """Makes the last tensor begin inside the one before it."""
    entries = (entry for name, entry in found.items() if name != "__metadata__")
    entry = max(entries, key=lambda entry: entry["data_offsets"])
    entry["data_offsets"] = [place - 4 for place in entry["data_offsets"]]


UP = r"^up\.weight"
BLOB = UP + r"\.quant_state\.bitsandbytes__nf4: "
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "file truncated": (raw(lambda data: data[:-1]), FIRST + r": is truncated in up\.weight\.quant_state"),
    "file empty": (raw(lambda data: b""), FIRST + ": expected a safetensors file, got 0 bytes"),
    "file of zeros": (raw(lambda data: bytes(100)), FIRST + ": expected a header in JSON"),
    "file too long": (raw(lambda data: data + b"x"), FIRST + ": has 1 bytes after its last tensor"),
    "file missing": (lambda folder: (folder / SECOND).unlink(), SECOND + ": expected this file"),
    "header beyond the file": (
        header(lambda h: None, lambda size: 2 * size),
        "expected a header within the file's",
    ),
    "header huge": (header(lambda h: None, lambda size: 2**64 - 1), "got one of 18446744073709551615"),
    "header too short": (header(lambda h: None, lambda size: 20), "expected a header in JSON"),
    "header deep": (raw(lambda data: struct.pack("<Q", 90_000) + b"[" * 90_000), "expected a header in JSON"),
    "offsets overlap": (header(overlapping), r"up\.weight\.quant_state\S+ overlaps"),
    "offsets beyond": (
        header(lambda h: h["norm.bias"].update(data_offsets=[2**40, 2**40 + 192])),
        r"norm\.bias leaves a hole after|leaves a hole",
    ),
    "offsets backwards": (
        header(lambda h: h["norm.bias"].update(data_offsets=[192, 0])),
        r"norm\.bias: expected data_offsets \[begin, end\]",
    ),
    "shape overflows": (
        header(lambda h: h["norm.bias"].update(shape=[2**32, 2**32])),
        r"norm\.bias: expected 73786976294838206464 bytes for F32",
    ),
    "shape negative": (
        header(lambda h: h["norm.bias"].update(shape=[-48])),
        r"norm\.bias: expected a shape of numbers below 2\^63, got \[-48\]",
    ),
    "dtype unknown": (
        header(lambda h: h["norm.bias"].update(dtype="F31")),
        r"norm\.bias: expected a dtype of safetensors, got F31",
    ),
    "dtype of another size": (
        header(lambda h: h["norm.bias"].update(dtype="BF16")),
        r"norm\.bias: expected 96 bytes for BF16 of shape \[48\], got 192",
    ),
    "field missing": (
        header(lambda h: h["norm.bias"].pop("shape")), r"norm\.bias: expected dtype, shape and data_offsets",
    ),
    "name with a line break": (
        header(lambda h: h.update({"a\nb": h.pop("norm.bias")})),
        r"a\?b: expected a printable",
    ),
    "index leads out": (
        index(lambda names: names.update({"norm.bias": "../other.safetensors"})),
        r"norm\.bias: expected the name of a \.safetensors file, got \.\./other",
    ),
    "index names a ghost": (index(lambda names: names.update(ghost=FIRST)), "^ghost: the index says"),
    "index forgets": (index(lambda names: names.pop("norm.bias")), r"^norm\.bias: .*not in the index"),
    "tensor twice": (
        edit(lambda state: state.update({"norm.bias": torch.zeros(48)}), SECOND),
        r"^norm\.bias: it is in .* and in ",
    ),
    "key missing": (edit(lambda state: state.pop("norm.bias")), r"^norm\.bias: the index says"),
    "bias of another shape": (
        replaced("norm.bias", lambda t: t[:47].clone()), r"^norm\.bias: expected shape \(48,\), got \(47,\)",
    ),
    "bias of integers": (
        replaced("norm.bias", lambda t: t.to(torch.int32)),
        r"^norm\.bias: expected dtype torch\.float32, got",
    ),
    "packed short": (
        replaced("up.weight", lambda t: t[:-1].clone()), UP + r": expected 960 bytes .* got 959",
    ),
    "codes in wide integers": (
        replaced("up.weight", lambda t: t.to(torch.int16)),
        UP + r": expected two codes a byte, .* torch\.int16",
    ),
    "plain tensor for NF4": (
        edit(lambda state: [state.pop(n) for n in list(state) if n.startswith("up.weight.")]),
        UP + r"\.\w+: the index says",
    ),
    "scales' dtype": (
        replaced("up.weight.absmax", lambda t: t.float()), UP + r"\.absmax: expected dtype torch\.uint8",
    ),
    "second scales' dtype": (
        replaced("up.weight.nested_absmax", lambda t: t.to(torch.int32)),
        UP + r"\.nested_absmax: expected a floating dtype",
    ),
    "JSON of another dtype": (
        replaced(f"up.weight.{STATE}", lambda t: t.float()), BLOB + r"expected dtype torch\.uint8",
    ),
    "JSON endless": (
        replaced(f"up.weight.{STATE}", lambda t: torch.full((1 << 17,), 32, dtype=torch.uint8)),
        BLOB + "expected bitsandbytes' JSON, got 131072 bytes",
    ),
    "NaN in scales": (
        replaced("down.weight.absmax", first_is(math.nan), SECOND),
        r"^down\.weight\.absmax: expected finite scales of 0 or more, got 1 NaN, Inf or negative among 60",
    ),
    "Inf in scales": (
        replaced("down.weight.absmax", first_is(math.inf), SECOND),
        r"^down\.weight\.absmax: .* got 1",
    ),
    "negative scale": (
        replaced("down.weight.absmax", first_is(-0.5), SECOND),
        r"^down\.weight\.absmax: .* got 1",
    ),
    "NaN in second scales": (
        replaced("up.weight.nested_absmax", first_is(math.nan)),
        UP + r"\.nested_absmax: expected finite scales",
    ),
    "second scales overflow": (
        edit(lambda state: (
            first_is(3.4e38)(state["up.weight.nested_absmax"]), edit_blob(state, nested_offset=3e38)
        )),
        UP + r"\.nested_absmax: expected scales in the range of float32",
    ),
    "blocksize negative": (blob(blocksize=-64), UP + ": expected blocksize one of .* got -64"),
    "blocksize a fraction": (blob(blocksize=32.5), BLOB + ".*not integers"),
    "blocksize true": (blob(blocksize=True), BLOB + ".*not integers"),
    "sizes overflow": (blob(shape=[2**40, 2**40]), UP + r": expected 604462909807314587353088 bytes"),
    "size beyond any": (blob(shape=[0, 2**70]), UP + ": expected a shape"),
    "size of digits": (blob(shape=[0, 10**4000]), UP + ": expected a shape"),
    "shape no list": (blob(shape="40x48"), BLOB),
    "offset NaN": (blob(nested_offset=math.nan), BLOB + "expected a finite nested_offset .* got nan"),
    "offset infinite": (blob(nested_offset=math.inf), BLOB + "expected a finite nested_offset .* got inf"),
    "offset negative": (blob(nested_offset=-1e-3), BLOB + "expected a finite nested_offset"),
    "offset huge": (blob(nested_offset=10**4000), BLOB + "expected a finite nested_offset"),
    "offset true": (blob(nested_offset=True), BLOB + "expected a number nested_offset"),
    "nested_dtype": (blob(nested_dtype="int8"), BLOB + "expected nested_dtype"),
    "dtype a module": (blob(dtype="nn"), UP + ": expected dtype float32, bfloat16 or float16"),
    "foreign item": (
        edit(lambda state: state.update({"up.weight.more": torch.zeros(1)})),
        "more: (it is in|expected the items)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_fault_is_named(case: str, folder: Path) -> None:
    damage, message = CASES[case]
    damage(folder)
    refused(folder, message)


def test_other_parameter_names(folder: Path) -> None:
    model = trained()
    model.extra = nn.Linear(2, 2)
    refused(folder, r"^extra\.weight: the checkpoint has no tensor of this name", model)
    del model.extra
    del model.norm
    refused(folder, r"^norm\.(bias|weight): the model has no tensor of this name", model)
    pk.load_checkpoint(model, folder, strict=False)
    assert same(tensors(model)["up.weight"], tensors(Net())["up.weight"])


def test_other_layer_types(folder: Path) -> None:
    model = trained()
    model.up = nn.Linear(48, 40)
    refused(
        folder, r"^up\.weight: expected a plain tensor, got an NF4 weight \(quantize_model first\)", model
    )
    model.up = pk.nn.NF4Linear.from_linear(nn.Linear(40, 48))
    refused(folder, r"^up\.(weight|bias): expected shape \(48,( 40)?\)", model)


def test_dense_where_nf4_is_expected(tmp_path: Path) -> None:
    state = {name: t for name, t in tensors(Net()).items() if not name.startswith("up.weight.")}
    write(tmp_path / "model.safetensors", state | {"up.weight": torch.zeros(40, 48)})
    refused(tmp_path / "model.safetensors", r"^up\.weight: expected an NF4 weight, got a plain tensor")


def test_tied_weights_may_be_saved_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    write(tmp_path / "model.safetensors", {"a.weight": torch.ones(3, 3, dtype=torch.bfloat16)})
    pk.load_checkpoint(model, tmp_path)
    assert model["b"].weight is model["a"].weight and bool((model["b"].weight == 1).all())
    assert model["a"].weight.dtype == torch.float32


def test_file_truncated_while_it_is_read(folder: Path) -> None:
    """After its header was checked. Nothing is loaded."""
    checkpoint = Checkpoint.open(folder)
    raw(lambda data: data[:-2000])(folder)
    with pytest.raises(CheckpointError, match=r"up\.weight.*: expected \d+ bytes, got \d+"):
        for name in checkpoint:
            checkpoint[name]
    with pytest.raises(CheckpointError, match=r"up\.weight.*: expected \d+ bytes, got \d+"):
        for entry in checkpoint.entries.values():
            list(entry.pieces(1000))


@pytest.mark.parametrize("size", [1000, 100_000])
def test_full_disk(size: int, tmp_path: Path) -> None:
    """Uses a limit on file sizes. The write may fail only when the buffer is flushed, while another error is
    being raised."""
    path, limits = tmp_path / "a.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    tensor = torch.zeros(size, dtype=torch.uint8)

    def written(then: Exception | None = None) -> None:
        with ShardWriter(path, {"x": (torch.uint8, (size,))}, {}) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
            writer.write("x", tensor)
            if then is not None:
                raise then

    try:
        with pytest.raises(OSError, match="File too large") as caught:
            written()
        assert caught.value.filename == f"{path}.tmp"
        if size == 1000:
            with pytest.raises(ZeroDivisionError):
                written(ZeroDivisionError())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_duplicate_names_in_a_header(tmp_path: Path) -> None:
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = b'{"a":' + entry + b',"a":' + entry + b"}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    with pytest.raises(CheckpointError, match="a stands twice in the header"):
        read_header(path)
