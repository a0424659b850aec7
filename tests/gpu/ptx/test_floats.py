"""Arithmetic and comparisons of floats on the machine against the PTX ISA: 16-bit floats, single and two per
register, and subnormals under .ftz."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest

from ptx.by_hand import LANES, as_float, as_word, run


@dataclass(frozen=True)
class Format:
    """A 16-bit float format."""

    name: str
    fraction_bits: int

    @property
    def bias(self) -> int:
        return (1 << 14 - self.fraction_bits) - 1

    @property
    def infinity(self) -> int:
        return 0x7FFF >> self.fraction_bits << self.fraction_bits

    def value(self, bits: int) -> float:
        sign, magnitude = -1.0 if bits >> 15 else 1.0, bits & 0x7FFF
        if magnitude >= self.infinity:
            return sign * math.inf if magnitude == self.infinity else math.nan
        exponent, fraction = magnitude >> self.fraction_bits, magnitude % (1 << self.fraction_bits)
        if exponent:
            fraction += 1 << self.fraction_bits
        return sign * math.ldexp(fraction, max(exponent, 1) - self.bias - self.fraction_bits)

    def rounded(self, exact: Fraction) -> int:
        """Rounds to nearest, ties to even, with infinity as the next power of two."""
        low, high = 0, self.infinity
        while low < high:
            middle = (low + high) // 2
            # The midpoint of two values rounds to the even one.
            halfway = (self._whole(middle) + self._whole(middle + 1)) / 2
            if abs(exact) < halfway or (abs(exact) == halfway and middle % 2 == 0):
                high = middle
            else:
                low = middle + 1
        return low | (0x8000 if exact < 0 else 0)

    def _whole(self, magnitude: int) -> Fraction:
        if magnitude >= self.infinity:
            return Fraction(2) ** (self.bias + 1) * (1 if magnitude == self.infinity else 2)
        return Fraction(self.value(magnitude))

    def numbers(self) -> list[int]:
        """Values around all special ones, of both signs, and some in between."""
        one = self.bias << self.fraction_bits
        least = 1 << self.fraction_bits  # the smallest normal number
        some = [0, 1, 2, least - 1, least, one, one + 1, one + least + 3, self.infinity - 1, self.infinity]
        some += [self.infinity + 1, 0x7FFF, one - 7 * least + 5, one + 6 * least + 2, least // 2 + 1]
        return [bits | sign for bits in some for sign in (0, 0x8000)]


FORMATS = {"f16": Format("f16", 10), "bf16": Format("bf16", 7)}
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
NAN = 0x7FFF
"""The NaN that arithmetic produces."""


def least(a: float, b: float) -> float:
    """The minimum, where -0 < 0 and NaN is the largest."""
    return min((x for x in (a, b) if x == x), key=lambda x: (x, math.copysign(1.0, x)), default=math.nan)


def most(a: float, b: float) -> float:
    return -least(-a, -b)


def exact(of: Callable[..., Any], *operands: float) -> float | Fraction:
    """The unrounded result, as a Fraction unless it is 0, infinite or NaN."""
    if not all(map(math.isfinite, operands)):
        return float(of(*operands))
    return of(*map(Fraction, operands)) or float(of(*operands))


ARITHMETIC: dict[str, Callable[..., float | Fraction]] = {
    "add": lambda a, b: exact(operator.add, a, b),
    "add.rn": lambda a, b: exact(operator.add, a, b),
    "sub": lambda a, b: exact(operator.sub, a, b),
    "mul": lambda a, b: exact(operator.mul, a, b),
    "min": least,
    "max": most,
}


def bits_of(format: Format, result: float | Fraction) -> int:
    if isinstance(result, Fraction):
        return format.rounded(result)
    if result != result:
        return NAN
    if math.isinf(result):
        return format.infinity | (0x8000 if result < 0 else 0)
    return format.rounded(Fraction(result)) | (0x8000 if math.copysign(1.0, result) < 0 else 0)


def in_lanes(format: Format) -> Iterator[tuple[list[int], list[int]]]:
    """Yields pairs of operands as words, one per lane, with two values each."""
    numbers = format.numbers()
    halves = [(a, b) for a in numbers for b in numbers]
    halves += halves[: -len(halves) % (2 * LANES)]
    words = [(a | c << 16, b | d << 16) for (a, b), (c, d) in zip(halves[::2], halves[1::2], strict=True)]
    for first in range(0, len(words), LANES):
        a, b = zip(*words[first : first + LANES], strict=True)
        yield list(a), list(b)


def parts(word: int) -> tuple[int, int]:
    return word & 0xFFFF, word >> 16


@each_format
@pytest.mark.parametrize("opcode", ARITHMETIC)
def test_arithmetic(machine: ModuleType, opcode: str, format: Format) -> None:
    both = f"{opcode}.{format.name}x2 %r0, %r1, %r30;"
    single = (
        "mov.b32 {%h1, %h2}, %r1; mov.b32 {%h3, %h4}, %r30;"
        f"{opcode}.{format.name} %h1, %h1, %h3; {opcode}.{format.name} %h2, %h2, %h4;"
        "mov.b32 %r0, {%h1, %h2};"
    )
    for a, b in in_lanes(format):
        expected = []
        for words in zip(a, b, strict=True):
            low, high = (
                bits_of(format, ARITHMETIC[opcode](*map(format.value, pair)))
                for pair in zip(*map(parts, words), strict=True)
            )
            expected.append(low | high << 16)
        for body in (both, single):
            assert run(machine, body, words=a, others=b) == expected


@each_format
def test_fused_multiply_add(machine: ModuleType, format: Format) -> None:
    """Rounded once: sums with a tiny product, or with cancellation."""
    body = f"shf.l.wrap.b32 %r3, %r1, %r30, 16; fma.rn.{format.name}x2 %r0, %r1, %r30, %r3;"
    for a, b in in_lanes(format):
        expected = []
        for words in zip(a, b, strict=True):
            third = words[0] >> 16 | (words[1] & 0xFFFF) << 16
            low, high = (
                bits_of(format, exact(lambda x, y, z: x * y + z, *map(format.value, operands)))
                for operands in zip(*map(parts, (*words, third)), strict=True)
            )
            expected.append(low | high << 16)
        assert run(machine, body, words=a, others=b) == expected


def unordered(of: Callable[[float, float], bool]) -> Callable[[float, float], bool]:
    return lambda a, b: a != a or b != b or of(a, b)


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq,
    "ne": lambda a, b: a == a and b == b and a != b,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
    "equ": unordered(operator.eq),
    "neu": operator.ne,
    "ltu": unordered(operator.lt),
    "leu": unordered(operator.le),
    "gtu": unordered(operator.gt),
    "geu": unordered(operator.ge),
}


@each_format
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparison(machine: ModuleType, comparison: str, format: Format) -> None:
    select = "selp.b32 %r0, 1, 0, %p1; selp.b32 %r3, 2, 0, %p2; or.b32 %r0, %r0, %r3;"
    both = f"setp.{comparison}.{format.name}x2 %p1|%p2, %r1, %r30;"
    single = "mov.b32 {%h1, %h2}, %r1; mov.b32 {%h3, %h4}, %r30;" + "".join(
        f"setp.{comparison}.{format.name} %p{i}, %h{i}, %h{i + 2};" for i in (1, 2)
    )
    of = COMPARISONS[comparison]
    for a, b in in_lanes(format):
        expected = []
        for words in zip(a, b, strict=True):
            low, high = (of(*map(format.value, pair)) for pair in zip(*map(parts, words), strict=True))
            expected.append(low + 2 * high)
        for body in (both, single):
            assert run(machine, body + select, words=a, others=b) == expected


def test_a_comparison_of_two_needs_two_predicates(machine: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"expected two predicates, p\|q: setp\.lt\.f16x2 %p1, %r1, %r2"):
        run(machine, "setp.lt.f16x2 %p1, %r1, %r2;")


TINY, NEXT = 2.0**-127, 2.0**-126
"""A subnormal fp32, and the smallest normal one."""
FLUSHED: dict[str, tuple[tuple[float, ...], float, float]] = {
    # opcode: operands, the result with .ftz and without
    "abs": ((-TINY,), 0.0, TINY),
    "neg": ((TINY,), -0.0, -TINY),
    "add": ((-TINY, NEXT), NEXT, TINY),
    "sub": ((TINY, 0.0), 0.0, TINY),
    "mul": ((-0.5, NEXT), -0.0, -TINY),
    "fma.rn": ((TINY, 2.0**100, -0.0), 0.0, 2.0**-27),
    "min": ((-TINY, 1.0), -0.0, -TINY),
    "max": ((-1.0, TINY), 0.0, TINY),
    "ex2.approx": ((-127.0,), 0.0, TINY),
    "rcp.approx": ((-(2.0**127),), -0.0, -TINY),
    "div.full": ((TINY, 0.5), 0.0, NEXT),
}


@pytest.mark.parametrize("opcode", FLUSHED)
def test_subnormal_numbers(machine: ModuleType, opcode: str) -> None:
    """Under .ftz, subnormal operands and results are flushed to 0 of the same sign."""
    operands, flushed, kept = FLUSHED[opcode]
    given = "".join(f", 0f{as_word(x):08X}" for x in operands)
    for suffix, expected in ((".ftz", flushed), ("", kept)):
        found = run(machine, f"{opcode}{suffix}.f32 %f2{given}; mov.b32 %r0, %f2;")
        assert found == [as_word(expected)] * LANES, as_float(found[0])


@pytest.mark.parametrize("opcode", ["min", "max"])
def test_min_and_max_of_nan(machine: ModuleType, opcode: str) -> None:
    """The other operand; with .NaN, or if both are NaN, the canonical NaN."""
    nan, one, made = 0xFFC01234, as_word(1.0), 0x7FFFFFFF
    for suffix, a, b, expected in (
        ("", nan, one, one),
        ("", one, nan, one),
        ("", nan, nan, made),
        (".NaN", nan, one, made),
        (".NaN", one, nan, made),
    ):
        body = f"{opcode}{suffix}.f32 %f2, 0f{a:08X}, 0f{b:08X}; mov.b32 %r0, %f2;"
        assert run(machine, body) == [expected] * LANES


@pytest.mark.parametrize("opcode, units", [("rcp.approx", 1), ("ex2.approx", 2), ("div.full", 2)])
def test_approximations(machine: ModuleType, opcode: str, units: int) -> None:
    """Correctly rounded; or, if perturbed, off by what the ISA allows."""
    exact = {"rcp.approx": lambda x: 1 / x, "ex2.approx": lambda x: 2**x, "div.full": lambda x: x / 3}[opcode]
    numbers = [1.0 + i / 37 for i in range(LANES)]
    words = [as_word(x) for x in numbers]
    body = f"{opcode}.f32 %f2, %f1{', 0f40400000' if opcode == 'div.full' else ''}; mov.b32 %r0, %f2;"
    nearest = [as_word(exact(as_float(word))) for word in words]
    assert run(machine, body, words=words) == nearest
    try:
        machine.set_perturb_approximations(True)
        found = run(machine, body, words=words)
    finally:
        machine.set_perturb_approximations(False)
    off = {a - b for a, b in zip(found, nearest, strict=True)}
    assert off == {*range(-units, units + 1)}
    assert found[0] == nearest[0] or opcode == "div.full"
