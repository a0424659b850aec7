"""Our kernels for bitsandbytes' 4-bit ops and optimizer steps, between `enable()` and `disable()`.

bitsandbytes registers kernels of its ops with torch.library. Ours are registered over them, so its functions,
modules and optimizers are unchanged. Calls that ours do not support (quantising to FP4, FP4 on GPUs, custom
tables, optimizers other than Adam and Lion) fall back to bitsandbytes' kernel. Written for version 0.50.2;
enable() refuses versions with other op schemas."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...core import dispatch
from ...core.backends import BACKENDS
from ...core.backends.base import DTYPES
from ...core.code_tables import BLOCKSIZES, dynamic_map
from ...core.formats import FORMATS, code_values
from ...core.registry import public_ops
from ...nf4.bitsandbytes_format import QUANT_TYPES
from . import optim
from .covers import has_kernels, is_table

ENVIRONMENT_VARIABLE = "PEFT_KERNELS_BITSANDBYTES"
NAMESPACE = "bitsandbytes"

_REPACKS = "support_avx512bf16_for_cpu"
"""Attribute of a Linear4bit: whether evaluation on the CPU may repack its weight."""
_FINDS_STATE = "fix_4bit_weight_quant_state_from_module"
"""Function of bitsandbytes.nn.modules that each forward calls first."""

Kernel = Callable[..., Any]


class Enabled:
    """The result of `enable`; leaving it as a context undoes `enable`."""

    def __init__(self, is_first: bool) -> None:
        self._is_first = is_first

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_first:
            disable()


def enable() -> Enabled:
    """Runs bitsandbytes' 4-bit ops and the steps of its Adam, AdamW and Lion on our kernels, on the CPU and
    on CUDA where available.

    Linear4bit then no longer repacks its weight in evaluation on a CPU (which rounds scales to bf16); a
    weight that was repacked before is restored at its next use, with rounded scales. Quantising NaN or Inf to
    NF4 raises ValueError. Optimizers keep their classes, states and state dicts. Everything else is
    unchanged. Calling it again has no effect; `disable` or the end of `with enable():` undoes it.

    Raises
    ------
    ImportError
        bitsandbytes is not installed.
    RuntimeError
        Its ops have other schemas, or no back end has kernels for this machine.
    """
    global _library
    if _library is not None:
        return Enabled(is_first=False)
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import modules

    _check_schemas()
    devices = [device for device in ("cpu", "cuda") if _has_back_end(device)]
    if not devices:
        raise RuntimeError(
            f"bitsandbytes' ops are unchanged, because no kernels are available:\n{dispatch.explain()}"
        )
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name, ours in _KERNELS.items():
        for device in devices:
            _register(library, name, ours, device.upper())
    if "cpu" in devices:
        modules.Linear4bit.support_avx512bf16_for_cpu = _Repacks(has_avx512bf16())
        _originals[_FINDS_STATE] = vars(modules)[_FINDS_STATE]
        setattr(modules, _FINDS_STATE, _find_state)
    _library = library
    return Enabled(is_first=True)


def disable() -> None:
    """Restores bitsandbytes' kernels. No effect if they are not replaced."""
    global _library
    if _library is None:
        return
    from bitsandbytes.nn import modules

    _library._destroy()
    _library = None
    if _originals:
        delattr(modules.Linear4bit, _REPACKS)
        setattr(modules, _FINDS_STATE, _originals.pop(_FINDS_STATE))


def enable_if_asked() -> None:
    """Entry point `bitsandbytes.backends`, called at the end of bitsandbytes' import: calls enable() if
    PEFT_KERNELS_BITSANDBYTES is 1. Raises ValueError unless it is 0, 1 or empty."""
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected 0 or 1, got {value!r}")
    if value == "1":
        enable()


def unpack(linear4bit: Any) -> None:
    """Undoes, in place, the repacking of a layer's weight by bitsandbytes' CPU inference. Scales stay
    rounded."""
    quant_state = linear4bit.weight.quant_state
    if not getattr(quant_state, "packing_format_for_cpu", False):
        return
    absmax = quant_state.absmax
    linear4bit.state_dict()  # converts the weight to its ordinary form
    if not quant_state.nested:
        quant_state.absmax = absmax.T.reshape(-1).float()  # which bitsandbytes 0.50 does not restore


