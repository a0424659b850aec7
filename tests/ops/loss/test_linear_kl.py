"""linear_kl against its definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import weight_of, wide
from numbers_policy import each_dtype
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_kernels as pk
import testing
from peft_kernels.ops.loss import linear_kl

VOCABULARY = 300
TRAINED = {
    "frozen": ("hidden",),
    "nf4": ("hidden",),
    "trained": ("hidden", "weight", "bias"),
    "adapter": ("hidden", "lora_a", "lora_b"),
    "adapter-alone": ("lora_b",),
}
"""By kind of head: what has a gradient."""


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 5 rows, blocks of 2."""
    monkeypatch.setattr(linear_kl, "PIECE", 5 * VOCABULARY)
    monkeypatch.setattr(linear_kl, "BLOCK", 2 * VOCABULARY)


def head(kind: str, dtype: torch.dtype, features: int, cap: float | None = None, seed: int = 0) -> pk.Head:
    base = "nested" if kind in ("nf4", "adapter") else "dense"
    found = pk.Head(
        testing.tensor(3, 8, features, dtype=dtype, seed=seed),
        weight_of(base, VOCABULARY, features, dtype),
        testing.tensor(VOCABULARY, dtype=dtype, seed=seed + 3),
        logit_scale=0.7,
        softcap=cap,
    )
    if kind.startswith("adapter"):
        found.lora_a = testing.tensor(4, features, seed=4, scale=features**-0.5)
        found.lora_b = testing.tensor(VOCABULARY, 4, seed=5, scale=0.3)
        found.scaling = 0.5
    for name in TRAINED.get(kind, ()):
        getattr(found, name).requires_grad_()
    return found


def logits(of: pk.Head) -> Tensor:
    packed = isinstance(of.weight, pk.NF4Weight)
    z = F.linear(of.hidden, wide(of.weight).to(of.hidden.dtype) if packed else of.weight, of.bias)
    if of.lora_a is not None and of.lora_b is not None:
        z = z + of.scaling * (of.hidden.to(of.lora_a.dtype) @ of.lora_a.t() @ of.lora_b.t()).to(z.dtype)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * of.logit_scale
    return z if of.softcap is None else of.softcap * torch.tanh(z / of.softcap)


