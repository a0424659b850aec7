"""Reads adapters for BERT, RoBERTa and similar models that AdapterHub's library (`adapters`, formerly
`adapter-transformers`) wrote, with our parameter names."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.header import CheckpointError, Entry, read_header, shown
from .config import AdapterConfig

CONFIG = "adapter_config.json"
_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False,
    "ln_before": False,
    "is_parallel": False,
    "scaling": 1.0,
    "residual_before_ln": True,
}
_SUPPORTED: dict[str, Any] = {
    "original_ln_after": True,
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
"""Fields with their only supported values."""
_IGNORED = re.compile(
    r"init_weights(_seed)?|adapter_residual_before_ln|inv_adapter_reduction_factor|hypercomplex_nonlinearity|"
    r"learn_phm|(factorized_|shared_|phm_)\w+"
)
"""Initialisation, and options of features that `_SUPPORTED` excludes."""
_KEY = re.compile(
    r"(?:\w+\.)?(encoder\.layer\.\d+\.(?:attention\.)?output)\.adapters\.(.+)\.(adapter_\w+(?:\.\d)?)\.(weight|bias)"
)


@dataclass
class Loaded:
    """A loaded tensor with the interface of `Entry`."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def read(self) -> Tensor:
        """A copy: tensors of a file may share a storage or be expanded."""
        return self.value.detach().clone(memory_format=torch.contiguous_format)


class Found(NamedTuple):
    name: str
    config: AdapterConfig
    entries: dict[str, Entry | Loaded]
    """Keyed by the last linear layer of the sublayer and our parameter name."""
    file: str


def read(folder: Path, about: Any) -> Found:
    """Reads the folder whose adapter_config.json is `about`.

    Raises CheckpointError for another kind of adapter or an unsupported option.
    """
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        expected = "one of AdapterHub's, with the fields of its config"
        raise CheckpointError(f"{CONFIG}: expected {expected}, got {shown(about)}")
    name, fields = about.get("name"), about["config"]
    if not isinstance(name, str):
        raise CheckpointError(f"{CONFIG}: expected a name, got {shown(name)}")
    options = _options(fields)
    file, tensors = _tensors(folder)
    entries = {}
    for key, entry in tensors.items():
        ours = _our_key(key, name, bool(fields.get("ln_before")))
        if ours is None:
            raise CheckpointError(f"{file}: {shown(key)}: expected parameters of adapter {shown(name)} only")
        entries[ours] = entry
    downs = [entry.shape for key, entry in entries.items() if key.endswith(".down")]
    if not downs or len(downs[0]) != 2 or not all(downs[0]):
        raise CheckpointError(f"{file}: expected adapter_down of shape (r, features), got {downs[:1]}")
    r, features = downs[0]
    try:
        config = AdapterConfig(**options)
        if config.bottleneck_size(features) != r:  # the library rounds down
            config = AdapterConfig(**options | {"reduction": features / r})
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: {shown(str(error))}") from error
    return Found(name, config, entries, file)


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an AdapterConfig."""
    required = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
    for field in required:
        if field not in fields:
            raise CheckpointError(f"{CONFIG}: expected {field}, as AdapterHub's bottlenecks have, got none")
    for field, value in fields.items():
        if field in _SUPPORTED and value != _SUPPORTED[field]:
            raise CheckpointError(
                f"{CONFIG}: {field}: expected {json.dumps(_SUPPORTED[field])}, the only supported value, got "
                f"{shown(value)}"
            )
        known = field in _SUPPORTED or field in _DEFAULTS or field in required
        if not known and not _IGNORED.fullmatch(field):
            raise CheckpointError(f"{CONFIG}: expected fields of AdapterHub's BnConfig, got {shown(field)}")
    got = _DEFAULTS | fields
    after_norm = bool(got["original_ln_before"]) and not got["is_parallel"]
    if after_norm and got["residual_before_ln"] is not True:
        raise CheckpointError(
            f"{CONFIG}: residual_before_ln: expected true, the only supported value, got "
            f"{shown(got['residual_before_ln'])}"
        )
    for field in ("scaling", "reduction_factor"):
        if not isinstance(got[field], (int, float)):
            raise CheckpointError(f"{CONFIG}: {field}: expected one number, got {shown(got[field])}")
    return {
        "attention": got["mh_adapter"],
        "feed_forward": got["output_adapter"],
        "parallel": got["is_parallel"],
        "reduction": got["reduction_factor"],
        "activation": got["non_linearity"],
        "scaling": got["scaling"],
        "norm": got["ln_before"],
        "after_norm": after_norm,
    }


def _our_key(key: str, name: str, norm: bool) -> str | None:
    """Our name of a parameter, or None. The norm appears twice: under its own name and in adapter_down."""
    match = _KEY.fullmatch(key)
    if match is None or match[2] != name:
        return None
    module, kind = match[3], match[4]
    if module == "adapter_up":
        part = "up"
    elif module == f"adapter_down.{int(norm)}":
        part = "down"
    elif norm and module in ("adapter_norm_before", "adapter_down.0"):
        return f"{match[1]}.dense.norm_{kind}"
    else:
        return None
    return f"{match[1]}.dense.{part}{'_bias' * (kind == 'bias')}"


def _tensors(folder: Path) -> tuple[str, dict[str, Any]]:
    found = next((name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: expected {' or '.join(_FILES)}, got neither")
    if found == _FILES[0]:
        return found, dict(read_header(folder / found)[0])
    _check_stored(folder / found)
    try:
        loaded = torch.load(folder / found, map_location="cpu", weights_only=True)  # runs no code of the file
    except Exception as error:
        raise CheckpointError(
            f"{found}: expected tensors that torch.load(weights_only=True) reads"
        ) from error
    if not isinstance(loaded, dict) or not all(torch.is_tensor(value) for value in loaded.values()):
        raise CheckpointError(f"{found}: expected a dict of tensors, got {type(loaded).__name__}")
    for key, value in loaded.items():
        got = _other_form(value)
        if got:
            raise CheckpointError(f"{found}: {shown(str(key))}: expected a dense tensor, got {got}")
    return found, {str(key): Loaded(value) for key, value in loaded.items()}


def _check_stored(path: Path) -> None:
    """Refuses compressed records: torch.save writes none, and they may expand a thousandfold."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(one.compress_type == zipfile.ZIP_STORED for one in archive.infolist())
    except (OSError, zipfile.BadZipFile):  # torch.load reports it, or reads the legacy format
        return
    if not stored:
        raise CheckpointError(f"{path.name}: expected a file of torch.save, got compressed records")


def _other_form(value: Tensor) -> str:
    """What kind of tensor this is, or "" for an ordinary dense one."""
    if value.is_nested:
        return "a nested one"
    if value.layout != torch.strided:
        return f"one of layout {value.layout}"
    if value.is_quantized or value.is_meta:
        return "a quantised one" if value.is_quantized else "one without values"
    return ""
