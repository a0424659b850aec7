"""The data of the demo: docstrings of the standard library, and the user's JSONL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune_data as data  # noqa: E402

# Docstrings of the standard library


@pytest.fixture(scope="module")
def stdlib() -> list[data.Example]:
    return data.docstring_examples()


def test_stdlib_gives_enough_examples_of_the_right_form(stdlib: list[data.Example]) -> None:
    assert len(stdlib) >= 2000
    assert stdlib == sorted(stdlib)
    for example in stdlib:
        assert example.prompt.startswith(data.INSTRUCTION + "\n\n# module ")
        assert example.prompt.endswith(":")
        assert data.MIN_SUMMARY_CHARS <= len(example.response) <= data.MAX_SUMMARY_CHARS
        assert "\n" not in example.response
    summaries = [example.response.casefold() for example in stdlib]
    assert len(set(summaries)) == len(summaries)


def test_examples_are_the_same_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MIN_DOCSTRINGS", 100)
    folder = Path(sysconfig.get_paths()["stdlib"]) / "email"
    code = "import pathlib, sys, finetune_data as d; d.MIN_DOCSTRINGS = 100; "
    other = subprocess.run(
        [sys.executable, "-c", code + "print(d.docstring_examples(pathlib.Path(sys.argv[1])))", str(folder)],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES), "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert other.stdout.strip() == repr(data.docstring_examples(folder))


def test_sources_are_parsed_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MIN_DOCSTRINGS", 1)
    package = tmp_path / "package"
    for folder in (package, package / "test", tmp_path / "site-packages"):
        folder.mkdir()
    source = '''
raise SystemExit("imported!")
class Outer:
    class Inner:
        async def fetch(self, url: str, *, limit=3) -> bytes:
            """Return the body of
            the page.

            More about it.
            """
            def helper(x): "Compute the helper value."
def undocumented(): pass
def duplicate(): "Compute the HELPER value."
def trivial(): "Too short."
'''
    (package / "__init__.py").write_text(source)
    (package / "broken.py").write_text("def (:\n")
    (package / "test" / "test_it.py").write_text('def f(): "Test the whole package."\n')
    (tmp_path / "site-packages" / "other.py").write_text('def f(): "Belongs to another project."\n')
    owner = "# module package, class Outer.Inner\n"
    assert data.docstring_examples(tmp_path) == [
        data.Example(f"{data.INSTRUCTION}\n\n{owner}{signature}", summary)
        for signature, summary in [
            ("async def fetch(self, url: str, *, limit=3) -> bytes:", "Return the body of the page."),
            ("def helper(x):", "Compute the helper value."),
        ]
    ]


def test_a_python_without_sources_is_an_error_that_names_data(tmp_path: Path) -> None:
    with pytest.raises(data.UserError, match=r"holds only 0 usable docstrings.*--data FILE\.jsonl"):
        data.docstring_examples(tmp_path)


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return the number of items.", "Return the number of items."),
        ("Return the\n   number   of items\n\nDetails.", "Return the number of items"),
        ("Return the first of many items. " + "More words. " * 20, "Return the first of many items."),
        ("", None),
        ("Short one.", None),
        (">>> f(1) == 2 and g(3)", None),
        ("word " * 60, None),
    ],
)
def test_summarise(docstring: str, summary: str | None) -> None:
    assert data.summarise(docstring) == summary


def test_split_is_fixed_and_disjoint() -> None:
    examples = [data.Example(f"p{i}", f"r{i}") for i in range(200)]
    train, validation = data.split(examples)
    assert (len(train), len(validation)) == (180, 20)
    assert sorted(train + validation) == sorted(examples)
    assert data.split(examples) == (train, validation)
    assert validation[0] == data.Example("p126", "r126")  # the same on every Python and machine
    with pytest.raises(data.UserError, match="at least 2"):
        data.split(examples[:1])


# The user's JSONL


def test_jsonl_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    first = b'\xef\xbb\xbf{"prompt": "a", "response": "b", "more": 1}\r\n'  # with a byte order mark
    path.write_bytes(first + b'\n{"response": "\xc3\xa9", "prompt": "\\u00fc"}')
    assert data.read_jsonl(path) == [data.Example("a", "b"), data.Example("ü", "é")]


def test_chats_are_read(tmp_path: Path) -> None:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    path, asked, answered = tmp_path / "chats.jsonl", said("user", "a"), said("assistant", "b")
    records = [
        {"messages": [said("system", "s"), asked, said("assistant", "c"), asked, answered]},
        {"prompt": [said("system", "s"), asked], "completion": [answered]},
        {"prompt": "a", "completion": "b"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    first, second, third = data.read_jsonl(path)
    assert first == data.Example("a", "b", (("system", "s"), ("user", "a"), ("assistant", "c")))
    assert second == data.Example("a", "b", (("system", "s"),)) and third == data.Example("a", "b")
    plain = SimpleNamespace(chat_template=None, bos_token=None)
    with pytest.raises(data.UserError, match="the model has no chat template"):
        data.prompt_text("a", plain, second.before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON in UTF-8: Expecting property name enclosed in double quotes"),
        (b"\xff\xfe", "not JSON in UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "not JSON in UTF-8: maximum recursion depth exceeded"),
        (b'["a", "b"]', 'texts that are not empty, last a user\'s and the assistant\'s, got ["a", "b"]'),
        (
            b'{"prompt": "a"}',
            'texts that are not empty, last a user\'s and the assistant\'s, got {"prompt": "a"}',
        ),
        (
            b'{"prompt": 3, "response": "b"}',
            "texts that are not empty, last a user's and the assistant's, got {\"prompt\": 3",
        ),
        (b'{"prompt": " ", "response": "b"}', 'last a user\'s and the assistant\'s, got {"prompt": " "'),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            'assistant\'s, got {"messages": [{"role": "user"',
        ),
        (
            b'{"messages": [{"role": "tool", "content": "a"}]}',
            'assistant\'s, got {"messages": [{"role": "tool"',
        ),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[-30:],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n\n' + line + b"\n")
    with pytest.raises(data.UserError) as caught:
        data.read_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)


def test_an_unreadable_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(data.UserError, match=r"--data: cannot read .*none\.jsonl: No such file"):
        data.read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(data.UserError, match=r"--data: expected at least 2 examples, .* got 0"):
        data.split(data.read_jsonl(tmp_path / "empty.jsonl"))
