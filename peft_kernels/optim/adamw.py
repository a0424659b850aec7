"""AdamW, Adam and Lion with moments in 8 bits, and paged ones: bitsandbytes' classes, one launch a step."""

from __future__ import annotations

from typing import Any

from ..core.wrong_types import refuses_wrong_types
from .blockwise import BlockwiseOptimizer


class AdamW8bit(BlockwiseOptimizer):
    """AdamW with moments in 8 bits: 2.03 bytes of state a parameter in place of 8.

    Takes the place of `bitsandbytes.optim.AdamW8bit`, and of `torch.optim.AdamW` where its arguments are
    among these: parameter groups, schedulers, closures, GradScaler, `state_dict`. A checkpoint of
    bitsandbytes' class goes on in this one and the other way round.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor), or of dict
        fp32, bf16 or fp16 (others by plain torch), of any shape, with dense gradients of their dtype.
    lr : float or Tensor, default 1e-3
    betas : (float, float), default (0.9, 0.999)
    eps : float, default 1e-8
    weight_decay : float, default 0.01
        Decoupled: p is multiplied by 1 - lr weight_decay.
    amsgrad : bool
        False, for bitsandbytes' sake.
    optim_bits : int
        32, for bitsandbytes' sake: moments have 8 bits all the same.
    args : object, optional
        bitsandbytes' way to give `min_8bit_size`.
    min_8bit_size : int, default 4096
        Parameters with fewer elements have moments in fp32.
    is_paged : bool
        Whether moments are paged, as `PagedAdamW8bit` says.
    max_grad_norm : float, optional
        Gradients are scaled so that the norm of all together is at most this, as by
        `torch.nn.utils.clip_grad_norm_` but for the gradients themselves, which stay as they are; nothing is
        read on the host.
    rounding : str
        How a bf16 parameter is rounded: "nearest"; "stochastic", to either neighbour, the nearer one the more
        often; or "kahan", to nearest while a bf16 `compensation` in the state keeps what is dropped (2 bytes
        a parameter).
    seed : int
        Of stochastic rounding: with parameter, element and step it gives the random bits.
    page_budget : int, optional
        Bytes of device memory that paging may take while a step is made, on each device; `2**27` by default.

    Raises
    ------
    ValueError
        An argument is out of range, or amsgrad or optim_bits is not as above.

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
            rounding=rounding, seed=seed,
            page_budget=page_budget,
        )  # fmt: skip


class Adam8bit(BlockwiseOptimizer):
    """Adam with moments in 8 bits, in place of `bitsandbytes.optim.Adam8bit`.

    As `AdamW8bit`, but for weight_decay, 0 by default, and

    Parameters
    ----------
    decoupled_weight_decay : bool, default True
        As in bitsandbytes, whose Adam decays as AdamW does. False: weight_decay * p is added to the
        gradient, as `torch.optim.Adam` does.
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
        max_grad_norm: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        page_budget: int | None = None,
    ) -> None:
        _check_8bit(type(self).__name__, amsgrad, optim_bits)
        super().__init__(
            params, _adam_defaults(lr, betas, eps, weight_decay),
            kind="adamw" if decoupled_weight_decay else "adam", optim_bits=8, min_8bit_size=min_8bit_size,
            is_paged=is_paged, args=args, max_grad_norm=max_grad_norm, rounding=rounding, seed=seed,
            page_budget=page_budget,
        )  # fmt: skip


class PagedAdamW8bit(AdamW8bit):
    """`AdamW8bit` whose moments are paged, in place of `bitsandbytes.optim.PagedAdamW8bit`.

    The moments of parameters with 100,000 elements or more are in pinned host memory, and so is what
    rounding="kahan" keeps. A step brings them to a CUDA device chunk by chunk, within `page_budget`, while
    the chunk before is computed, and back; the bits are those of `AdamW8bit`. It returns before the last
    chunks are back: the next step, `state_dict`, pickling, copying and loading wait for them, and so must
    (`torch.cuda.synchronize`) whoever reads `state` itself. Steps cannot be captured in CUDA graphs.

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
    """AdamW with paged moments in fp32, in place of `bitsandbytes.optim.PagedAdamW`.

    On a CPU paging has no effect, which is logged once. Arguments as `PagedAdamW8bit`, but that optim_bits
    counts: 32 (default) or 8.
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
        *,
        max_grad_norm: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        page_budget: int | None = None,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad: PagedAdamW does not support it, expected False")
        super().__init__(
            params, _adam_defaults(lr, betas, eps, weight_decay), kind="adamw",
            optim_bits=getattr(args, "optim_bits", optim_bits), min_8bit_size=min_8bit_size, is_paged=True,
            args=args, max_grad_norm=max_grad_norm, rounding=rounding, seed=seed,
            page_budget=page_budget,
        )  # fmt: skip


class Lion8bit(BlockwiseOptimizer):
    """Lion with its moment in 8 bits, in place of `bitsandbytes.optim.Lion8bit`: 1.02 bytes a parameter.

    Arguments as `AdamW8bit`, without eps, amsgrad and optim_bits; defaults lr 1e-4, betas (0.9, 0.99),
    weight_decay 0, which is decoupled.

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
        *,
        max_grad_norm: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        page_budget: int | None = None,
    ) -> None:
        super().__init__(
            params, _adam_defaults(lr, betas, 0.0, weight_decay), kind="lion", optim_bits=8,
            min_8bit_size=min_8bit_size, is_paged=is_paged, args=args, max_grad_norm=max_grad_norm,
            rounding=rounding, seed=seed,
            page_budget=page_budget,
        )  # fmt: skip


def _adam_defaults(lr: Any, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}


def _check_8bit(name: str, amsgrad: bool, optim_bits: int) -> None:
    if amsgrad:
        raise ValueError(f"amsgrad: {name} does not support it, expected False")
    if optim_bits != 32:
        raise ValueError(
            f"optim_bits: {name} has moments in 8 bits whatever it says, expected 32, got {optim_bits}"
        )
