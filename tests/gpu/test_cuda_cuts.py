"""How evenly GEMMs fill a card, and how weights are divided into pieces, as compiled libraries plan it."""

from __future__ import annotations

import itertools

import pytest

import ptx_backend as ptx
from bench.gpu.roofline import BY_ARCHITECTURE, Gpu
from peft_kernels.core.backends import cuda

SHAPES = (
    (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192),  # Llama-3.2-1B
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336),  # Llama-3.1-8B, Mistral-7B
    (8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672),  # Llama-3.1-70B
    (4096, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (2560, 9728),  # Qwen3-4B
    (12288, 4096), (4096, 12288),  # Qwen3-8B
    (8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600),  # Qwen3-32B
    (4096, 3584), (2048, 3584), (3584, 4096), (14336, 3584), (3584, 14336),  # Gemma-2-9B
    (3072, 3072), (5120, 5120),
)  # fmt: skip
"""out_features and in_features of the linear layers of a decoder block, from the models' config.json."""
ROWS = (1, 8, 16, 32, 64, 128, 512)
CARDS = [BY_ARCHITECTURE[architecture] for architecture in (80, 90, 100, 89, 120)]
LARGE = 9 * 2**20
"""Weights of a large matrix. Smaller ones have too few units of work to balance."""
GOAL = 0.85
WORST = {True: GOAL - 0.004, False: 0.37}
"""By whether a weight is large: 3072x3072 and 512x2048, both on RTX 5090."""
CUT = {"features": 16, "tokens": 8, "depth": 64, "workers": 8, "share": 1}


@pytest.fixture(scope="module")
def plans() -> cuda.CudaLibrary:
    for backend in (ptx.BACKEND, cuda.BACKEND):
        backend.load()
        if backend._extension is not None:
            return backend._extension
    pytest.skip("no compiled library")


def utilisation(gpu: Gpu, shape: tuple[int, int], m: int, is_dx: bool, cut: dict[str, int]) -> float:
    """Work of the GEMM / work the card does in the time that its busiest worker takes.

    A kernel has equal units of work: tiles of the result by a part of the reduction. `share` is the number of
    units of the busiest worker, a warp or a block. It covers tiles that reach beyond the weight, idle warps,
    and multiprocessors with fewer units than others. A partly filled tile of tokens is no loss: there the
    time goes into weights.
    """
    features, depth = shape[::-1] if is_dx else shape
    units = features / cut["features"] * max(m / cut["tokens"], 1.0) * depth / cut["depth"]
    return units / (gpu.sms * cut["workers"] * cut["share"])


@pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: gpu.name)
def test_kernels_keep_every_card_busy(plans: cuda.CudaLibrary, gpu: Gpu) -> None:
    card, found = (gpu.architecture, gpu.sms, gpu.block_shared), []
    for shape, m in itertools.product(SHAPES, ROWS):
        for is_dx, cut in enumerate(plans.cuts_for(m, *shape, 64, "bfloat16", *card)):
            busy = utilisation(gpu, shape, m, bool(is_dx), cut)
            assert WORST[shape[0] * shape[1] >= LARGE] <= busy <= 1.0, (shape, m, is_dx)
            found.append(busy)
    good = sum(busy >= GOAL for busy in found)
    assert good >= 0.85 * len(found), f"{good} of {len(found)}"


def test_utilisation_counts_the_busiest_worker() -> None:
    def busy(is_dx: bool = False, m: int = 8, **cut: int) -> float:
        return utilisation(BY_ARCHITECTURE[90], (4096, 2048), m, is_dx, CUT | cut)

    # 256 tiles of 32 groups over 132 x 8 warps: 7.76 each.
    assert busy(share=8) == pytest.approx(8192 / (1056 * 8))
    assert busy(share=16) == pytest.approx(8192 / (1056 * 16))
    # Partly filled tiles of tokens count by how full they are; a single one counts in full.
    assert busy(share=16, m=1) == busy(share=16, m=8)
    assert busy(share=16, m=12) == pytest.approx(1.5 * busy(share=16))
    # The output features of dx are the weight's columns.
    assert busy(True, features=256, depth=128, workers=1, share=3) == pytest.approx(256 / 396)


def test_both_back_ends_cut_the_same_pieces(plans: cuda.CudaLibrary) -> None:
    linear_pieces = pytest.importorskip("peft_kernels.triton_kernels.linear.linear_pieces")
    lengths = {side for shape in SHAPES for side in shape} | {0, 1, 255, 257, 1027, 151936}
    for args in itertools.product(lengths, lengths, (2, 4)):
        assert plans.piece_of(*args) == linear_pieces.piece_size(*args), args


def test_a_weight_is_one_piece_up_to_128_mb(plans: cuda.CudaLibrary) -> None:
    for n, k in SHAPES:
        piece = min(plans.piece_of(n, k, 2), n)
        assert piece * k * 2 <= 2**27
        assert piece == n or n * k * 2 > 2**27
        assert -(-n // piece) == -(-n * k * 2 // 2**27) or n % 256 or 2**27 // (k * 2) % 256, (n, k)
