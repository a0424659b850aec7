"""The kernels of an optimizer's step, in one pass over all parameters.

Chunks are numbered through all parameters, and a program takes a range of them, so it loads what a
parameter's elements share once. A chunk is BLOCKS blocks of a moment. Each block is processed in two halves,
of which a lane holds four consecutive elements: loads of all dtypes are coalesced, and one warp reduces a
block's absmax.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...ops.optim import STATE_BLOCK
from ..core.dropout import philox_words
from ..core.launch import targets_ptx
from ..nf4.nf4 import max_magnitude, safe_reciprocal
from .dynamic_codes import code_value, nearest_code

BLOCKS = tl.constexpr(4)  # one per warp
BLOCK = tl.constexpr(STATE_BLOCK)
HALF = tl.constexpr(STATE_BLOCK // 2)
CHUNK = tl.constexpr(4 * STATE_BLOCK)

# A parameter's words in the table.
PARAM, STATE1, STATE2, ABSMAX1, ABSMAX2, COMPENSATION, NUMEL, FIRST, FLAGS, GROUP, WORDS = map(
    tl.constexpr, range(11)
)
# Its flags: fp32, bf16, 8-bit moments, addresses aligned for vector loads.
IS_WIDE, IS_BF16, IS_CODED, IS_ALIGNED = map(tl.constexpr, (1, 2, 4, 8))
# A group's fp64 values, each in two words.
BETA1, BETA2, EPS, DECAY, DECAY_OF_GRADIENT, GROUP_NUMBERS = map(tl.constexpr, range(6))


class Parameter(NamedTuple):
    """A parameter inside kernels: addresses and values."""

    param: Any
    grad: Any
    state1: Any
    state2: Any
    absmax1: Any
    absmax2: Any
    compensation: Any  # 0: none
    flags: Any
    row: Any  # its index
    step: Any


@triton.jit
def program_share(table):
    """A program's first parameter and first chunk, and the next program's first chunk."""
    share = table.shares + 2 * tl.program_id(0)
    return tl.load(share), tl.load(share + 1), tl.load(share + 3)


@triton.jit
def load_double(words, index):
    low, high = tl.load(words + 2 * index), tl.load(words + 2 * index + 1)
    return (high << 32 | low).to(tl.float64, bitcast=True)


@triton.jit
def inverse_grad_scale(grad_scale_ptr):
    """1 / grad_scale."""
    scale = 1.0
    if grad_scale_ptr is not None:
        scale = tl.div_rn(1.0, tl.load(grad_scale_ptr))
    return scale


@triton.jit
def gradient_factor(extras, max_norm):
    """The factor of gradients, the same in every program."""
    if extras.factor is not None:
        factor = tl.load(extras.factor)
    else:
        factor = inverse_grad_scale(extras.grad_scale)
    if extras.sums is not None:
        at = tl.arange(0, HALF)
        squares = tl.zeros((HALF,), tl.float64)
        for first in range(0, tl.num_programs(0), HALF):
            squares += tl.load(extras.sums + first + at, mask=first + at < tl.num_programs(0), other=0.0)
        norm = tl.sqrt(tl.sum(squares, axis=0)).to(tl.float32)
        clip = tl.div_rn(1.0, norm + 1e-6) * max_norm
        factor = factor * tl.where(clip > 1.0, 1.0, clip)  # NaN stays
    return factor


@triton.jit
def coefficients(group, step, lr, LION: tl.constexpr):
    """Coefficients of the update that a parameter's elements share."""
    beta1, beta2 = load_double(group, BETA1), load_double(group, BETA2)
    rate, floor = lr, 0.0
    if not LION:
        which = tl.arange(0, 2)
        square = load_double(group, BETA1 + which)
        power = tl.full((2,), 1.0, tl.float64)
        left = step
        while left > 0:
            power = tl.where((left & 1) != 0, power * square, power)
            square = square * square
            left = left >> 1
        corrections = 1.0 - power
        c1 = tl.sum(tl.where(which == 0, corrections, 0.0), axis=0)
        c2 = tl.sqrt(tl.sum(tl.where(which == 1, corrections, 0.0), axis=0))
        rate = (-lr.to(tl.float64) * c2 / c1).to(tl.float32)
        floor = (load_double(group, EPS) * c2).to(tl.float32)
    decay = (1.0 - lr.to(tl.float64) * load_double(group, DECAY)).to(tl.float32)
    b1, w1 = beta1.to(tl.float32), (1.0 - beta1).to(tl.float32)
    b2, w2 = beta2.to(tl.float32), (1.0 - beta2).to(tl.float32)
    return b1, w1, b2, w2, rate, floor, decay, load_double(group, DECAY_OF_GRADIENT).to(tl.float32)


