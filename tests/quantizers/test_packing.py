"""Packed codes: what goes in comes out, in the bytes promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halftone.quantizers.packing import pack, packed_size, unpack


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.integers(2, 16),
    st.lists(st.integers(0, 9), min_size=0, max_size=4),
    st.integers(0, 2**31),
    st.sampled_from([torch.int32, torch.int64, torch.uint8]),
)
def test_round_trip(bits, shape, seed, dtype):
    if bits > 8 and dtype == torch.uint8:
        dtype = torch.int32
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(codes.numel(), bits),)
    back = unpack(packed, bits, shape)
    assert back.shape == codes.shape
    assert back.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(back.long(), codes.long())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 2**31))
def test_the_bytes_are_one_number_little_end_first(bits, numel, seed):
    codes = torch.randint(0, 2**bits, (numel,), generator=torch.Generator().manual_seed(seed))
    number = sum(code << i * bits for i, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(packed_size(numel, bits), "little")


def test_known_bytes():
    assert pack(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([3, 0, 1, 2]), 2).tolist() == [0b10010011]
    assert pack(torch.tensor([1, 2, 3]), 3).tolist() == [0b11010001, 0]
    assert pack(torch.tensor([0x1234 >> 4]), 12).tolist() == [0x23, 0x01]


def test_a_weight_costs_its_bits():
    assert [packed_size(1000, bits) for bits in range(2, 17)] == [250, 375, 500, 625, 750, 875, 1000] + [
        2000
    ] * 8
    assert [packed_size(n, 3) for n in range(9)] == [0, 1, 1, 2, 2, 2, 3, 3, 3]


def test_codes_laid_out_otherwise_pack_in_row_major_order():
    codes = torch.arange(12).reshape(3, 4)
    assert torch.equal(unpack(pack(codes.T, 4), 4, (4, 3)).long(), codes.T)


@pytest.mark.parametrize("bits", [4, 8, 10])
@pytest.mark.parametrize("wrong", [-1, None])
def test_codes_that_do_not_fit_are_refused(bits, wrong):
    with pytest.raises(ValueError, match=f"do not fit {bits} bits"):
        pack(torch.tensor([0, 2**bits if wrong is None else wrong]), bits)


def test_what_is_not_packed_codes_is_refused():
    with pytest.raises(ValueError, match="expected integers"):
        pack(torch.tensor([1.0]), 4)
    with pytest.raises(ValueError, match=r"expected uint8 \(2,\) for 3 codes"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, (3,))
    with pytest.raises(ValueError, match="expected uint8"):
        unpack(torch.zeros(2, dtype=torch.int32), 4, (3,))
    with pytest.raises(ValueError, match="unused bits"):
        unpack(torch.tensor([0x21, 0xF3], dtype=torch.uint8), 4, (3,))
    for bits in (1, 17):
        with pytest.raises(ValueError, match="bits"):
            packed_size(8, bits)
