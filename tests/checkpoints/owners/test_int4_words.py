"""How words of 32 bits hold codes of 4 bits, against loops that follow the definitions."""

from __future__ import annotations

import packed_models
import pytest
import torch
from packed_models import AWQ_ORDER, NATURAL, words
from torch import Tensor

from peft_kernels.nf4.owners import OWNERS, int4_words
from peft_kernels.nf4.owners.int4_words import Words

CASES = {
    "gptq codes": Words(1, transposed=True),
    "gptq zeros": Words(0, transposed=True),
    "awq": Words(0, transposed=True, order=AWQ_ORDER),
    "compressed-tensors codes": Words(1),
    "compressed-tensors zeros": Words(0),
    "another": Words(1, order=(7, 6, 5, 4, 3, 2, 1, 0)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Words:
    return CASES[request.param]


def codes_of(out: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 16, (out, columns), dtype=torch.uint8, generator=generator)


def in_file(codes: Tensor, case: Words) -> Tensor:
    packed = words(codes.T, case.order).T if case.axis == 0 else words(codes, case.order)
    return (packed.T if case.transposed else packed).contiguous()


def test_codes(case: Words) -> None:
    codes = codes_of(24, 40)
    found = in_file(codes, case)
    assert case.shape(found.shape) == (24, 40)
    assert torch.equal(case.codes(found), codes)
    assert torch.equal(case.of_codes(codes), found)


@pytest.mark.parametrize("part", [1, 400, 1 << 24])
def test_our_order(case: Words, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of any size."""
    monkeypatch.setattr(int4_words, "_PART", part)
    codes = codes_of(24, 40)
    packed = case.packed(in_file(codes, case))
    assert packed.is_contiguous() and torch.equal(packed, codes[:, ::2] << 4 | codes[:, 1::2])
    back = case.of_packed(packed)
    assert back.is_contiguous() and torch.equal(back, in_file(codes, case))


def test_words_of_the_owners() -> None:
    """Codes 0 to 7, as AutoGPTQ, AutoAWQ and compressed-tensors pack them."""
    codes = torch.arange(8, dtype=torch.uint8)
    assert CASES["gptq codes"].of_codes(codes[None]).tolist() == [[0x76543210]]
    assert CASES["gptq zeros"].of_codes(codes[:, None]).tolist() == [[0x76543210]]
    assert CASES["awq"].of_codes(codes[:, None]).tolist() == [[0x75316420]]
    assert CASES["compressed-tensors codes"].of_codes(codes[None]).tolist() == [[0x76543210]]
    assert CASES["compressed-tensors zeros"].of_codes(codes[:, None]).tolist() == [[0x76543210]]
    assert words(torch.full((1, 8), 15), NATURAL).tolist() == [[-1]], "signed"


@pytest.mark.parametrize("version", [1, 2])
def test_zero_points_of_gptq(version: int) -> None:
    """The first version subtracts from the word: with a zero point of 0, a borrow reaches the next one."""
    file, _ = packed_models.gptq(8, 32, version=version)
    points = [0, 5, 8, 0, 0, 15, 1, 0]
    word = sum(point << 4 * place for place, point in enumerate(points))
    word = (word - (0x11111111 if version == 1 else 0)) % (1 << 32)
    file["qzeros"] = torch.tensor([[word - (1 << 32 if word >> 31 else 0)]], dtype=torch.int32)
    owner = OWNERS["gptq" if version == 1 else "gptq-v2"]
    state, aside = owner.read(file, "a.weight")
    assert state.offset is not None and state.offset.tolist() == points
    assert torch.equal(owner.write(state, aside, "a.weight")["a.qzeros"], file["qzeros"])


@pytest.mark.parametrize("out", [1, 12, 16])
def test_zero_points_that_leave_a_word_unfilled(out: int) -> None:
    owner = OWNERS["compressed-tensors-int4"]
    file, expected = packed_models.packed_int4(out, 64, symmetric=False)
    assert file["weight_zero_point"].shape == (-(-out // 8), 2)
    state, aside = owner.read(file, "a.weight")
    back = owner.write(state, aside, "a.weight")
    assert state.offset is not None and state.shape == expected.shape
    assert {name.removeprefix("a.") for name in back} == set(file)
    assert all(torch.equal(back[f"a.{name}"], tensor) for name, tensor in file.items())


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors-int4"])
def test_zero_points_of_8_are_saved_again(kind: str) -> None:
    """GPTQ and AWQ always have them; in compressed-tensors they say that a weight has some of its own."""
    pack = {"gptq": packed_models.gptq, "awq": packed_models.awq}.get(kind)
    file, _ = pack(16, 64) if pack else packed_models.packed_int4(16, 64, symmetric=False)
    name = "qzeros" if pack else "weight_zero_point"
    file[name].fill_(0x77777777 if kind == "gptq" else -0x77777778)
    state, aside = OWNERS[kind].read(file, "a.weight")
    assert (state.offset is None) == bool(pack) == (not state.double_quant)
    assert torch.equal(OWNERS[kind].write(state, aside, "a.weight")[f"a.{name}"], file[name])


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors-int4"])
def test_negative_scales(kind: str) -> None:
    """AutoRound makes them."""
    made = {"gptq": packed_models.gptq, "awq": packed_models.awq}.get(kind, packed_models.packed_int4)
    file, _ = made(16, 64)
    name = "scales" if "scales" in file else "weight_scale"
    file[name].view(-1)[::3].neg_()
    state, aside = OWNERS[kind].read(file, "a.weight")
    assert state.absmax is not None and bool((state.absmax < 0).any())
    assert torch.equal(OWNERS[kind].write(state, aside, "a.weight")[f"a.{name}"], file[name])


@pytest.mark.parametrize("length, block", [(96, 32), (64, 64), (8192, 4096), (4096, 4096), (160, 32)])
def test_groups_in_blocks(length: int, block: int) -> None:
    """The longest blocks that a group consists of."""
    owner = OWNERS["awq"]
    file, _ = packed_models.awq(8, 2 * length, length)
    state, aside = owner.read(file, "a.weight")
    assert state.blocksize == block and ("scales" in aside) == (length > block)
    back = owner.write(state, aside, "a.weight")
    assert all(torch.equal(back[f"a.{name}"], tensor) for name, tensor in file.items())
    assert state.absmax is not None
    state.absmax = state.absmax.clone()
    state.absmax[1] = 9
    if length > block:
        with pytest.raises(
            ValueError, match=r"^a\.scales: expected one value for each group of the file, got"
        ):
            owner.write(state, aside, "a.weight")
    else:
        assert (owner.write(state, aside, "a.weight")["a.scales"] == 9).sum() == 1