@triton.jit
def chunk_pointer(address, chunk, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the first element of a chunk."""
    place = (address + chunk * (CHUNK * TYPE.primitive_bitwidth // 8)).to(tl.pointer_type(TYPE))
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    return place


@triton.jit
def absmax_pointer(absmax, chunk):
    return (absmax + chunk * (BLOCKS * 4)).to(tl.pointer_type(tl.float32))


@triton.jit
def load_halves(a, b, chunk, at, left, whole, TYPE: tl.constexpr):
    """Both halves of a chunk of a and of b, 0 beyond the end. `whole`: the chunk is complete and aligned. All
    loads are issued before the first use."""
    at0, at1 = at, at + HALF
    if whole:
        place_a, place_b = chunk_pointer(a, chunk, TYPE, True), chunk_pointer(b, chunk, TYPE, True)
        a0, a1 = tl.load(place_a + at0), tl.load(place_a + at1)
        b0, b1 = tl.load(place_b + at0), tl.load(place_b + at1)
    else:
        place_a, place_b = chunk_pointer(a, chunk, TYPE, False), chunk_pointer(b, chunk, TYPE, False)
        there0, there1 = at0 < left, at1 < left
        a0 = tl.load(place_a + at0, mask=there0, other=0)
        a1 = tl.load(place_a + at1, mask=there1, other=0)
        b0 = tl.load(place_b + at0, mask=there0, other=0)
        b1 = tl.load(place_b + at1, mask=there1, other=0)
    return a0, a1, b0, b1


@triton.jit
def store_halves(a, chunk, at, left, whole, values0, values1, TYPE: tl.constexpr):
    at0, at1 = at, at + HALF
    if whole:
        place = chunk_pointer(a, chunk, TYPE, True)
        tl.store(place + at0, values0)
        tl.store(place + at1, values1)
    else:
        place = chunk_pointer(a, chunk, TYPE, False)
        tl.store(place + at0, values0, mask=at0 < left)
        tl.store(place + at1, values1, mask=at1 < left)


@triton.jit
def is_finite(x):
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def from_16_bits(raw, is_bf16):
    """fp32 values of bf16 or fp16 bits (uint16)."""
    bf16 = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.where(is_bf16, bf16, raw.to(tl.float16, bitcast=True).to(tl.float32))


@triton.jit
def load_floats(a, b, chunk, at, left, whole, flags):
    """`load_halves` of the parameter's dtype, as fp32."""
    if (flags & IS_WIDE) != 0:
        a0, a1, b0, b1 = load_halves(a, b, chunk, at, left, whole, tl.float32)
    else:
        is_bf16 = (flags & IS_BF16) != 0
        raw_a0, raw_a1, raw_b0, raw_b1 = load_halves(a, b, chunk, at, left, whole, tl.uint16)
        a0, a1 = from_16_bits(raw_a0, is_bf16), from_16_bits(raw_a1, is_bf16)
        b0, b1 = from_16_bits(raw_b0, is_bf16), from_16_bits(raw_b1, is_bf16)
    return a0, a1, b0, b1


@triton.jit
def load_moments(t, codes, chunk, at, left, whole):
    state2 = t.state1 if codes[1] is None else t.state2
    if (t.flags & IS_CODED) != 0:
        m0, m1, v0, v1 = load_halves(t.state1, state2, chunk, at, left, whole, tl.uint8)
        block = tl.arange(0, BLOCKS)
        scale = tl.load(absmax_pointer(t.absmax1, chunk) + block, mask=block * BLOCK < left, other=0.0)[
            :, None
        ]
        m0, m1 = code_value(codes[0], m0) * scale, code_value(codes[0], m1) * scale
        if codes[1] is None:
            v0, v1 = m0, m1
        else:
            scale = tl.load(absmax_pointer(t.absmax2, chunk) + block, mask=block * BLOCK < left, other=0.0)[
                :, None
            ]
            v0, v1 = code_value(codes[1], v0) * scale, code_value(codes[1], v1) * scale
    else:
        m0, m1, v0, v1 = load_halves(t.state1, state2, chunk, at, left, whole, tl.float32)
    return m0, m1, v0, v1


@triton.jit
def square_root(x):
    """sqrt(x), within about half an ulp, without the slow path that `tl.sqrt_rn` has."""
    if targets_ptx():  # `tl.sqrt` would flush subnormals to 0
        about = tl.inline_asm_elementwise("sqrt.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        about = tl.sqrt(x)
    better = tl.fma(tl.fma(-about, about, x), 0.5 / about, about)
    return tl.where(is_finite(better), better, about)


@triton.jit
def divide(a, b):
    """a / b, within about half an ulp."""
    inverse = 1.0 / b
    about = a * inverse
    better = tl.fma(tl.fma(-about, b, a), inverse, about)
    return tl.where(is_finite(better), better, about)


@triton.jit
def stepped(shared, p, g, m, v, LION: tl.constexpr):
    """One step of values p, g, m, v. Bit-equal to the reference's roundings, as the kernel is launched with
    enable_fp_fusion=False."""
    b1, w1, b2, w2, rate, floor, decay, decay_of_gradient = shared
    g = tl.where(decay_of_gradient != 0.0, g + p * decay_of_gradient, g)
    p = p * decay
    if LION:
        u = m * b1 + g * w1
        p = p - tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u)) * rate
        m = m * b2 + g * w2
    else:
        m = m * b1 + g * w1
        v = v * b2 + (g * w2) * g
        p = p + divide(m, square_root(v) + floor) * rate
    return p, m, v


