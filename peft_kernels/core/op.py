"""An op: its schema, its reference in plain torch, its fake kernel and its gradient."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

GROUPS = {
    "$nf4": "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int blocksize",
    "$base": "Tensor weight, Tensor? absmax, Tensor? absmax2, Tensor? offset, int blocksize",
    "$bases": "Tensor[] weight, Tensor?[] absmax, Tensor?[] absmax2, Tensor?[] offset, int[] blocksize",
}
"""The arguments of schemas that are a base weight: NF4, NF4 or dense, and such a one for each layer. Python
code has a `Base` in their place, called `base`, or a list of these, called `bases`."""


class Base(NamedTuple):
    """The frozen weight of a linear layer, as ops take it."""

    weight: Tensor  # uint8, (n + 1) // 2 bytes, flat or (out, in / 2); or dense (out, in)
    absmax: Tensor | None = None  # fp32 (nblocks,), uint8 when double-quantised; None: the weight is dense
    absmax2: Tensor | None = None  # fp32 (ceil(nblocks / 256),), of double quantisation
    offset: Tensor | None = None  # fp32 (), of double quantisation
    blocksize: int = 0


def columns(bases: Sequence[Base]) -> list[list[Any]]:
    """Several base weights as the lists that ops take."""
    return [list(column) for column in zip(*bases, strict=True)] if bases else [[] for _ in Base._fields]


OPS: dict[str, type[Op]] = {}
"""All ops, by name."""
_PLAIN: Any = SimpleNamespace()


class Op:
    """One op; its subclasses are the table. What comes as `args` is a tuple of a call's arguments with the
    names of the schema."""

    name: ClassVar[str]
    schema: ClassVar[str]
    """In which a word of GROUPS stands for its arguments. `Tensor(a!) x` is changed in place,
    `Tensor(a!)[] x` each of a list; an op that does so has no gradient, and returns nothing: `-> ()`."""
    composite: ClassVar[bool] = False
    """Made of other ops, those of `meaning`'s namespace `ops` or torch's: no back end needs a kernel. One
    that has a kernel all the same uses it."""

    @staticmethod
    def meaning(ops: Any, args: Any) -> Any:
        """The op in plain torch, for any floating dtype (fp64 included: run so, it is the truth that kernels
        are judged against) and any device. Clarity before speed: weights are materialised."""
        raise NotImplementedError

    @staticmethod
    def fake(args: Any) -> Any:
        """Results of the right shapes and dtypes, with anything in them."""
        raise NotImplementedError

    differentiable: ClassVar[tuple[str, ...]] = ()
    """Arguments that have a gradient."""
    described: ClassVar[tuple[str, ...]] = ()
    """Tensors, among arguments and results, of which backward needs but shape and dtype: `gradient.Like`.
    Other arguments are saved."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Results that are saved."""
    leaving: ClassVar[int] = 1
    """How many results, the first ones, are for who calls. What is behind them leaves the op for nothing but
    `kept`: it has no gradient."""
    rounding: ClassVar[tuple[str, ...]] = ()
    """Arguments in fp32 that a call may have rounded first, as autocast rounds weights: `dispatch.call`."""
    twice_differentiable: ClassVar[bool] = False
    """Whether the gradient is made of differentiable ops. Else a gradient of it is refused."""

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Any) -> dict[str, Any]:
        """Gradients by the names of arguments, at least of those that `need` says. `dy` is the gradient of
        the first result, or a tuple of those of all that are `leaving`, some of them None; `ops` are to be
        called."""
        raise NotImplementedError

    @staticmethod
    def flops(args: Any) -> int:
        """What a call counts, of arguments with shapes in place of tensors."""
        raise NotImplementedError

    arguments: ClassVar[list[str]]
    """Names of the arguments, one by one."""
    returns: ClassVar[list[str]]
    _named: ClassVar[Any]
    _group: ClassVar[tuple[int, bool] | None]

    def __init_subclass__(cls) -> None:
        taken, given = cls.full_schema().split(" -> ")
        cls.arguments, cls.returns = _names(taken), _names(given)
        group = re.search(r"\$(\w+)", cls.schema)
        names = _names(cls.schema.split(" -> ")[0])
        cls._group = None
        if group is not None:
            cls._group = names.index("$" + group[1]), group[1] == "bases"
            names[cls._group[0]] = "bases" if group[1] == "bases" else "base"
        cls._named = namedtuple(cls.name, names)  # type: ignore[misc]
        OPS[cls.name] = cls
        setattr(_PLAIN, cls.name, cls.plain)

    @classmethod
    def full_schema(cls) -> str:
        return re.sub(r"\$\w+", lambda match: GROUPS[match[0]], cls.schema)

    @classmethod
    def named(cls, args: Sequence[Any]) -> Any:
        """A call's arguments by name."""
        if cls._group is not None:
            at, many = cls._group
            group = args[at : at + len(Base._fields)]
            whole = _bases(group) if many else Base(*group)
            args = (*args[:at], whole, *args[at + len(group) :])
        return cls._named(*args)

    @classmethod
    def rounded(cls, args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """A call's arguments, those of `rounding` in that dtype."""
        found = list(args)
        for i in map(cls.arguments.index, cls.rounding):
            value = found[i]
            found[i] = [t.to(dtype) for t in value] if isinstance(value, (list, tuple)) else value.to(dtype)
        return found

    @classmethod
    def plain(cls, *args: Any) -> Any:
        """The op in plain torch, as ops are called."""
        return cls.meaning(_PLAIN, cls.named(args))


def _bases(lists: Sequence[Sequence[Any]]) -> list[Base]:
    first, *others = (len(values) for values in lists)
    if others != [first] * len(others):
        got = ", ".join(map(str, others))
        raise RuntimeError(f"{', '.join(Base._fields[1:])}: expected {first} of each like weight, got {got}")
    return [Base(*one) for one in zip(*lists, strict=True)]


def _names(declared: str) -> list[str]:
    """Of "(Tensor x, int n)"; of "Tensor" and of "()" nothing."""
    if not declared.startswith("(") or declared == "()":
        return []
    return [item.split()[-1] for item in declared[1:-1].split(", ")]
