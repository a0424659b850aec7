"""What is fused when a model's source changes, as in the next release of transformers: forwards that compute
the same stay fused, and others are not."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import pytest
import torch
from flow_blocks import between, family, one_step, patched
from flow_checks import assert_near
from flow_models import adapted
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels.patch.rules import attention, decoder_layer, gated_mlp, norm, verdict
from peft_kernels.patch.rules.stand_in import unwrapped

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "SmolLM3", "Granite", "Olmo2")


def is_fused_layer(module: nn.Module) -> bool:
    return decoder_layer.layer(module) is not None


def is_fused_mlp(module: nn.Module) -> bool:
    names = gated_mlp.projections(module)
    return names is not None and isinstance(gated_mlp.mlp(module, names), gated_mlp.Facts)


def is_fused_norm(module: nn.Module) -> bool:
    return norm.is_norm(module) and not norm.norm(module).reason


def is_fused_attention(module: nn.Module) -> bool:
    return attention.is_attention(module) and not attention.attention(module).reason


PARTS: dict[str, Callable[[nn.Module], bool]] = {
    "norm": is_fused_norm,
    "attention": is_fused_attention,
    "layer": is_fused_layer,
    "mlp": is_fused_mlp,
}


def rewritten(cls: Any, change: Callable[[ast.FunctionDef], object], names: Any = None) -> Any:
    """A subclass whose forward has a changed source."""
    forward = unwrapped(cls.forward)
    assert forward is not None
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    before = ast.dump(tree)
    change(function)
    assert ast.dump(tree) != before, "the rewrite changes nothing here"
    space = {**forward.__globals__, **(names or {})}
    exec(compile(ast.fix_missing_locations(tree), f"<{cls.__name__}>", "exec"), space)
    return type(cls.__name__, (cls,), {"forward": space["forward"], "__module__": cls.__module__})


def with_class(module: nn.Module, cls: Any) -> nn.Module:
    module.__class__ = cls
    return module


# Rewrites that change nothing.


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(f"{node.id}_", node.ctx) if node.id in self.names else node


def locals_renamed(function: ast.FunctionDef) -> None:
    taken = {one.arg for one in ast.walk(function.args) if isinstance(one, ast.arg)}
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    function.body = [_Renamed(stored - taken).visit(one) for one in function.body]


def results_named(function: ast.FunctionDef) -> None:
    for node in returns(function):
        node.value = ast.NamedExpr(ast.Name("result", ast.Store()), node.value)


def documented(function: ast.FunctionDef) -> None:
    function.body.insert(0, ast.Expr(ast.Constant("What it does.")))


def unused_argument(function: ast.FunctionDef) -> None:
    function.args.kwonlyargs.append(ast.arg("unused"))
    function.args.kw_defaults.append(ast.Constant(None))


def keywords_reversed(function: ast.FunctionDef) -> None:
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        call.keywords = [*(k for k in call.keywords if k.arg)][::-1] + [k for k in call.keywords if not k.arg]
    documented(function)


def sums_reversed(function: ast.FunctionDef) -> None:
    """Also products."""
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            node.left, node.right = node.right, node.left
    documented(function)


def moved_into_a_helper(function: ast.FunctionDef) -> None:
    for node in returns(function):
        node.value = ast.Call(ast.Lambda(ast.parse("lambda: 0", mode="eval").body.args, node.value), [], [])  # type: ignore[attr-defined]


def branch_added(function: ast.FunctionDef) -> None:
    """A check that holds."""
    x = function.args.args[1].arg
    function.body.insert(0, *ast.parse(f"if {x}.dim() < 2:\n    raise ValueError('{x}')").body)


SAME = (
    locals_renamed, results_named, documented, unused_argument, keywords_reversed, sums_reversed,
    moved_into_a_helper, branch_added,
)  # fmt: skip


# Rewrites that compute something else.


def returns(function: ast.FunctionDef) -> Iterator[Any]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Return))


def returned(expression: str) -> Callable[[ast.FunctionDef], None]:
    """The first result replaced by an expression of it, `y`."""

    def change(function: ast.FunctionDef) -> None:
        for node in returns(function):
            whole = isinstance(node.value, ast.Tuple)
            result = node.value.elts[0] if whole else node.value
            new = ast.parse(f"(lambda y: {expression})(0)", mode="eval").body
            new.args = [result]  # type: ignore[attr-defined]
            if whole:
                node.value.elts[0] = new
            else:
                node.value = new

    return change


def entered(expression: str) -> Callable[[ast.FunctionDef], None]:
    """x replaced by an expression of it on entry."""

    def change(function: ast.FunctionDef) -> None:
        x = function.args.args[1].arg
        function.body.insert(0, *ast.parse(f"{x} = (lambda x: {expression})({x})").body)

    return change


def swapped(a: str, b: str) -> Callable[[ast.FunctionDef], None]:
    """Two attributes or names exchanged wherever they are read."""

    def change(function: ast.FunctionDef) -> None:
        for node in ast.walk(function):
            for field in ("attr", "id"):
                name = getattr(node, field, None)
                if name in (a, b) and not isinstance(getattr(node, "ctx", None), ast.Store):
                    setattr(node, field, a if name == b else b)

    return change


def replaced(old: str, new: str) -> Callable[[ast.FunctionDef], None]:
    """An expression of the source replaced by another."""

    def change(function: ast.FunctionDef) -> None:
        text = ast.unparse(function)
        if old in text:
            function.body = ast.parse(text.replace(old, new)).body[0].body  # type: ignore[attr-defined]

    return change


ANY_PART: dict[str, Callable[[ast.FunctionDef], None]] = {
    "scaled": returned("1.01 * y"),
    "shifted": returned("y + 0.01"),
    "clamped": returned("y.clamp(-100, 100)"),
    "detached": returned("y.detach()"),
    "rounded": returned("y.to(torch.float16).to(y.dtype)"),
    "in training": returned("1.01 * y if self.training else y"),
    "in evaluation": returned("y if self.training else 1.01 * y"),
    "in fp16": returned("y.clamp(-1, 1) if y.dtype == torch.float16 else y"),
    "without gradients": returned("y if torch.is_grad_enabled() else 1.01 * y"),
    "with dropout": returned("torch.dropout(y, 0.01, self.training)"),
    "by a setting": returned("y * getattr(self, 'multiplier', 1.01)"),
    "input scaled": entered("0.99 * x"),
    "input detached": entered("x.detach()"),
    "input flipped": entered("x.flip(1)"),
}
OF_PART: dict[str, dict[str, Callable[[ast.FunctionDef], None]]] = {
    "mlp": {
        "gate and up swapped": swapped("gate_proj", "up_proj"),
        "no activation": replaced("self.act_fn", ""),
    },
    "attention": {
        "queries and keys swapped": swapped("q_proj", "k_proj"),
        "values from keys": swapped("v_proj", "k_proj"),
        "sine and cosine swapped": replaced("cos, sin = ", "sin, cos = "),
        "keys not rotated": replaced("query_states, key_states = apply", "query_states, _ = apply"),
        "scale": replaced("scaling=self.scaling", "scaling=1.01 * self.scaling"),
        "no mask": replaced("value_states, attention_mask", "value_states, None"),
        "dropout in evaluation": replaced("0.0 if not self.training else ", ""),
        "another layer's cache": replaced("self.layer_idx", "self.layer_idx + 1"),
        "cache ignored": replaced("is not None", "is None"),
        "arguments dropped": replaced("**kwargs)", ")"),
        "heads mixed": replaced(".transpose(1, 2)", ".transpose(1, 2).flip(1)"),
    },
    "layer": {
        "norms swapped": swapped("input_layernorm", "post_attention_layernorm"),
        "residual after the norm": replaced(
            "residual = hidden_states\n    hidden_states = self.input_layernorm(hidden_states)",
            "hidden_states = self.input_layernorm(hidden_states)\n    residual = hidden_states",
        ),
        "no second norm": replaced("self.post_attention_layernorm(", "("),
        "residual scaled": replaced("residual + hidden_states", "residual + 0.99 * hidden_states"),
        "no residual": replaced("residual + hidden_states", "hidden_states"),
        "no mask": replaced("attention_mask=attention_mask", "attention_mask=None"),
        "positions dropped": replaced("position_embeddings=position_embeddings, ", ""),
        "arguments dropped": replaced(", **kwargs)", ")"),
    },
    "norm": {
        "fourth power": replaced("pow(2)", "pow(4)"),
        "eps twice": replaced("variance + self.variance_epsilon", "variance + 2 * self.variance_epsilon"),
        "mean removed": entered("x - x.mean(-1, keepdim=True)"),
        "first dimension": replaced("mean(-1", "mean(1"),
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> dict[str, nn.Module]:
    """A module of each part of a family that is fused as it is."""
    found: dict[str, nn.Module] = {}
    for module in family(request.param).modules():
        for part, is_fused in PARTS.items():
            if is_fused(module):
                found.setdefault(part, module)
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("change", SAME, ids=lambda change: change.__name__)
def test_same_forwards_are_fused(parts: dict[str, nn.Module], change: Any) -> None:
    for part, module in parts.items():
        own: Any = type(module)
        try:
            assert PARTS[part](with_class(module, rewritten(own, change))), part
        finally:
            module.__class__ = own


def test_other_forwards_are_not_fused(parts: dict[str, nn.Module]) -> None:
    tried, fused = 0, []
    for part, module in parts.items():
        own: Any = type(module)
        for name, change in (ANY_PART | OF_PART[part]).items():
            try:
                cls = rewritten(own, change)
            except AssertionError:  # this family's source lacks what it changes
                continue
            try:
                tried += 1
                if PARTS[part](with_class(module, cls)):
                    fused.append((part, name))
            finally:
                module.__class__ = own
    assert not fused and tried >= 16 * len(parts), (fused, tried)


def test_a_rewritten_model_trains_fused_as_before() -> None:
    model = family("Qwen3")
    classes: dict[Any, Any] = {}
    for module in model.modules():
        if any(is_fused(module) for is_fused in PARTS.values()):
            own: Any = type(module)
            if own not in classes:
                classes[own] = rewritten(own, sums_reversed)
            module.__class__ = classes[own]
    stock = adapted(model)
    fused, report = patched(stock)
    assert len(classes) == 4 and {kind: len(between(report, kind)) for kind in ("norm", "attention")} == {
        "norm": 9, "attention": 2
    }  # fmt: skip
    assert not any(entry.reason or entry.note for entry in report.blocks), str(report)
    assert_near(one_step(fused), one_step(stock))


@pytest.mark.parametrize(
    "mode",
    [FakeTensorMode, torch.inference_mode, partial(torch.device, "meta"), partial(torch.autocast, "cpu")],
    ids=["fake", "inference", "meta", "autocast"],
)
def test_what_a_class_computes_is_found_in_every_mode(mode: Any, parts: dict[str, nn.Module]) -> None:
    verdict._verdicts.clear()
    gated_mlp._tried.clear()
    with mode():
        assert all(PARTS[part](module) for part, module in parts.items())


@pytest.mark.parametrize("part", ["attention", "layer"])
def test_wrappers_of_other_libraries_are_not_looked_through(parts: dict[str, nn.Module], part: str) -> None:
    if part not in parts:
        pytest.skip("this family has none that is fused")
    module, own = parts[part], type(parts[part])
    forward: Any = own.forward
    wrapper = wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))
    try:
        assert not PARTS[part](with_class(module, type(own.__name__, (own,), {"forward": wrapper})))
    finally:
        module.__class__ = own
