"""Codes as bytes: a weight costs its bits.

Up to 8 bits, codes form one contiguous bitstream, little end first: code i occupies bits i*b .. i*b+b-1, and
bit k lies in byte k // 8 at position k % 8. So 4-bit codes lie two to a byte, the first in the low half.
Widths of 9..16 take two bytes each, low byte first. Unused bits of the last byte are zero. Signed codes are
shifted to >= 0 by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

import torch
from torch import Tensor

from halftone.quantizers.affine import check_bits


def packed_size(numel: int, bits: int) -> int:
    """Bytes that `numel` codes of `bits` bits take. Raises ValueError for a width outside 2..16."""
    return -(-numel * _stored_bits(bits) // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes of any shape -> uint8 (packed_size,), in row-major order.

    Raises ValueError for a width outside 2..16, codes that are not integers, or a code outside 0..2^bits-1.
    """
    size = packed_size(codes.numel(), bits)
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes: expected integers, got {codes.dtype}")
    if codes.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=codes.device)
    lowest, highest = (int(bound) for bound in torch.aminmax(codes))
    if lowest < 0 or highest >= 2**bits:
        raise ValueError(f"codes: {lowest}..{highest} do not fit {bits} bits (0..{2**bits - 1})")
    n_codes, n_bytes, dtype = _word(bits)
    flat = codes.reshape(-1).to(dtype)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % n_codes)).reshape(-1, n_codes)
    word = flat[:, 0].clone()
    for i in range(1, n_codes):
        word |= flat[:, i] << i * _stored_bits(bits)
    packed = torch.stack([(word >> 8 * i & 0xFF).to(torch.uint8) for i in range(n_bytes)], dim=1)
    return packed.reshape(-1)[:size].clone()


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes that `pack` stored, in `shape`: uint8 up to 8 bits, int32 above.

    Raises ValueError for a width outside 2..16, another dtype or length than `pack` gives for that shape, or
    unused bits that are not zero.
    """
    numel = prod(shape)
    size = packed_size(numel, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise ValueError(
            f"packed codes: {packed.dtype} {tuple(packed.shape)}, "
            f"expected uint8 ({size},) for {numel} codes of {bits} bits"
        )
    n_codes, n_bytes, dtype = _word(bits)
    stored = _stored_bits(bits)
    if numel * stored % 8 and int(packed[-1]) >> numel * stored % 8:
        raise ValueError("packed codes: unused bits of the last byte are not zero")
    flat = torch.nn.functional.pad(packed, (0, -size % n_bytes)).reshape(-1, n_bytes)
    word = flat[:, 0].to(dtype)
    for i in range(1, n_bytes):
        word |= flat[:, i].to(dtype) << 8 * i
    result = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.stack([(word >> i * stored & 2**stored - 1).to(result) for i in range(n_codes)], dim=1)
    return codes.reshape(-1)[:numel].reshape(tuple(shape))


def _stored_bits(bits: int) -> int:
    check_bits(bits)
    return bits if bits <= 8 else 16


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """The shortest run of codes that ends on a byte: its codes, its bytes, an integer type that holds it."""
    stored = _stored_bits(bits)
    n_codes, n_bytes = 8 // gcd(stored, 8), stored // gcd(stored, 8)
    return n_codes, n_bytes, torch.uint8 if n_bytes == 1 else torch.int32 if n_bytes <= 3 else torch.int64
