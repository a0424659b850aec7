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

import peft_kernels as pk
import testing
from peft_kernels.cli import doctor, info
from peft_kernels.cli.main import main
from peft_kernels.core.backends import BACKENDS
from peft_kernels.core.backends.crossovers import ANY, Limits, RowRange, Rows, Table

needs_cpu = pytest.mark.skipif(
    testing.unavailable("cpu") is not None, reason=f"back end cpu: {testing.unavailable('cpu')}"
)


BREAKS = {
    "forward": lambda y: y * 1.0001,
    "gradient of x": lambda dx: dx.roll(1, 0) if len(dx) > 1 else -dx,
    "LoRA": lambda y: y + 1e-3,
    "LoRA, gradient of x": lambda dx: dx * 1.0001,
    "gradient of A": lambda da: -da,
    "gradient of B": lambda db: torch.full_like(db, torch.nan),
}


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
    cases = {(check["what"], check["dtype"]) for check in report["checks"] if check["backend"] == "cpu"}
    assert cases == {(what, dtype) for what in BREAKS for dtype in ("float32", "bfloat16")}
    assert all(check["passed"] and 0 < check["error"] < check["allowed"] for check in report["checks"])
    assert len(report["checks"]) == len(BREAKS) * 2 * len(doctor._SHAPES) or report["seconds"] >= 5
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "all is well" in text and "gradient of A" in text


@needs_cpu
@pytest.mark.parametrize("what", BREAKS)
def test_wrong_kernel_is_reported(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor._compute

    def broken(*args: Any) -> Any:
        results = found(*args)
        return results | {what: BREAKS[what](results[what])}

    monkeypatch.setattr(doctor, "_compute", broken)
    code, report = diagnosed(capsys)
    assert code == 1
    wrong = {check["what"] for check in report["checks"] if not check["passed"]}
    assert wrong == {what}
    assert f"the first: {what} in float32 is wrong" in report["problems"][0]
    assert "PEFT_KERNELS_BACKEND=reference" in report["problems"][0]


@needs_cpu
def test_raising_kernel_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(doctor, "_compute", broken)
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
    monkeypatch.setattr(BACKENDS["cuda"], "all_crossovers", lambda: tables)
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
    monkeypatch.setattr(BACKENDS["cuda"], "all_crossovers", dict)
    monkeypatch.setattr(BACKENDS["cuda"], "wgmma_faults", lambda: {"A": "wgmma64 differs by 3"})
    code, report = diagnosed(capsys)
    assert code == 1 and report["problems"] == [
        "LinearWgmma is not used on A, please report this: wgmma64 differs by 3"
    ]


@pytest.mark.usefixtures("card")
def test_a_bad_file_of_crossovers_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad() -> None:
        raise ValueError("PEFT_KERNELS_CROSSOVERS: expected a file, got nothing")

    monkeypatch.setattr(BACKENDS["cuda"], "all_crossovers", bad)
    code, report = diagnosed(capsys)
    assert code == 1 and "PEFT_KERNELS_CROSSOVERS: expected a file, got nothing" in report["problems"]


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time limit is reached, one shape per dtype is still checked."""
    monkeypatch.setattr(doctor, "_compare", lambda backend, dtype, *shape: [(dtype, shape)])
    found = doctor.self_test(BACKENDS["reference"], until=0.0)
    assert found == [(torch.float32, doctor._SHAPES[0]), (torch.bfloat16, doctor._SHAPES[0])]


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
