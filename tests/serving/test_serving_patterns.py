"""Keys of rank_pattern and alpha_pattern match where `re` matches them, in bounded time."""

from __future__ import annotations

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from peft_kernels.checkpoints import patterns
from peft_kernels.checkpoints.patterns import PatternTable

PATHS = (
    "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.11.mlp.up_proj",
    "transformer.h.1.attn.c_attn", "lm_head", "a", "a.a", "a.b.a", "ab.ba", "b.0",
)  # fmt: skip
KEYS = (
    "q_proj", "self_attn.q_proj", "layers.1", "^model.layers.0.self_attn.q_proj", "1.self_attn.q_proj",
    r".*\.layers\.\d+\.self_attn.*", r"layers\.(0|1[0-5])\.mlp\.(up|down)_proj", r"layers\.\d{2}\..+",
    "^lm_head$", "(?:q|k)_proj", "[qk]_proj", "h.1.*?attn", "model.layers.1[^0]+", "", "proj", "lm-head",
    r"[\w-]+", "a{2,}|ab", "()*", "(a*)*b?", "a|$b", "(^a.)+", "x^", "b$.0",
)  # fmt: skip


def by_re(key: str, path: str) -> bool:
    """As PEFT matches (`peft.utils.other.get_pattern_key`)."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def by_table(key: str, path: str) -> bool:
    return bool(PatternTable({key: True}).get(path, False))


@pytest.mark.parametrize("key", KEYS)
def test_common_keys(key: str) -> None:
    assert [by_table(key, path) for path in PATHS] == [by_re(key, path) for path in PATHS]


ATOMS = st.sampled_from(["a", "b", "0", "_", ".", r"\.", r"\d", r"\W", "[ab]", "[^a0]", "[0-9a]", "^", "$"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    grouped = inner.map(lambda key: f"({key})")
    repeats = st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,2}", "{1,}?"])
    repeated = st.tuples(grouped, repeats).map("".join)
    return st.one_of(
        st.lists(inner, max_size=3).map("".join), st.tuples(inner, inner).map("|".join), grouped, repeated
    )


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.recursive(ATOMS, larger, max_leaves=8), st.text("ab0._", max_size=8).map(lambda text: text + "a")
)
def test_random_keys_match_like_re(key: str, path: str) -> None:
    assert by_table(key, path) == by_re(key, path), (key, path)


def test_first_key_wins() -> None:
    table = PatternTable({"k_proj": 1, ".*attn.*": 2, "q_proj": 3})
    assert [table.get(f"attn.{name}", 4) for name in ("q_proj", "k_proj")] == [2, 1]
    assert [table.get(name, 4) for name in ("q_proj", "v_proj")] == [3, 4]


@pytest.mark.parametrize(
    "key", ["(.*.*)*x", "(a|a)*" * 9 + "x", "(.*)*" * 40 + "x", "((((.?){9}){9}){9}){3}x", "a?" * 400]
)
def test_keys_that_backtrack_in_re(key: str) -> None:
    assert not by_table(key, "model.layers.0.self_attn.q_proj" + "a" * 30 + "!")


@pytest.mark.parametrize(
    "key",
    [
        "(", "a)|(b", "*", "a**", "a*+", "^*", "a{", "a{x}", "a{3,2}", "a{1001}", "[z-a]", "[]", "[[:a:]]",
        r"(a)\1", "(?=a)", "(?i)a", "(?P<x>a)", r"\b", r"\A", "\\", "a" * 999 + ".*",
        "(" * 51 + "a" + ")" * 51, "(a{100}){101}", "(){1000}" * 11,
    ],
)  # fmt: skip
def test_unsupported_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="expected names of layers, or patterns of"):
        PatternTable({key: 1})


TABLES = {
    "names": {f"model.layers.{i}.self_attn.q_proj": i for i in range(2000)},
    "patterns": {f"(a*)*{i}": i for i in range(100)},
}


@pytest.mark.parametrize("name", TABLES)
def test_steps_of_a_table_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MOST_STEPS", 100_000)
    table = PatternTable(TABLES[name])
    with pytest.raises(ValueError, match="expected patterns that match within 100000 steps, got slower ones"):
        for _ in range(100):
            table.get("a" * 50, 1)


def test_parsing_counts_as_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand patterns are parsed; of a hundred thousand, which would take seconds, only the first."""
    parsed: list[str] = []
    parser = patterns._Parser
    monkeypatch.setattr(patterns, "_Parser", lambda key: parsed.append(key) or parser(key))
    PatternTable({f"layers.{i}.*": i for i in range(1000)})
    with pytest.raises(ValueError, match="expected patterns that match within 5000000 steps"):
        PatternTable({f"{i}.*": i for i in range(100_000)})
    assert len(parsed) < 15_000


def test_many_layer_names_take_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(300)]
    monkeypatch.setattr(patterns, "MOST_STEPS", len(names) ** 2)
    table = PatternTable({name: i for i, name in enumerate(names)})
    assert [table.get(name, -1) for name in names] == list(range(300))
