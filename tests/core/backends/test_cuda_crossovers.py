"""Which crossovers back end `cuda` gives its library. With stubs of the library and the card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from card_stub import H100, OnCard, call, estimate

from peft_kernels.core.backends import crossovers
from peft_kernels.core.backends.crossovers import ANY, Limits, Rows
from peft_kernels.core.backends.self_test import gemms

PINNED = Limits((Rows(ANY, 320, 128),))


@pytest.fixture(autouse=True)
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Names a file with PINNED, which nothing does before."""
    monkeypatch.delenv(crossovers.ENVIRONMENT_VARIABLE, raising=False)
    rows = [{"weights": None, "forward": 320, "backward": 128}]
    table = {"compute_capability": "9.0", "source": "measured", "card": H100.name, "rows": rows}
    (tmp_path / "mine.json").write_text(json.dumps({"tables": [table]}))
    return lambda: monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, str(tmp_path / "mine.json"))


def test_the_first_call_on_a_card_sets_its_table(backend: Any, pinned: Any) -> None:
    pinned()
    assert backend.extension.table == {}
    assert call(backend) == PINNED
    assert backend.crossovers_of(0).source == "measured"


@pytest.mark.parametrize("when", ["capture", "dispatch mode", "transform"])
def test_nothing_is_checked_in_the_middle_of_things(
    when: str, backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def called(t: torch.Tensor) -> torch.Tensor:
        assert call(backend) == estimate().without_wgmma()
        return t

    if when == "capture":
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            called(torch.ones(2))
    elif when == "dispatch mode":
        with FlopCounterMode(display=False):
            called(torch.ones(2))
    else:
        torch.func.vmap(called)(torch.ones(2))
    assert tests.calls == 0
    assert call(backend) == estimate() and tests.calls == 1


def test_the_tables_that_apply_are_listed(
    backend: Any, tests: Any, pinned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing runs nothing on a card."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: H100.name)
    backend.cards._judge = lambda index: "is too old" if index == 1 else None
    backend.crossovers_of(0)
    pinned()
    found = backend.all_crossovers()
    assert list(found) == [f"cuda:{i} {H100.name}" for i in (0, 2)]
    assert [t.source for t in found.values()] == ["estimated", "measured"]
    assert tests.calls == 0


def test_a_card_is_what_torch_says(backend: Any) -> None:
    assert backend.card(0) == H100


def test_a_bad_pin_stops_the_first_call(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, "nowhere.json")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_CROSSOVERS: .*nowhere\.json"):
        backend.supports("nf4_linear", (torch.ones(2, 3).as_subclass(OnCard),))


def test_kernels_can_be_forced(backend: Any, tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the table of the card applies."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for row in (gemms.WGMMA, gemms.MMA_SYNC):
        with backend.with_kernels(row):
            assert call(backend).rows == (row,)
        assert call(backend) == estimate()
    assert tests.calls == 1


def test_wgmma_can_be_left_out(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossovers.ENVIRONMENT_VARIABLE, crossovers.NO_WGMMA)
    assert call(backend) == estimate().without_wgmma()
