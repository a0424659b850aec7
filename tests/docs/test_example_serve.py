"""examples/serve.py over the loopback, with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_models import ADAPTERS, llama, prompt, save_adapter

from peft_kernels.serving import Engine
from peft_kernels.serving.decoder import Decoder

for _name in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")

import httpx  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402


@pytest.fixture(scope="module")
def serve() -> Any:
    path = Path(__file__).resolve().parent.parent.parent / "examples" / "serve.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("serve_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_example"] = module  # pydantic looks names up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(llama(), max_batch=3)


@pytest.fixture(scope="module")
def http(serve: Any, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("one", "two"):
        save_adapter(llama(), folder / name, **ADAPTERS[name])
    save_adapter(llama(), folder / "large", r=8, lora_alpha=1e38)
    engine.register("one", folder / "one")
    server, thread, port = serve.serve_on_loopback(serve.make_app(engine, folder))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        yield client
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and engine._thread is None


def test_adapters_are_loaded_used_and_removed(http: httpx.Client) -> None:
    ask = {"prompt": prompt(1, 5), "max_new_tokens": 4}
    texts = []
    assert http.put("/adapters/two", json={"folder": "two"}).json() == {"loaded": "two"}
    for name in (None, "one", "two"):
        answer = http.post("/generate", json=ask | {"adapter": name})
        assert answer.status_code == 200, answer.text
        assert answer.json()["finish_reason"] in ("length", "stop")
        texts.append(tuple(answer.json()["tokens"]))
    assert len(set(texts)) == 3
    known = {one["name"]: one for one in http.get("/adapters").json()}
    assert set(known) == {"one", "two"} and all(
        one["nbytes"] and not one["requests"] for one in known.values()
    )
    assert http.delete("/adapters/two").status_code == 200
    for answer, message in (
        (http.post("/generate", json=ask | {"adapter": "two"}), "expected one that is registered"),
        (http.post("/generate", json=ask | {"prompt": []}), "expected at least one token"),
        (http.put("/adapters/up", json={"folder": "../one"}), "expected one inside the server's"),
        (http.put("/adapters/none", json={"folder": "none"}), "expected adapter_config.json, got none"),
    ):
        assert answer.status_code == 400 and message in answer.json()["detail"]


def test_bad_requests_get_plain_errors(http: httpx.Client, tmp_path: Path) -> None:
    """They do not contain the server's paths."""
    ask = {"max_new_tokens": 2}
    typed = {"headers": {"content-type": "application/json"}}
    lone = b'{"prompt": "\\ud800", "max_new_tokens": 2}'
    long = "x" * 300
    answers = [
        (http.post("/generate", content=lone, **typed), 400, "prompt: expected token ids, as"),
        (http.post("/generate", json=ask | {"prompt": 5}), 422, "prompt"),
        (
            http.post(
                "/generate", content=b'{"prompt": [5], "adapter": "\\ud800", "max_new_tokens": 2}', **typed
            ),
            400,
            "one that is registered",
        ),
        (http.put("/adapters/long", json={"folder": long}), 400, "cannot be read (File name too long)"),
        (http.put("/adapters/nul", json={"folder": "a\0b"}), 400, ""),
        (http.put("/adapters/lone", content=b'{"folder": "\\ud800"}', **typed), 400, ""),
        (http.post("/generate", content=b'{"prompt": {"a": "\\ud800"}}', **typed), 422, "body.prompt.str: "),
        (
            http.put("/adapters/none", json={"folder": "none"}),
            400,
            "none: expected adapter_config.json, got none",
        ),
        (http.put("/adapters/one", json={"folder": "two"}), 400, "name: 'one' is the adapter in one: unload"),
        (http.post("/generate", json={"prompt": [5], "temperature": -1}), 400, "temperature: expected 0 or"),
    ]
    for answer, status, message in answers:
        assert answer.status_code == status, answer.text
        assert message in answer.json()["detail"] and str(tmp_path.parent) not in answer.text


