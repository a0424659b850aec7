"""Log-probabilities under a head, and TRL's other outputs, against materialised logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flow_checks import assert_near

from peft_kernels.patch.loss import scored_head


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale,cap", [(1.0, None), (0.25, None), (1.5, 6.0)])
def test_score(
    scale: float, cap: float | None, bias: bool, squares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, with a tie and, with squares, in chunks of unequal size."""
    outputs = tuple(name for name in scored_head.OUTPUTS if squares or name != "log_sum_sq_probs")
    monkeypatch.setitem(scored_head.PIECE, "cpu", 300)
    g = torch.Generator().manual_seed(0)
    hidden, weight, shift, noise = (torch.randn(s, generator=g) for s in ((7, 16), (90, 16), (90,), (7,)))
    weight[40] = weight[41] = 3 * hidden[2]
    targets = torch.tensor([3, 0, 40, 89, 5, 6, 7])
    targets[0] = (hidden[0] @ weight.T + bias * shift).argmax()
    b = shift if bias else None
    if bias:
        shift[40] = shift[41]
    x = hidden.clone().requires_grad_()
    scores = scored_head.score(x, weight, b, targets, 0.8, outputs, scale, cap)
    (gradient,) = torch.autograd.grad((scores.log_probs * noise).sum(), x)
    true = hidden.double().requires_grad_()
    logits = F.linear(true, weight.double(), None if b is None else b.double()) * scale
    logits = (logits if cap is None else cap * (logits / cap).tanh()) / 0.8
    logs = logits.log_softmax(-1)
    chosen = logs.gather(-1, targets[:, None]).squeeze(-1)
    (want,) = torch.autograd.grad((chosen * noise).sum(), true, retain_graph=True)
    p = logs.exp()
    assert_near(
        {"gradient": gradient, **{n: t for n, t in scores._asdict().items() if t is not None}},
        {
            "gradient": want, "log_probs": chosen, "entropy": -(p * logs).sum(-1),
            "mean_logits": logits.mean(-1), "is_top1": logits.argmax(-1) == targets,
            **({"log_sum_sq_probs": (p * p).sum(-1).log()} if squares else {}),
        },
    )  # fmt: skip
    assert scores.is_top1 is not None and scores.is_top1[0] and not scores.is_top1[1]
    weight.requires_grad_()
    if squares:
        with pytest.raises(ValueError, match="weight: expected a frozen head"):
            scored_head.score(x, weight, b, targets, outputs=outputs)
    else:
        got = scored_head.score(x, weight, b, targets, outputs=outputs).log_probs
        assert torch.autograd.grad(got.sum(), weight)[0].any()
