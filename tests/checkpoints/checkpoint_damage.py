"""Small checkpoints with all kinds of tensors, and functions that damage them at random."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.checkpoints.header import read_header
from peft_kernels.checkpoints.writer import ShardWriter
from peft_kernels.core.formats import FORMATS
from peft_kernels.nf4.bitsandbytes_format import QUANT_TYPES
from peft_kernels.nf4.packed_format import METHOD

INDEX = "model.safetensors.index.json"
STATE = "quant_state.bitsandbytes__nf4"


def _sizes(format: str) -> tuple[tuple[int, int], ...]:
    """Even and odd ones, with blocks that cross rows, where the format has them."""
    return (
        ((40, 64), (7, 32), (48, 96)) if FORMATS[format].rows_have_blocks else ((40, 48), (7, 33), (48, 40))
    )


def _blocksizes(format: str) -> tuple[int, ...]:
    allowed = FORMATS[format].blocksizes
    return (32, 32, 32) if 32 in allowed else (allowed[0], allowed[-1], allowed[0])


class Net(nn.Module):
    """Packed weights, nested and not, and plain tensors."""

    def __init__(self, format: str = "nf4") -> None:
        super().__init__()
        self.format = format
        generator = torch.Generator().manual_seed(3)

        def layer(size: tuple[int, int], blocksize: int, nested: bool) -> nn.Module:
            dense = nn.Linear(size[1], size[0], bias=nested)
            with torch.no_grad():
                for parameter in dense.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            return pk.nn.NF4Linear.from_linear(dense, blocksize, nested, format=format)

        forms = _sizes(format), _blocksizes(format), (True, True, False)
        self.up, self.odd, self.down = map(layer, *forms)
        self.norm = nn.LayerNorm(48)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))


class Experts(nn.Module):
    """Weights of four experts, in the state dict format of transformers' modules."""

    def __init__(self, dense: Tensor, blocksize: int, nested: bool, format: str) -> None:
        super().__init__()
        self.out_features, self.in_features = dense.shape[1:]
        packed = pk.NF4Weight.quantize(dense, blocksize, nested, format=format)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight: Any = self.weight
        destination.update(weight.state_dict(prefix))

    def forward(self, x: Tensor) -> Tensor:
        """Sends half of the rows to the second expert and the others to the last one."""
        weight: Any = self.weight
        ends = torch.tensor([0, len(x) // 2, len(x) // 2, len(x)], dtype=torch.int32)
        return pk.ops.experts.experts_linear(x, ends, weight)


class Mixture(nn.Module):
    """Like `Net`, with several experts in each weight."""

    def __init__(self, format: str = "nf4") -> None:
        super().__init__()
        self.format = format
        generator = torch.Generator().manual_seed(3)

        def experts(size: tuple[int, int], blocksize: int, nested: bool) -> nn.Module:
            return Experts(torch.randn(4, *size, generator=generator), blocksize, nested, format)

        forms = _sizes(format), _blocksizes(format), (True, True, False)
        self.up, self.odd, self.down = map(experts, *forms)
        self.norm = nn.LayerNorm(48)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write(path: Path, state: dict[str, Tensor]) -> None:
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    with ShardWriter(path, layout, {"format": "pt"}) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)


def change_json(path: Path, change: Callable[[Any], Any] | None = None, **fields: Any) -> None:
    """Sets fields of the object in a JSON file, after `change` has changed it."""
    found = json.loads(path.read_text())
    if change is not None:
        change(found)
    path.write_text(json.dumps(found | fields))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors in a safetensors file."""
    state = {name: entry.read() for name, entry in read_header(path)[0].items()}
    change(state)
    write(path, state)


def write_checkpoint(folder: Path, model: nn.Module | None = None) -> Path:
    """Writes two shards, an index and a configuration to a new folder; of a `Net` by default."""
    folder.mkdir()
    state = tensors(model or Net())
    first = {name: t for name, t in state.items() if name.startswith(("up.", "norm."))}
    second = {name: t for name, t in state.items() if name not in first}
    shards = {f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate((first, second))}
    for file, part in shards.items():
        write(folder / file, part)
    names = {name: file for file, part in shards.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    ours = isinstance(model, Mixture) or getattr(model, "format", "nf4") not in QUANT_TYPES
    method = METHOD if ours else "bitsandbytes"
    quantization = {"quant_method": method, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


# Damage: each function takes the folder of a valid checkpoint.


def _shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _dumps(value: Any) -> str:
    """JSON with integers of any length, which `json.dumps` refuses."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(limit)


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else _dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def flip_bytes(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    # Half of them in the header, where they do most damage.
    end = len(data) if rng.random() < 0.5 else min(len(data), 2000)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(end)] = rng.randrange(256)
    path.write_bytes(data)


def truncate(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1))])


def lengthen(folder: Path, rng: random.Random) -> None:
    with _shard(folder, rng).open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 8, 4096))))


def lie_about_header(folder: Path, rng: random.Random) -> None:
    path = _shard(folder, rng)
    header, data = _parts(path)
    size = path.stat().st_size
    length = rng.choice((0, 1, size, size - 8, 2**31, 2**63, 2**64 - 1, 10**8, rng.randrange(size)))
    _join(path, header, data, length)


def deep_header(folder: Path, rng: random.Random) -> None:
    path = _shard(folder, rng)
    _, data = _parts(path)
    text = rng.choice(
        (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000, b'"' + b"\xff" * 50 + b'"', b"null")
    )
    _join(path, text, data)


