"""Fixes Triton's interpreter: bf16, which it truncates and whose bits tl.dot multiplies; fma, which it rounds
twice; numpy; speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton_pace import speed_up


def patch_interpreter() -> None:
    speed_up()
    np.seterr(all="ignore")  # kernels compute NaN and Inf in silence
    builder: Any = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        """Rounds to bf16 to nearest even, as cards do."""
        data, target = src.data, dst_type.scalar
        if src.dtype.scalar == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        if target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(data, np.float32))
            return interpreter.TensorHandle(values.bfloat16().view(torch.uint16).numpy(), target)
        return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(dst_type)), target)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return multiply(self, *wide, *rest)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = [t.data.astype(np.float64) for t in (x, y, z)]
        return interpreter.TensorHandle((wide[0] * wide[1] + wide[2]).astype(z.data.dtype), z.dtype.scalar)

    builder.create_fma = fma
    builder.cast_impl = cast
    builder.create_fp_to_fp = lambda self, src, dst_type, _rounding: cast(self, src, dst_type)
    builder.create_dot = dot

    # numpy no longer converts one-element arrays, such as loop bounds, to numbers.
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch

    # Every launch patches the language, and each helper call would search it again. The first call of a
    # module is enough, since it finds everything that Triton's own functions use.
    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call  # type: ignore[method-assign]
