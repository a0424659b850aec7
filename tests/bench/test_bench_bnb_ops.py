"""bitsandbytes' ops: each contender runs on its own kernels."""

from __future__ import annotations

import pytest
from bench_checks import TINY
from bnb_layers import bnb

from bench.lib.report import ONCE, OURS
from bench.ops import bnb_ops
from peft_kernels.integrations.bitsandbytes import ops as bitsandbytes_ops

pytestmark = pytest.mark.usefixtures("small_rotation")


@pytest.mark.parametrize("group", [bnb_ops.EVAL, bnb_ops.TRAIN])
def test_contenders_take_turns_on_their_own_kernels(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    original = bitsandbytes_ops._KERNELS["gemm_4bit"]

    def noted(*args: object) -> object:
        served.append(bnb_ops.Switched.on)
        return original(*args)

    monkeypatch.setitem(bitsandbytes_ops._KERNELS, "gemm_4bit", noted)
    result = bnb_ops.linear4bit(group, TINY, 4, "bf16").run(ONCE)
    assert not result.wrong and not result.absent
    assert set(result.seconds) == {OURS, bnb_ops.STOCK}
    assert served and all(served)
    assert bitsandbytes_ops._library is None, "bitsandbytes is not restored"


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = bitsandbytes_ops._KERNELS["gemm_4bit"]
    monkeypatch.setitem(bitsandbytes_ops._KERNELS, "gemm_4bit", lambda *args: original(*args) * 1.1)
    result = bnb_ops.linear4bit(bnb_ops.EVAL, TINY, 4, "bf16").run(ONCE)
    assert OURS in result.wrong and not result.seconds
    assert bitsandbytes_ops._library is None and bnb.__version__