def test_a_slow_tokenizer_does_not_stop_other_clients(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def submit(*_: Any, **__: Any) -> Any:
        raise ValueError(f"another client was answered: {answered.wait(10)}")

    monkeypatch.setattr(Engine, "submit", submit)
    answers: list[httpx.Response] = []
    slow = threading.Thread(target=lambda: answers.append(http.post("/generate", json={"prompt": "a"})))
    slow.start()
    assert http.get("/adapters").status_code == 200
    answered.set()
    slow.join()
    assert answers[0].json()["detail"] == "another client was answered: True"


@pytest.mark.parametrize("prompt", ["a" * (2 << 20), [5] * (2 << 20)], ids=["text", "tokens"])
def test_a_prompt_beyond_any_model_is_not_read(http: httpx.Client, prompt: Any) -> None:
    answer = http.post("/generate", json={"prompt": prompt})
    assert answer.status_code == 400 and "a length of at most 1048576, got 2097152" in answer.json()["detail"]


def test_an_adapter_that_overflows_is_named(http: httpx.Client) -> None:
    answer = http.put("/adapters/large", json={"folder": "large"})
    assert answer.status_code == 400, answer.text
    assert "adapter 'large': expected finite logits in torch.float32" in answer.json()["detail"]
    assert "scaling up to 1.2e+37" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (torch.nan, "logits: expected finite numbers, got nan as the largest for token 1: the model"),
        (IndexError("of the model"), "IndexError: of the model"),
    ],
    ids=["not-finite", "error"],
)
def test_a_fault_ends_one_request(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, fault: Any, told: str
) -> None:
    """A prompt with which an adapter overflows that does not with others; the batch goes on."""
    start, both = Decoder.start, threading.Barrier(2, timeout=60)

    def broken(self: Decoder, given: Any, rows: Any) -> Any:
        logits, cache = start(self, given, rows)
        if given == [7] and isinstance(fault, Exception):
            raise fault
        return (logits * fault if given == [7] else logits), cache

    def post(prompt: list[int]) -> httpx.Response:
        both.wait()
        body = {"prompt": prompt, "adapter": "one", "max_new_tokens": 40}
        return http.post("/generate", json=body)

    monkeypatch.setattr(Decoder, "start", broken)
    with ThreadPoolExecutor() as pool:
        good, bad = pool.map(post, ([5, 6], [7]))
    assert bad.status_code == 500, bad.text
    assert bad.json()["detail"].startswith(f"adapter 'one': {told}")
    assert good.status_code == 200 and good.json()["finish_reason"] in ("length", "stop")


@pytest.fixture
def chat_tokenizer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Words from the model's vocabulary, with a chat template; the engine has it during the test."""
    first = ["<unk>", "<s>", "</s>", ":", "user", "assistant", "a", "b"]
    words = {word: i for i, word in enumerate([*first, *(f"w{i}" for i in range(len(first), 128))])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}"
        "{% if turn.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ turn.role }} : {{ turn.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    return tokenizer