_library: torch.library.Library | None = None
"""Owns our kernels while they are enabled."""
_originals: dict[str, Any] = {}

# Kernels. They return NotImplemented to fall back to bitsandbytes.


def _quantize(a: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> Any:
    if quant_type != "nf4" or not _covers(quant_type, blocksize, a.dtype, a.device):
        return NotImplemented
    packed, absmax = public_ops.quantize_nf4(a, blocksize)
    if not bool(torch.isfinite(absmax).all()):
        bad = a.numel() - int(torch.isfinite(a).sum())
        raise ValueError(f"A: expected finite values to quantise, got {bad} NaN or Inf among {a.numel()}")
    return packed.view(quant_storage).view(-1, 1), absmax


def _dequantize(
    a: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Any:
    if not _covers(quant_type, blocksize, dtype, a.device):
        return NotImplemented
    packed, scales = _packed(a, prod(shape)), _scales(absmax, prod(shape), blocksize)
    return public_ops.dequantize_nf4(packed, scales, None, None, _layout(quant_type, blocksize), shape, dtype)


def _dequantize_out(*args: Any) -> Any:
    *inputs, out = args
    result = _dequantize(*inputs)
    return result if result is NotImplemented else _write(out, result)


def _gemm(
    a: Tensor,
    b: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    q8: Tensor | None = None,
    code: Tensor | None = None,
    offset: Tensor | None = None,
) -> Any:
    if (
        not _covers(quant_type, blocksize, a.dtype, a.device)
        or len(shape) != 2
        or a.dim() == 0
        or a.shape[-1] != shape[1]
        or (bias is not None and bias.dtype not in (a.dtype, torch.float32))
    ):
        return NotImplemented
    numel = prod(shape)
    scales: tuple[Tensor, Tensor | None, Tensor | None]
    if q8 is None:
        scales = _scales(absmax, numel, blocksize), None, None
    elif code is None or offset is None or not is_table(code, dynamic_map):
        return NotImplemented
    else:
        scales = q8, absmax.float(), offset.float()
    layout = _layout(quant_type, blocksize)
    return dispatch.call("nf4_linear", a, _packed(b, numel), *scales, layout, shape[0], bias)


def _gemv(a: Tensor, b: Tensor, shape: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Any:
    # Two-dimensional scales: a weight that bitsandbytes repacked for its CPU kernel.
    quant_type = next((kind for kind in _quant_types(a.device) if is_table(code, _TABLES[kind])), None)
    if absmax.dim() != 1 or quant_type is None:
        return NotImplemented
    return _gemm(a, b, shape, absmax, blocksize, quant_type)


def _gemv_out(*args: Any) -> Any:
    *inputs, out = args
    result = _gemv(*inputs)
    return result if result is NotImplemented else _write(out, result)


_KERNELS: dict[str, Kernel] = {
    "quantize_4bit": _quantize,
    "dequantize_4bit": _dequantize,
    "dequantize_4bit.out": _dequantize_out,
    "gemm_4bit": _gemm,
    "gemv_4bit": _gemv,
    "gemv_4bit.out": _gemv_out,
    **optim.KERNELS,
}
_SCHEMAS = {
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) "
    "-> (Tensor, Tensor)",
    "dequantize_4bit": "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, "
    "ScalarType dtype) -> Tensor",
    "dequantize_4bit.out": "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, "
    "ScalarType dtype, Tensor! out) -> ()",
    "gemm_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) "
    "-> Tensor",
    "gemv_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    "gemv_4bit.out": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, "
    "Tensor! out) -> ()",
    **optim.SCHEMAS,
}


def _layout(quant_type: str, blocksize: int) -> int:
    return FORMATS[quant_type].layout(blocksize)


_TABLES = {kind: partial(code_values, _layout(kind, 0)) for kind in QUANT_TYPES}
"""The values of the codes on a device, by quantisation type."""


def _covers(quant_type: str, blocksize: int, dtype: torch.dtype, device: torch.device) -> bool:
    supported = quant_type in _quant_types(device)
    return supported and blocksize in BLOCKSIZES and dtype in DTYPES and has_kernels(device)


def _quant_types(device: torch.device) -> tuple[str, ...]:
    """Those of our kernels: on GPUs they have NF4's codes only."""
    return QUANT_TYPES if device.type == "cpu" else QUANT_TYPES[:1]


def _packed(stored: Tensor, numel: int) -> Tensor:
    """The bytes of `numel` values, stored as any dtype."""
    nbytes = (numel + 1) // 2
    if stored.dtype == torch.uint8 and stored.numel() == nbytes:
        return stored
    return stored.reshape(-1).view(torch.uint8)[:nbytes]


def _scales(absmax: Tensor, numel: int, blocksize: int) -> Tensor:
    blocks = -(-numel // blocksize)
    return (absmax if absmax.numel() == blocks else absmax.reshape(-1)[:blocks]).float()


def _write(out: Tensor, result: Tensor) -> None:
    if out.shape != result.shape or out.dtype != result.dtype:
        expected, got = f"{result.dtype} {tuple(result.shape)}", f"{out.dtype} {tuple(out.shape)}"
        raise ValueError(f"out: expected {expected}, got {got}")
    out.copy_(result)


def _has_back_end(device_type: str) -> bool:
    return any(one.device_type == device_type and one.probe() is None for one in BACKENDS.values())


# Registration.


def _check_schemas() -> None:
    ops = getattr(torch.ops, NAMESPACE)
    for name, schema in _SCHEMAS.items():
        op, _, overload = name.partition(".")
        found = getattr(getattr(ops, op, None), overload or "default", None)
        expected = torch._C.parse_schema(f"{NAMESPACE}::{name}{schema}")
        got = None if found is None else found._schema
        if str(got) != str(expected):
            version = importlib.metadata.version("bitsandbytes")
            raise RuntimeError(
                f"bitsandbytes {version}: expected the op {expected}, got {got}; nothing is changed"
            )


def _register(library: torch.library.Library, name: str, ours: Kernel, key: str) -> None:
    qualified = f"{NAMESPACE}::{name}"
    try:
        theirs = torch.library.get_kernel(qualified, key).call_boxed
    except RuntimeError:  # bitsandbytes has none
        theirs = None
    if theirs is not None and name.endswith(".out") and key == "CUDA":
        return  # theirs writes in place, ours would copy

    def kernel(keys: Any, *args: Any) -> Any:
        result = ours(*args)
        if result is not NotImplemented:
            return result
        if theirs is None:
            raise NotImplementedError(
                f"{qualified}: bitsandbytes has no kernel for {key}, and ours do not support the call"
            )
        return theirs(keys, *args)

    place = f"{NAMESPACE}/{name}/{key}"
    is_taken = place in torch.library._impls
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of an override
        library.impl(name, kernel, key, with_keyset=True, allow_override=True)
    if is_taken:  # destroying the library would drop their kernel too
        library._op_impls.remove(place)


# Linear4bit.


class _Repacks:
    """Replaces Linear4bit's attribute: False for NF4 and FP4, otherwise the layer's own value."""

    def __init__(self, by_default: bool) -> None:
        self._by_default = by_default

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        if layer is None:
            return self
        quant_state = getattr(layer.weight, "quant_state", None)
        if quant_state is not None and quant_state.quant_type in QUANT_TYPES:
            return False
        if torch.compiler.is_compiling():  # tracing reads the class attribute
            return self._by_default
        return layer.__dict__.get(_REPACKS, False)

    def __set__(self, layer: Any, value: Any) -> None:
        layer.__dict__[_REPACKS] = value


def _find_state(module: Any) -> None:
    """Restores a repacked weight before a forward uses it: repacked ones give no gradient."""
    _originals[_FINDS_STATE](module)
    quant_state = module.weight.quant_state
    if getattr(quant_state, "packing_format_for_cpu", False) and quant_state.quant_type in QUANT_TYPES:
        unpack(module)