WILD: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 31, 48, 64.0, 64.5),
    *(2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, 2**80, 10**5000),
    *(math.nan, math.inf, -math.inf, 1e308, -1e-30, True, False, None, "", "64", "nf4", "a\nb", "x" * 5000),
    *([], [1], [0, 2**62], [2**40, 2**40], [-40, -48], [40, 48, 1], {}, {"a": 1}),
    *("F32", "BF16", "U8", "I64", "float32", "int8", "Tensor", "nn", "float8_e4m3fn", "__class__"),
)


def _wild(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(WILD))


def edit_header(folder: Path, rng: random.Random) -> None:
    path = _shard(folder, rng)
    header, data = _parts(path)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(header))
        way = rng.randrange(5)
        if way == 0:
            header[name] = _wild(rng)
        elif way == 1 and isinstance(header[name], dict):
            header[name][rng.choice(("dtype", "shape", "data_offsets", "more"))] = _wild(rng)
        elif way == 2 and name != "__metadata__" and isinstance(header[name], dict):
            field = header[name].get(rng.choice(("shape", "data_offsets")))
            if isinstance(field, list) and field:
                field[rng.randrange(len(field))] = _wild(rng)
        elif way == 3:
            header[rng.choice((*header, "new", name + ".more", "lone.absmax", "a\nb", "x" * 3000))] = (
                header.pop(name)
            )
        else:
            header.pop(name)
    _join(path, header, data)


def _state(path: Path) -> dict[str, Tensor]:
    return {name: entry.read() for name, entry in read_header(path)[0].items()}


def edit_json(folder: Path, rng: random.Random) -> None:
    path = _shard(folder, rng)
    state = _state(path)
    name = rng.choice([name for name in state if ".quant_state." in name])
    numbers = json.loads(bytes(state[name].tolist()))
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice((*numbers, "nested_offset", "more"))
        if rng.random() < 0.15:
            numbers.pop(key, None)
        elif (
            key == "shape"
            and rng.random() < 0.5
            and isinstance(numbers.get("shape"), list)
            and numbers["shape"]
        ):
            numbers["shape"][rng.randrange(len(numbers["shape"]))] = _wild(rng)
        else:
            numbers[key] = _wild(rng)
    text = _dumps(numbers).encode()
    if rng.random() < 0.1:
        text = rng.choice((b"", b"{", text[:-3], b"[" * 60_000, rng.randbytes(150), b" " * 70_000))
    state[name] = torch.tensor(list(text), dtype=torch.uint8)
    write(path, state)


KINDS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
)


def edit_tensor(folder: Path, rng: random.Random) -> None:
    path = _shard(folder, rng)
    state = _state(path)
    scales = [name for name in sorted(state) if "absmax" in name or "scale" in name]
    name = rng.choice(scales if scales and rng.random() < 0.5 else sorted(state))
    tensor = state[name]
    way = rng.randrange(7)
    if way == 0:
        state[name] = tensor.view(-1)[: rng.randrange(tensor.numel() + 1)].clone()
    elif way == 1:
        state[name] = torch.cat((tensor.view(-1), tensor.view(-1)))
    elif way == 2:
        state[name] = tensor.to(rng.choice(KINDS))
    elif way == 3 and tensor.element_size() == 1 and tensor.numel():  # codes: also of NaN and Inf
        tensor.view(torch.uint8).view(-1)[rng.randrange(tensor.numel())] = rng.choice((0, 126, 127, 128, 255))
    elif way == 3 and tensor.is_floating_point() and tensor.numel():
        wild = (math.nan, math.inf, -math.inf, -1.0, -1e-30, 3e38, 1e-40)
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(wild)
    elif way == 4:
        del state[name]
    elif way == 5:
        state[name + rng.choice((".more", ".absmax", ".nested_absmax", ".quant_state.bitsandbytes__fp4"))] = (
            tensor.clone()
        )
    else:
        state[name] = tensor.reshape(rng.choice(((1, -1), (-1, 1), (-1,)))) if tensor.dim() else tensor[None]
    write(path, state)


def edit_index(folder: Path, rng: random.Random) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    names = index["weight_map"]
    name = rng.choice(sorted(names))
    way = rng.randrange(5)
    if way == 0:
        files = ("../other.safetensors", "/etc/passwd", "", "missing.safetensors", "config.json")
        names[name] = rng.choice((*files, 5, None, "a\0b", *names.values()))
    elif way == 1:
        del names[name]
    elif way == 2:
        names[name + ".more"] = names[name]
    elif way == 3:
        index["weight_map"] = _wild(rng)
    else:
        index = _wild(rng)
    path.write_text(_dumps(index))


def lose_file(folder: Path, rng: random.Random) -> None:
    rng.choice(sorted(folder.iterdir())).unlink()


DAMAGE: dict[str, tuple[Callable[[Path, random.Random], None], int]] = {
    "flip_bytes": (flip_bytes, 5),
    "truncate": (truncate, 2),
    "lengthen": (lengthen, 1),
    "lie_about_header": (lie_about_header, 1),
    "deep_header": (deep_header, 1),
    "edit_header": (edit_header, 4),
    "edit_json": (edit_json, 5),
    "edit_tensor": (edit_tensor, 5),
    "edit_index": (edit_index, 2),
    "lose_file": (lose_file, 1),
}
