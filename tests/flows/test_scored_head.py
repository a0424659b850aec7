"""Log-probabilities under a head, of which only pieces of the logits exist, against all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flow_checks import assert_near

from peft_kernels.integrations import scored_head


@pytest.mark.parametrize("bias", [False, True])
def test_score(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against logits of all tokens at once, in fp64, with a tie and in pieces that leave a rest."""
    monkeypatch.setitem(scored_head.PIECE, "cpu", 300)
    g = torch.Generator().manual_seed(0)
    hidden, weight, shift, noise = (torch.randn(s, generator=g) for s in ((7, 16), (90, 16), (90,), (7,)))
    weight[40] = weight[41] = 3 * hidden[2]
    targets = torch.tensor([3, 0, 41, 89, 5, 6, 7])
    targets[0] = (hidden[0] @ weight.T + bias * shift).argmax()
    b = shift if bias else None
    if bias:
        shift[40] = shift[41]
    x = hidden.clone().requires_grad_()
    scores = scored_head.score(x, weight, b, targets, 0.8, scored_head.OUTPUTS)
    (gradient,) = torch.autograd.grad((scores.log_probs * noise).sum(), x)
    true = hidden.double().requires_grad_()
    logits = F.linear(true, weight.double(), None if b is None else b.double()) / 0.8
    logs = logits.log_softmax(-1)
    chosen = logs.gather(-1, targets[:, None]).squeeze(-1)
    (want,) = torch.autograd.grad((chosen * noise).sum(), true, retain_graph=True)
    p = logs.exp()
    assert_near(
        {"gradient": gradient, **scores._asdict()},
        {
            "gradient": want, "log_probs": chosen, "entropy": -(p * logs).sum(-1),
            "log_sum_sq_probs": (p * p).sum(-1).log(), "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == targets,
        },
    )  # fmt: skip
    assert scores.is_top1 is not None and scores.is_top1[0] and not scores.is_top1[2]
    with pytest.raises(ValueError, match="weight: expected a frozen head"):
        scored_head.score(x, weight.requires_grad_(), b, targets)
