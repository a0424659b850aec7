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
    "$nf4": "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int layout",
    "$base": "Tensor weight, Tensor? absmax, Tensor? absmax2, Tensor? offset, int layout",
    "$bases": "Tensor[] weight, Tensor?[] absmax, Tensor?[] absmax2, Tensor?[] offset, int[] layout",
}
"""The schema arguments of a base weight: packed; packed or dense; one per layer. In Python they are one
`Base` named `base`, or a list of them named `bases`."""


class Base(NamedTuple):
    """The frozen weight of a linear layer, as ops take it."""

    weight: Tensor  # uint8, (n + 1) // 2 bytes, flat or (out, in / 2); or dense (out, in)
    absmax: Tensor | None = None  # scales, fp32 (nblocks,), or uint8 codes of them; None: the weight is dense
    # Double quantisation: fp32 (ceil(nblocks / 256),). Otherwise the values of the 256 codes of scales, fp32.
    absmax2: Tensor | None = None
    offset: Tensor | None = None  # fp32 (), of double quantisation
    layout: int = 0  # `formats.Format.layout`


def columns(bases: Sequence[Base]) -> list[list[Any]]:
    """Several base weights as the lists of arguments that ops take."""
    return [list(column) for column in zip(*bases, strict=True)] if bases else [[] for _ in Base._fields]


OPS: dict[str, type[Op]] = {}
"""All ops, by name."""
_PLAIN: Any = SimpleNamespace()


class Op:
    """One op. A subclass registers itself in `OPS`. `args` of its functions is a named tuple of a call's
    arguments."""

    name: ClassVar[str]
    schema: ClassVar[str]
    """torch's schema; a key of GROUPS is replaced by its arguments. An op that changes `Tensor(a!) x` or the
    tensors of `Tensor(a!)[] x` in place has no gradient and returns nothing: `-> ()`."""
    composite: ClassVar[bool] = False
    """Whether the reference, which calls ops of namespace `ops` and torch, serves back ends without a
    kernel."""

    @staticmethod
    def reference(ops: Any, args: Any) -> Any:
        """The op in plain torch, for any floating dtype and device. Run in fp64 it is the ground truth of
        tests. Written for clarity: weights are materialised."""
        raise NotImplementedError

    @staticmethod
    def fake(args: Any) -> Any:
        """Uninitialised results of the right shapes and dtypes."""
        raise NotImplementedError

    differentiable: ClassVar[tuple[str, ...]] = ()
    """Arguments that have a gradient."""
    saved_meta: ClassVar[tuple[str, ...]] = ()
    """Arguments and results saved for backward as shape and dtype only (`gradient.Like`). All other arguments
    are saved."""
    saves_all_with: ClassVar[str] = ""
    """A bool argument: where it is true, the arguments in `saved_meta` are saved too."""
    saved_outputs: ClassVar[tuple[str, ...]] = ()
    """Results saved for backward."""
    num_outputs: ClassVar[int] = 1
    """The first `num_outputs` results are returned to the caller; the others are only saved for backward and
    have no gradient."""
    rounding: ClassVar[tuple[str, ...]] = ()
    """fp32 arguments that `dispatch.call` can round first, as autocast rounds weights."""
    twice_differentiable: ClassVar[bool] = False
    """Whether backward consists of differentiable ops. If not, differentiating a gradient raises."""

    @staticmethod
    def backward(ops: Any, args: Any, results: Any, need: Any, dy: Any) -> dict[str, Any]:
        """Gradients by argument name, at least those that `need` marks. `dy` is the gradient of the first
        result; if that is a list, or with several `num_outputs`, a tuple of gradients, of which some are None
        where no loss depends on a result. What depends on those alone has the gradient None, as in torch.
        `ops`: the namespace to call."""
        raise NotImplementedError

    @staticmethod
    def flops(args: Any) -> int:
        """FLOPs of a call, given shapes instead of tensors."""
        raise NotImplementedError

    arguments: ClassVar[list[str]]
    """Names of the schema's arguments."""
    returns: ClassVar[list[str]]
    _named: ClassVar[Any]
    _group: ClassVar[tuple[int, bool] | None]

    def __init_subclass__(cls) -> None:
        taken, given = cls.full_schema().split(" -> ")
        cls.arguments, cls.returns = argument_names(taken), argument_names(given)
        group = re.search(r"\$(\w+)", cls.schema)
        names = argument_names(cls.schema.split(" -> ")[0])
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
        """A call's arguments as a named tuple."""
        if cls._group is not None:
            at, many = cls._group
            group = args[at : at + len(Base._fields)]
            whole = _bases(group) if many else Base(*group)
            args = (*args[:at], whole, *args[at + len(group) :])
        return cls._named(*args)

    @classmethod
    def rounded(cls, args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """A call's arguments, those in `rounding` cast to dtype."""
        found = list(args)
        for i in map(cls.arguments.index, cls.rounding):
            value = found[i]
            found[i] = [t.to(dtype) for t in value] if isinstance(value, (list, tuple)) else value.to(dtype)
        return found

    @classmethod
    def plain(cls, *args: Any) -> Any:
        """The reference, called like the op."""
        return cls.reference(_PLAIN, cls.named(args))


def _bases(lists: Sequence[Sequence[Any]]) -> list[Base]:
    first, *others = (len(values) for values in lists)
    if others != [first] * len(others):
        got = ", ".join(map(str, others))
        raise RuntimeError(f"{', '.join(Base._fields[1:])}: expected {first} of each like weight, got {got}")
    return [Base(*one) for one in zip(*lists, strict=True)]


def argument_names(declared: str) -> list[str]:
    """["x", "n"] for "(Tensor x, int n=0)"; [] for "Tensor" and "()"."""
    if not declared.startswith("(") or declared == "()":
        return []
    return [item.split()[-1].partition("=")[0] for item in declared[1:-1].split(", ")]
