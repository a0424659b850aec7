"""Adding an op takes only its class, as for the op defined here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import ONE_LAYER, ONE_MODEL, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import testing
from peft_kernels.core import registry
from peft_kernels.core.op import Base, Op
from peft_kernels.ops.nf4 import dense_weight

NAMESPACE = "peft_kernels_new_op"
N, K = 6, 32


@pytest.fixture(scope="module")
def ops() -> Iterator[Any]:
    """A namespace with a kernel for the new op."""

    class ScaledLinear(Op):
        name = "scaled_linear"
        schema = "(Tensor x, $base, Tensor scale) -> (Tensor y, Tensor product)"

        @staticmethod
        def reference(ops: Any, args: Any) -> tuple[Tensor, Tensor]:
            x, scale = args.x, args.scale
            product = F.linear(x, dense_weight(args.base, (scale.shape[0], x.shape[-1]), x.dtype))
            return product * scale, product

        @staticmethod
        def fake(args: Any) -> tuple[Tensor, Tensor]:
            y = args.x.new_empty((*args.x.shape[:-1], args.scale.shape[0]))
            return y, torch.empty_like(y)

        differentiable = ("x", "scale")
        saved_meta = ("x", "y")
        saved_outputs = ("product",)

        @staticmethod
        def backward(ops: Any, args: Any, results: Any, need: Any, dy: Tensor) -> dict[str, Any]:
            dx = ops.nf4_linear_dx(dy * args.scale, *args.base, args.x.shape[-1])
            return {"x": dx, "scale": (dy * results.product).sum(0)}

        @staticmethod
        def flops(args: Any) -> int:
            return 2 * args.x[0] * args.x[1] * args.scale[0]

    def kernel(x: Tensor, *args: Any) -> Any:
        """A function that takes the schema's arguments."""
        y, product = ScaledLinear.plain(x.double(), *args)
        return y.to(x.dtype), product.to(x.dtype)

    library = registry.install(NAMESPACE, lambda op: kernel if op is ScaledLinear else op.plain)
    yield getattr(torch.ops, NAMESPACE)
    library._destroy()
    del registry.OPS["scaled_linear"]


def arguments() -> tuple[Any, ...]:
    x = testing.tensor(3, K).requires_grad_()
    return (x, *testing.nf4_weight(N, K, 32)._state.op_args, testing.tensor(N, seed=1).requires_grad_())


def plain_torch(args: tuple[Any, ...]) -> Tensor:
    x, base, scale = args[0], Base(*args[1:6]), args[6]
    return F.linear(x, dense_weight(base, (N, K), torch.float32)) * scale


@pytest.mark.parametrize("way", ["dispatcher", "eager"])
def test_value_and_gradient(ops: Any, way: str) -> None:
    args = arguments()
    call = ops.scaled_linear if way == "dispatcher" else registry.eager(ops.scaled_linear.default)
    y, product = call(*args)
    want = plain_torch(args)
    assert relative_error(y, want) <= ONE_LAYER and not product.requires_grad
    dy, wanted = testing.tensor(3, N, seed=2), (args[0], args[6])
    for got, truth in zip(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(want, wanted, dy), strict=True
    ):
        assert relative_error(got, truth) <= ONE_MODEL


def test_opcheck(ops: Any) -> None:
    torch.library.opcheck(ops.scaled_linear.default, arguments())


def test_x_is_not_saved(ops: Any) -> None:
    args = arguments()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.scaled_linear(*args)
    assert all(t.shape != args[0].shape for t in saved) and len(saved) == 6


def test_compile_flops_and_vmap(ops: Any) -> None:
    args = arguments()
    compiled = torch.compile(lambda *args: ops.scaled_linear(*args)[0].sin(), backend="eager", fullgraph=True)
    assert relative_error(compiled(*args), plain_torch(args).sin()) <= ONE_LAYER
    with FlopCounterMode(display=False) as counter:
        ops.scaled_linear(*args)
    assert counter.get_total_flops() == 2 * 3 * N * K
    call = registry.eager(ops.scaled_linear.default)
    x, rest = args[0].detach(), [t.detach() if isinstance(t, Tensor) else t for t in args[1:]]
    each = torch.func.vmap(lambda row: call(row, *rest)[0])(x)
    assert relative_error(each, plain_torch((x, *rest))) <= ONE_LAYER


def test_double_backward_raises(ops: Any) -> None:
    args = arguments()
    (dx,) = torch.autograd.grad(ops.scaled_linear(*args)[0].sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^scaled_linear: a gradient of its gradients was asked for"):
        torch.autograd.grad(dx.sum(), args[6])