def defined(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    ls, lt = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    ps, pt = ls.exp(), lt.exp()
    mixture = ((1 - beta) * ps + beta * pt).log()
    forward, backward = (pt * (lt - mixture)).sum(-1), (ps * (ls - mixture)).sum(-1)
    if beta in (0, 1):
        return (forward, backward)[int(beta)], -(ps * ls).sum(-1)
    return beta * forward + (1 - beta) * backward, -(ps * ls).sum(-1)


def widened(of: pk.Head) -> pk.Head:
    tensors = {n: t for n, t in vars(of).items() if isinstance(t, (Tensor, pk.NF4Weight))}
    return pk.Head(**vars(of) | {n: wide(t).requires_grad_(t.requires_grad) for n, t in tensors.items()})


def results(student: pk.Head, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    factors = torch.linspace(0.5, 1.5, mask.numel()).view(mask.shape)
    leaves = [t for t in vars(student).values() if isinstance(t, Tensor) and t.requires_grad]
    return values.detach(), *torch.autograd.grad((values * mask * factors).sum(), leaves)


@each_dtype
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", TRAINED)
def test_equals_its_definition(dtype: torch.dtype, kind: str, beta: float) -> None:
    """Values and gradients; the teacher has another hidden size."""
    cap = 4.0 if kind in ("nf4", "trained") else None
    student, teacher = head(kind, dtype, 64, cap), head("nf4", dtype, 128, seed=9)
    teacher.hidden.requires_grad_(False)
    mask = testing.tensor(3, 8, seed=6) > -0.5
    options: dict[str, Any] = {"beta": beta, "temperature": 1.6}
    found, entropy = pk.linear_kl(student, teacher, mask, **options, reduction="none", entropy=True)
    assert found.dtype == torch.float32 and found.shape == mask.shape and not entropy.requires_grad
    assert not found[~mask].any() and not entropy[~mask].any()
    got = results(student, found, mask)
    own = defined(logits(student), logits(teacher).detach(), *options.values())
    plain = results(student, own[0] * mask, mask)
    student64 = widened(student)
    true = defined(logits(student64), logits(widened(teacher)).detach(), *options.values())
    truth = results(student64, true[0] * mask, mask)
    names = "divergence", *TRAINED[kind]
    for name, *values in zip(names, got, plain, truth, strict=True):
        testing.assert_close(*values, name, product=dtype)
    entropies = (t.detach() * mask for t in (own[1], true[1]))
    testing.assert_close(entropy, *entropies, "entropy", product=dtype)


def test_reductions_and_logits_of_a_teacher() -> None:
    student, teacher = head("frozen", torch.float32, 64), head("", torch.float32, 128, seed=9)
    mask = testing.tensor(3, 8, seed=6) > 0
    plain = teacher.hidden @ teacher.weight.t() + teacher.bias  # type: ignore[union-attr, operator]
    values = pk.linear_kl(student, teacher, mask, reduction="none")
    scaled = 0.7 * plain
    torch.testing.assert_close(pk.linear_kl(student, scaled, mask, reduction="none"), values)
    torch.testing.assert_close(pk.linear_kl(student, teacher, mask, reduction="sum"), values.sum())
    torch.testing.assert_close(pk.linear_kl(student, teacher, mask), values.sum() / mask.sum())
    every = pk.linear_kl(student, teacher, reduction="none")
    torch.testing.assert_close(every * mask, values)
    assert every.shape == mask.shape and every[~mask].all()
    nothing = pk.linear_kl(student, teacher, torch.zeros_like(mask), reduction="sum")
    assert nothing == 0 and not torch.autograd.grad(nothing, student.hidden)[0].any()
    assert pk.linear_kl(student, teacher, torch.zeros_like(mask)).isnan()


def test_of_itself_is_zero() -> None:
    student = head("frozen", torch.float32, 64)
    for beta in (0.0, 0.5, 1.0):
        found = pk.linear_kl(student, student, beta=beta, reduction="none")
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-6)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out


@pytest.mark.parametrize("kind", ["frozen", "adapter"])
def test_no_tensor_is_as_large_as_the_logits(kind: str) -> None:
    student, teacher = head(kind, torch.float32, 8), head("", torch.float32, 8, seed=9)
    with Largest() as largest:
        pk.linear_kl(student, teacher).backward()
    assert largest.elements == VOCABULARY * 8  # the weight, packed or not; the logits have 24 rows


def test_autocast_rounds_as_it_rounds_linear_layers() -> None:
    student, teacher = head("trained", torch.float32, 64), head("", torch.float32, 64, seed=9)
    with torch.autocast("cpu", torch.bfloat16):
        got = pk.linear_kl(student, teacher)
        z, other = (0.7 * F.linear(h.hidden, h.weight, h.bias).float() for h in (student, teacher))  # type: ignore[arg-type]
    want = (
        F.kl_div(z.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    )
    torch.testing.assert_close(got, want)
    leaves = [student.hidden, student.weight, student.bias]
    for a, b in zip(*(torch.autograd.grad(t, leaves) for t in (got, want)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


def test_saved_tensors_are_of_the_size_of_hidden() -> None:
    student, teacher = head("frozen", torch.float32, 64), head("", torch.float32, 128, seed=9)
    saved = testing.saved_bytes(lambda: pk.linear_kl(student, teacher), ())
    assert saved == student.hidden.nbytes


def test_second_derivatives_raise() -> None:
    student, teacher = head("frozen", torch.float32, 64), head("", torch.float32, 128, seed=9)
    (dx,) = torch.autograd.grad(pk.linear_kl(student, teacher), student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_kl: a gradient of its gradients"):
        dx.sum().backward()


def test_compiled_functions_call_it_between_graphs() -> None:
    student, teacher = head("frozen", torch.float32, 64), head("", torch.float32, 128, seed=9)

    def loss(hidden: Tensor) -> Tensor:
        return pk.linear_kl(pk.Head(hidden * 2, student.weight), teacher, beta=0.5)

    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(student.hidden), loss(student.hidden))


MASK = torch.ones(3, 8)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beta": ({"beta": 1.5}, r"^beta: expected 0 to 1, got 1\.5$"),
    "temperature": ({"temperature": 0.0}, r"^temperature: expected more than 0, got 0\.0$"),
    "reduction": ({"reduction": "max"}, r"^reduction: expected one of mean, sum, none, got 'max'$"),
    "mask-dtype": ({"mask": MASK}, r"^mask: expected torch\.bool of shape \(3, 8\), got torch\.float32 of"),
    "mask-shape": ({"mask": MASK[:2] > 0}, r"^mask: expected torch\.bool of shape \(3, 8\), got .*\(2, 8\)$"),
    "rows": (
        {"teacher": pk.Head(torch.ones(2, 8, 4), torch.ones(VOCABULARY, 4))},
        r"^teacher\.hidden: expected rows \(3, 8\) like the student's, got \(2, 8\)$",
    ),
    "vocabulary": (
        {"teacher": torch.ones(3, 8, 4)},
        r"^teacher: expected a vocabulary of 300 like the student's, got 4$",
    ),
    "device": (
        {"teacher": torch.ones(3, 8, VOCABULARY, device="meta")},
        r"^teacher: expected device cpu like the student, got meta$",
    ),
    "student": (
        {"student": pk.Head(torch.ones(3, 8, 4), torch.ones(VOCABULARY, 5))},
        r"^student\.hidden: expected shape \(\.\.\., 5\), got \(3, 8, 4\)$",
    ),
    "teacher": (
        {"teacher": pk.Head(torch.ones(3, 8, 4), torch.ones(VOCABULARY, 4), softcap=-1.0)},
        r"^teacher\.softcap: expected more than 0, or None, got -1\.0$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments(name: str) -> None:
    changes, sentence = REFUSED[name]
    given: dict[str, Any] = {"student": head("", torch.float32, 64), "teacher": head("", torch.float32, 64)}
    with pytest.raises(ValueError, match=sentence):
        pk.linear_kl(**given | changes)
