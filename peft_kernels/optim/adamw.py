"""AdamW, Adam and Lion with 8-bit or paged moments: bitsandbytes' classes with one launch per step."""

from __future__ import annotations

from typing import Any

from ..core.wrong_types import refuses_wrong_types
from .blockwise import BlockwiseOptimizer


class AdamW8bit(BlockwiseOptimizer):
    """AdamW with 8-bit moments: 2.03 bytes of state per parameter instead of 8.

    Replaces `bitsandbytes.optim.AdamW8bit`, and `torch.optim.AdamW` for the arguments listed here. Supports
    parameter groups, schedulers, closures, GradScaler and `state_dict`. Checkpoints are interchangeable with
    bitsandbytes' class.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor), or of dict
        fp32, bf16 or fp16 (other dtypes run in plain torch), any shape, with dense gradients of the same
        dtype.
    lr : float or Tensor, default 1e-3
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-8
    weight_decay : float, default 0.01
        Decoupled: p is multiplied by 1 - lr weight_decay.
    amsgrad : bool
        Must be False; kept for compatibility with bitsandbytes.
    optim_bits : int
        Must be 32; kept for compatibility with bitsandbytes. Moments have 8 bits.
    args : object, optional
        An object with `min_8bit_size`, as bitsandbytes takes it.
    min_8bit_size : int, default 4096
        Parameters with fewer elements have fp32 moments.
    is_paged : bool
        Page the moments, see `PagedAdamW8bit`.
    max_grad_norm : float, optional
        Clips the global gradient norm like `torch.nn.utils.clip_grad_norm_`, but without modifying the
        gradients and without a host synchronisation.
    rounding : str
        Rounding of bf16 parameters: "nearest"; "stochastic"; or "kahan", nearest with a bf16 `compensation`
        in the state (2 bytes per parameter) that accumulates the rounding error.
    seed : int
        Seed of stochastic rounding; with parameter, element and step it determines the random bits.
    page_budget : int, optional
        Bytes of memory per device that paging may use during a step; default `2**27`.

    Raises
    ------
    ValueError
        An argument is out of range or unsupported.

    References
    ----------
    Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization",
    arXiv:2110.02861. Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """

    @refuses_wrong_types
    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        max_grad_norm: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        page_budget: int | None = None,
    ) -> None:
        _check_8bit(type(self).__name__, amsgrad, optim_bits)
        super().__init__(
            params, _adam_defaults(lr, betas, eps, weight_decay), kind="adamw", optim_bits=8,
            min_8bit_size=min_8bit_size, is_paged=is_paged, args=args, max_grad_norm=max_grad_norm,
            rounding=rounding, seed=seed, page_budget=page_budget,
        )  # fmt: skip


class Adam8bit(BlockwiseOptimizer):
    """Adam with 8-bit moments, replaces `bitsandbytes.optim.Adam8bit`.

    Arguments as `AdamW8bit`, with weight_decay 0 by default, and

    Parameters
    ----------
    decoupled_weight_decay : bool, default True
        As in bitsandbytes, whose Adam uses decoupled weight decay. False adds weight_decay * p to the
        gradient, like `torch.optim.Adam`.
    """

    @refuses_wrong_types
    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        **options: Any,
    ) -> None:
        _check_8bit(type(self).__name__, amsgrad, optim_bits)
        super().__init__(
            params, _adam_defaults(lr, betas, eps, weight_decay),
            kind="adamw" if decoupled_weight_decay else "adam", optim_bits=8, min_8bit_size=min_8bit_size,
            is_paged=is_paged, args=args, **options,
        )  # fmt: skip


class PagedAdamW8bit(AdamW8bit):
    """`AdamW8bit` with paged moments, replaces `bitsandbytes.optim.PagedAdamW8bit`.

    Moments (and the compensation of rounding="kahan") of parameters with 100,000 elements or more are in
    pinned host memory. A step copies them to the CUDA device and back in chunks within `page_budget`,
    overlapped with computation; results are bit-identical to `AdamW8bit`. A step returns before the last
    chunks are back: the next step, `state_dict`, pickling, copying and loading wait for them. Code that reads
    `state` directly must call `torch.cuda.synchronize` first. Steps cannot be captured in CUDA graphs.

    On a CPU paging has no effect, which is logged once. Arguments as `AdamW8bit`, without `is_paged`.
    """

    @refuses_wrong_types
    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, True, **options
        )


class PagedAdamW(BlockwiseOptimizer):
    """AdamW with paged fp32 moments, replaces `bitsandbytes.optim.PagedAdamW`.

    On a CPU paging has no effect, which is logged once. Arguments as `PagedAdamW8bit`; optim_bits may
    be 32 (default) or 8.
    """

    @refuses_wrong_types
    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad: PagedAdamW does not support it, expected False")
        super().__init__(
            params, _adam_defaults(lr, betas, eps, weight_decay), kind="adamw",
            optim_bits=getattr(args, "optim_bits", optim_bits), min_8bit_size=min_8bit_size, is_paged=True,
            args=args, **options,
        )  # fmt: skip


class Lion8bit(BlockwiseOptimizer):
    """Lion with an 8-bit moment, replaces `bitsandbytes.optim.Lion8bit`: 1.02 bytes of state per parameter.

    Arguments as `AdamW8bit`, without eps, amsgrad and optim_bits; defaults lr 1e-4, betas (0.9, 0.99),
    weight_decay 0 (decoupled).

    References
    ----------
    Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675.
    """

    @refuses_wrong_types
    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params, _adam_defaults(lr, betas, 0.0, weight_decay), kind="lion", optim_bits=8,
            min_8bit_size=min_8bit_size, is_paged=is_paged, args=args, **options,
        )  # fmt: skip


def _adam_defaults(lr: Any, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}


def _check_8bit(name: str, amsgrad: bool, optim_bits: int) -> None:
    if amsgrad:
        raise ValueError(f"amsgrad: {name} does not support it, expected False")
    if optim_bits != 32:
        raise ValueError(
            f"optim_bits: expected 32, as {name} always keeps its moments in 8 bits, got {optim_bits}"
        )