def test_chat_applies_the_template(http: httpx.Client, chat_tokenizer: Any) -> None:
    turns = [("user", "a b"), ("assistant", "b"), ("user", "a")]
    ids = [1, 4, 3, 6, 7, 5, 3, 7, 4, 3, 6, 5, 3]  # one <s>, and the header of the answer
    plain = http.post("/generate", json={"prompt": ids, "adapter": "one", "max_new_tokens": 5}).json()
    answer = http.post(
        "/v1/chat/completions",
        json={
            "model": "one",
            "messages": [{"role": role, "content": content} for role, content in turns],
            "max_tokens": 5,
            "temperature": 0,
            "stream": False,
        },
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": plain["text"]} and plain["text"]
    assert choice["index"] == 0 and choice["finish_reason"] == plain["finish_reason"]
    new = len(plain["tokens"])
    assert found["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": new, "total_tokens": len(ids) + new,
    }  # fmt: skip
    assert found["object"] == "chat.completion" and found["model"] == "one"
    assert found["id"] and isinstance(found["created"], int)


def test_chat_without_a_model_asks_the_base(http: httpx.Client, chat_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a"}]
    plain = http.post("/generate", json={"prompt": [1, 4, 3, 6, 5, 3], "max_new_tokens": 5}).json()
    for model in ({}, {"model": ""}):
        answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 5} | model)
        assert answer.json()["choices"][0]["message"]["content"] == plain["text"]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"messages": []}, 422, "body.messages: "),
        ({"messages": [{"role": "user"}]}, 422, "body.messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, 422, "body.messages.0.content: "),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages: the model's chat template: no to"),
        (
            {"messages": [{"role": "user", "content": "a" * (1 << 20)}] * 2},
            400,
            "messages: expected a length",
        ),
        ({"max_tokens": 0}, 422, "body.max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 100}, 400, "expected at most 64 tokens in all, got 6 of the prompt and 100 new ones"),
        ({"model": "nine"}, 400, "adapter: expected one that is registered"),
        ({"temperature": -1}, 400, "temperature: expected 0 or a positive number"),
        ({"stream": True}, 422, "body.stream: Input should be False"),
        ({"stop": ["a"]}, 422, "body.stop: Extra inputs are not permitted"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else None,
)
def test_bad_chats_get_plain_errors(
    http: httpx.Client, chat_tokenizer: Any, changes: Any, status: int, message: str
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | changes
    typed = {"content-type": "application/json"}
    answer = http.post("/v1/chat/completions", content=json.dumps(body), headers=typed)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


@pytest.mark.parametrize("there", [True, False], ids=["no-template", "no-tokenizer"])
def test_chat_without_a_template(
    http: httpx.Client, engine: Engine, chat_tokenizer: Any, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_tokenizer.chat_template = None
    if not there:
        monkeypatch.setattr(engine, "tokenizer", None)
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 400, answer.text
    assert "messages: expected a tokenizer with a chat template, got none" in answer.json()["detail"]


def test_request_timeout_is_an_error(serve: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "TIMEOUT", -1.0)
    answer = http.post("/generate", json={"prompt": [5], "max_new_tokens": 50})
    assert answer.status_code == 504 and "not done after -1 seconds" in answer.json()["detail"]


def test_folders_that_cannot_be_served_are_named(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    for given, message in (
        ("one", "expected NAME=FOLDER of a folder that is there, got one"),
        (f"one={tmp_path}/none", "of a folder that is there, got one="),
        (f"a.b={tmp_path}", "--adapters: name: expected letters, digits"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve.py", "--model", str(model), "--adapters", given])
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: llama())
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_: None)
        with pytest.raises(SystemExit):
            serve.main()
        assert message in capsys.readouterr().err


def test_the_load_test_uses_all_adapters(serve: Any, http: httpx.Client) -> None:
    line = serve.load_test(http.base_url.port, 6, 3, ["one"], new_tokens=3)
    assert line.startswith("6 requests, 3 clients, 1 adapters: ") and "p99" in line
    assert "1 clients, 0 adapters: " in serve.load_test(http.base_url.port, 1, 1, [], new_tokens=2)
    with pytest.raises(SystemExit, match=r"2 of 2 requests failed: .*'three'"):
        serve.load_test(http.base_url.port, 2, 1, ["three"], new_tokens=3)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(SystemExit, match=r"2 of 2 requests failed: ConnectError"):
            serve.load_test(unused.getsockname()[1], 2, 2, ["one"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--model: expected a folder, got none"),
        ("--model nowhere", "--model: expected a folder of transformers, got nowhere without config.json"),
        ("--load-test --requests 0", "--requests: expected a whole number from 1 on, got 0"),
        ("--load-test --clients -1", "--clients: expected a whole number from 1 on, got -1"),
        ("--load-test --max-batch 0", "--max-batch: expected a whole number from 1 on, got 0"),
        ("--load-test --budget-mb nan", "--budget-mb: expected a number above 0, got nan"),
    ],
)
def test_wrong_arguments_give_one_sentence(
    serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        serve.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