@triton.jit
def rounded(t, p, seed_ptr, chunk, HALVES: tl.constexpr):
    """p rounded to bf16 or fp16, as uint16. HALVES: 1 for the second half of the chunk."""
    raw = p.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    if seed_ptr is not None:
        row, quad = tl.arange(0, BLOCKS)[:, None], tl.arange(0, HALF // 4)[None, :]
        quad = chunk * (CHUNK // 4) + row * (BLOCK // 4) + HALVES * (HALF // 4) + quad
        w0, w1, w2, w3 = philox_words(seed_ptr, t.row, quad, t.step)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        bits = p.to(tl.uint32, bitcast=True) + (words >> 16)
        raw = tl.where(p == p, (bits >> 16).to(tl.uint16), raw)
    return tl.where((t.flags & IS_BF16) != 0, raw, p.to(tl.float16).to(tl.uint16, bitcast=True))


@triton.jit
def bf16_bits(x):
    return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)


@triton.jit
def write_params(t, p0, p1, seed_ptr, chunk, at, left, whole, COMPENSATED: tl.constexpr):
    if (t.flags & IS_WIDE) != 0:
        store_halves(t.param, chunk, at, left, whole, p0, p1, tl.float32)
    else:
        raw0, raw1 = rounded(t, p0, seed_ptr, chunk, 0), rounded(t, p1, seed_ptr, chunk, 1)
        store_halves(t.param, chunk, at, left, whole, raw0, raw1, tl.uint16)
        if COMPENSATED and t.compensation != 0:
            dropped0, dropped1 = (
                bf16_bits(p0 - from_16_bits(raw0, True)),
                bf16_bits(p1 - from_16_bits(raw1, True)),
            )
            store_halves(t.compensation, chunk, at, left, whole, dropped0, dropped1, tl.uint16)


@triton.jit
def write_codes(codes, address, absmax, chunk, at, left, whole, x0, x1, SIGNED: tl.constexpr):
    """Store a moment's codes and the absmax of each block."""
    largest = tl.maximum(max_magnitude(x0), max_magnitude(x1))
    inverse = safe_reciprocal(largest)[:, None]
    code0, code1 = nearest_code(codes, x0 * inverse, SIGNED), nearest_code(codes, x1 * inverse, SIGNED)
    store_halves(address, chunk, at, left, whole, code0.to(tl.uint8), code1.to(tl.uint8), tl.uint8)
    block = tl.arange(0, BLOCKS)
    tl.store(absmax_pointer(absmax, chunk) + block, largest, mask=block * BLOCK < left)


@triton.jit
def write_moments(t, codes, m0, m1, v0, v1, chunk, at, left, whole):
    if (t.flags & IS_CODED) != 0:
        counts0, counts1 = (at < left) & is_finite(m0), (at + HALF < left) & is_finite(m1)
        if codes[1] is not None:
            counts0, counts1 = counts0 & is_finite(v0), counts1 & is_finite(v1)
        m0, m1 = tl.where(counts0, m0, 0.0), tl.where(counts1, m1, 0.0)
        write_codes(codes[0], t.state1, t.absmax1, chunk, at, left, whole, m0, m1, True)
        if codes[1] is not None:
            v0, v1 = tl.where(counts0, v0, 0.0), tl.where(counts1, v1, 0.0)
            write_codes(codes[1], t.state2, t.absmax2, chunk, at, left, whole, v0, v1, False)
    else:
        store_halves(t.state1, chunk, at, left, whole, m0, m1, tl.float32)
        if codes[1] is not None:
            store_halves(t.state2, chunk, at, left, whole, v0, v1, tl.float32)


@triton.jit
def adamw_kernel(
    table, grads_ptr, step_ptr, lr_ptr, extras, codes, max_norm,
    LION: tl.constexpr, COMPENSATED: tl.constexpr,
):  # fmt: skip
    row, position, end = program_share(table)
    if extras.found_inf is not None:
        end = tl.where(tl.load(extras.found_inf) != 0.0, position, end)
    factor = gradient_factor(extras, max_norm)
    at = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, HALF)[None, :]
    while position < end:
        words = table.rows + row * WORDS
        first, numel = tl.load(words + FIRST), tl.load(words + NUMEL)
        flags, group = tl.load(words + FLAGS), tl.load(words + GROUP)
        grad, step = tl.load(grads_ptr + row), tl.load(step_ptr + row)
        shared = coefficients(table.groups + group * (2 * GROUP_NUMBERS), step, tl.load(lr_ptr + group), LION)
        t = Parameter(
            tl.load(words + PARAM), grad, tl.load(words + STATE1), tl.load(words + STATE2),
            tl.load(words + ABSMAX1), tl.load(words + ABSMAX2), tl.load(words + COMPENSATION),
            flags, row, step,
        )  # fmt: skip
        last_whole = tl.where((flags & IS_ALIGNED) != 0 and (grad & 15) == 0, numel // CHUNK, 0)
        stop = tl.minimum(first + tl.cdiv(numel, CHUNK), end)
        for number in range(position - first, stop - first):
            chunk = tl.cast(number, tl.int64)
            left = tl.minimum(numel - chunk * CHUNK, CHUNK).to(tl.int32)
            whole = chunk < last_whole
            p0, p1, g0, g1 = load_floats(t.param, grad, chunk, at, left, whole, flags)
            if COMPENSATED and t.compensation != 0:
                c0, c1, _, _ = load_halves(t.compensation, t.compensation, chunk, at, left, whole, tl.uint16)
                p0, p1 = p0 + from_16_bits(c0, True), p1 + from_16_bits(c1, True)
            m0, m1, v0, v1 = load_moments(t, codes, chunk, at, left, whole)
            p0, m0, v0 = stepped(shared, p0, g0 * factor, m0, v0, LION)
            p1, m1, v1 = stepped(shared, p1, g1 * factor, m1, v1, LION)
            write_params(t, p0, p1, extras.seed, chunk, at, left, whole, COMPENSATED)
            write_moments(t, codes, m0, m1, v0, v1, chunk, at, left, whole)
        position = stop
        row += 1


@triton.jit
def squares_kernel(table, grads_ptr, grad_scale_ptr, sums_ptr):
    """The fp64 sum of squares of a program's gradients / grad_scale."""
    row, position, end = program_share(table)
    scale = inverse_grad_scale(grad_scale_ptr)
    at = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, HALF)[None, :]
    squares = tl.zeros((BLOCKS, HALF), tl.float64)
    while position < end:
        words = table.rows + row * WORDS
        first, numel, flags = tl.load(words + FIRST), tl.load(words + NUMEL), tl.load(words + FLAGS)
        grad = tl.load(grads_ptr + row)
        last_whole = tl.where((grad & 15) == 0, numel // CHUNK, 0)
        stop = tl.minimum(first + tl.cdiv(numel, CHUNK), end)
        for number in range(position - first, stop - first):
            chunk = tl.cast(number, tl.int64)
            left = tl.minimum(numel - chunk * CHUNK, CHUNK).to(tl.int32)
            g0, g1, _, _ = load_floats(grad, grad, chunk, at, left, chunk < last_whole, flags)
            g0, g1 = g0.to(tl.float64) * scale, g1.to(tl.float64) * scale
            squares += g0 * g0 + g1 * g1
        position = stop
        row += 1
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit
def factor_kernel(extras, max_norm, out_ptr):
    factor = gradient_factor(extras, max_norm)
    if tl.program_id(0) == 0:
        tl.store(out_ptr, factor)
