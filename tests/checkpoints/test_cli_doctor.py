"""`peft-kernels doctor` and `info` report what works on this machine, by running it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import peft_kernels as pk
import testing
from peft_kernels.cli import doctor, info
from peft_kernels.cli.main import main
from peft_kernels.core.backends import BACKENDS
from peft_kernels.core.backends.base import DTYPES
from peft_kernels.core.backends.crossovers import ANY, Limits, RowRange, Rows, Table
from peft_kernels.core.backends.self_test import compare
from peft_kernels.core.backends.self_test.cases import CASES

needs_cpu = pytest.mark.skipif(
    testing.unavailable("cpu") is not None, reason=f"back end cpu: {testing.unavailable('cpu')}"
)


NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


@pytest.fixture(autouse=True)
def _user_back_ends(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Only the back ends that users have, without the one for tests."""
    if "ptx" in BACKENDS:
        monkeypatch.setattr(BACKENDS["ptx"], "probe", lambda: "for tests")


def diagnosed(capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)


@needs_cpu
def test_no_faults(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = diagnosed(capsys)
    assert code == 0 and report["problems"] == []
    found = {(check["op"], check["dtype"]) for check in report["checks"] if check["backend"] == "cpu"}
    assert found == {(op, dtype) for op in CASES for dtype in NAMES}
    assert not any(check["fault"] for check in report["checks"])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "all is well" in text and "lora_linear" in text and "WRONG" not in text


@needs_cpu
@pytest.mark.parametrize("op", ["lora_linear", "adamw", "unpack_absmax", "quantize_absmax"])
def test_wrong_kernel_is_reported(
    op: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compare.fault

    def broken(kind: Any, call: Any, args: Any, dtype: torch.dtype) -> str | None:
        def spoiled(*args: Any) -> Any:
            results = call(*args)
            for t in tree_leaves(args[0] if results is None else results)[:1]:
                with torch.no_grad():
                    t.mul_(1.1) if t.is_floating_point() else t.add_(1)
            return results

        return real(kind, spoiled if kind.name == op else call, args, dtype)

    monkeypatch.setattr(compare, "fault", broken)
    code, report = diagnosed(capsys)
    assert code == 1
    assert {check["op"] for check in report["checks"] if check["fault"]} == {op}
    assert f"the first: {op} in float32" in report["problems"][0] and "differ" in report["problems"][0]
    assert "PEFT_KERNELS_BACKEND=reference" in report["problems"][0]


@needs_cpu
def test_raising_kernel_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(compare, "fault_of", broken)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text and "RuntimeError: no such instruction" in text


def test_missing_or_outdated_parts_are_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKENDS["cpu"], "probe", lambda: "not built: reinstall with g++")
    monkeypatch.setattr(info, "versions", lambda: dict.fromkeys(info.LIBRARIES) | {"peft": "0.9.1"})
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "cuda")
    monkeypatch.setattr(BACKENDS["cuda"], "probe", lambda: "no card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(BACKENDS["triton"], "probe", lambda: "no Triton")
    code, report = diagnosed(capsys)
    assert code == 1 and report["checks"] == []
    assert report["problems"] == [
        "back end cpu: not built: reinstall with g++. Until then CPU tensors use plain torch, slowly",
        "the GPU uses plain torch: cuda: no card; triton: no Triton",
        "PEFT_KERNELS_BACKEND=cuda selects a back end that is not usable: no card",
        "peft 0.9.1: expected 0.18 or later (pip install --upgrade peft)",
    ]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A usable back end cuda."""
    monkeypatch.setattr(BACKENDS["cuda"], "probe", lambda: None)
    monkeypatch.setattr(BACKENDS["cuda"], "describe", lambda: "a card")
    monkeypatch.setattr(doctor, "self_test", lambda backend, until: [])


@pytest.mark.usefixtures("card")
def test_crossovers_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (Rows(8_000_000, 384, 320, RowRange(65, 3072), RowRange(64, ANY)), Rows(ANY, 256, 1024))
    experts = (Rows(ANY, 416, 352),)
    tables = {
        "cuda:0 A": Table("9.0", Limits(rows, experts)),
        "cuda:1 B": Table("9.0", Limits(rows[1:]), "B"),
    }
    monkeypatch.setattr(BACKENDS["cuda"], "all_crossovers", lambda may_test: tables)
    code, report = diagnosed(capsys)
    names = "card", "gemms", "weights", "forward", "backward", "forward_wgmma", "backward_wgmma", "source"
    assert code == 0 and report["crossovers"] == [
        dict(zip(names, values, strict=True))
        for values in (
            ("cuda:0 A", "of one weight", 8_000_000, 384, 320, [65, 3072], [64, None], "estimated"),
            ("cuda:0 A", "of one weight", None, 256, 1024, [], [], "estimated"),
            ("cuda:0 A", "of experts", None, 416, 352, [], [], "estimated"),
            ("cuda:1 B", "of one weight", None, 256, 1024, [], [], "measured"),
        )
    ]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for line in (
        "cuda:0 A  of one weight      8,000,000         384       320  65 to 3,072  64 to any  estimated",
        "cuda:0 A  of experts               any         416       352            -          -  estimated",
        "cuda:1 B  of one weight            any         256     1,024            -          -  measured",
    ):
        assert line in text


@pytest.mark.usefixtures("card")
def test_a_card_that_failed_a_check_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKENDS["cuda"], "all_crossovers", lambda may_test: {})
    monkeypatch.setattr(BACKENDS["cuda"].self_test, "found", lambda: ["wgmma64 failed"])
    code, report = diagnosed(capsys)
    assert code == 1 and report["problems"] == ["wgmma64 failed"]


@pytest.mark.usefixtures("card")
def test_a_bad_file_of_crossovers_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(may_test: bool) -> None:
        raise ValueError("PEFT_KERNELS_CROSSOVERS: expected a file, got nothing")

    monkeypatch.setattr(BACKENDS["cuda"], "all_crossovers", bad)
    code, report = diagnosed(capsys)
    assert code == 1 and "PEFT_KERNELS_CROSSOVERS: expected a file, got nothing" in report["problems"]


def test_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """What was not tested is neither right nor wrong."""
    assert main(["doctor", "--seconds", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"] == []
    assert main(["doctor", "--seconds", "0"]) == 0
    assert "the self-tests stopped after 0 s: where there is no answer, none ran" in capsys.readouterr().out
    check = doctor.Check("cpu", "cpu", "cast", "float32", None)
    assert list(doctor._summary([check])) == [("cpu", "cpu", "cast", "ok", "-", "-")]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert pk.explain() in text and f"peft_kernels {pk.__version__}, torch {torch.__version__}" in text
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["reference"]["usable"] and report["backends"].keys() == BACKENDS.keys()
    assert report["libraries"]["safetensors"]


def test_exit_codes_as_a_module() -> None:
    root = Path(pk.__file__).parent.parent

    def call(*arguments: str) -> Any:
        command = [sys.executable, "-m", "peft_kernels", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    found = call("inspect", "/no/such/place", "--json")
    assert found.returncode == 1 and "got nothing there" in json.loads(found.stdout)["error"]
    assert found.stderr.startswith("peft-kernels: /no/such/place: ")


def test_closed_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`peft-kernels info --json | head -1`; without --json, rich handles a closed pipe."""
    out, into = os.pipe()
    os.close(out)
    with os.fdopen(into, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["info", "--json"]) == 1
    assert not capsys.readouterr().err


def test_wrong_arguments_and_system_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ([], ["frob"], ["quantize", "a"], ["quantize", "a", "b", "--format", "int3"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
    assert main(["quantize", "a", "b", "--blocksize", "48"]) == 1
    assert "blocksize: expected one of (32, 64," in capsys.readouterr().err

    def refuse(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/etc/model")

    monkeypatch.setattr(info, "run", refuse)
    assert main(["info"]) == 1
    assert "peft-kernels: /etc/model: Permission denied" in capsys.readouterr().err

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert main(["info"]) == 1
    assert "interrupted" in capsys.readouterr().err
