"""Codes to bytes and back.

A row of codes is a run of bits, the earlier code in the lower bits of the earlier byte. So two 4-bit codes fill a byte
(as compressed-tensors, ModelOpt and gpt-oss checkpoints have them), four 6-bit codes fill three bytes (as
compressed-tensors has them), and 8-bit codes are bytes already. Every other width follows from the same sentence, here
and in kernels/native.cpp.
"""

import math

import torch
from torch import Tensor

from qsurgeon.errors import ShapeError

MOST_BITS = 8


def group(bits: int) -> tuple[int, int]:
    """Return how many codes of ``bits`` bits fill how many bytes. Raises: ShapeError for a width without a layout."""
    if not 1 <= bits <= MOST_BITS:
        raise ShapeError(f"no byte layout for codes of {bits} bits; expected 1 to {MOST_BITS}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def packed_length(length: int, bits: int) -> int:
    """Return how many bytes ``length`` codes take. Raises: ShapeError as ``group``."""
    group(bits)
    return -(-length * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return ``codes`` (..., k) of ``bits`` bits as bytes (..., ceil(k · bits / 8)), uint8.

    A last byte that is not full is filled with code 0. Raises: ShapeError as ``group``.
    """
    (count, size), length = group(bits), packed_length(codes.shape[-1], bits)
    if count == 1:
        return codes.contiguous()
    missing = -codes.shape[-1] % count
    padded = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    parts = padded.reshape(*padded.shape[:-1], padded.shape[-1] // count, count).unbind(-1)
    data = [_byte(parts, place, bits) for place in range(size)]
    return data[0] if size == 1 else torch.stack(data, dim=-1).flatten(-2)[..., :length]


def _byte(codes: tuple[Tensor, ...], place: int, bits: int) -> Tensor:
    """Return one byte of a group: the bits of each code that falls into it. What is shifted out of a byte is lost."""
    first, last = 8 * place // bits, min((8 * place + 7) // bits, len(codes) - 1)
    byte = _shifted(codes[first], first * bits - 8 * place)
    for code in range(first + 1, last + 1):
        byte = byte | _shifted(codes[code], code * bits - 8 * place)
    return byte


def _shifted(x: Tensor, up: int) -> Tensor:
    return x << up if up > 0 else x >> -up if up else x


def unpack(data: Tensor, bits: int, length: int) -> Tensor:
    """Return the first ``length`` codes (..., length), uint8, of the bytes ``data``.

    Raises: ShapeError as ``group``, and for bytes that do not hold ``length`` codes.
    """
    expected = packed_length(length, bits)
    if data.shape[-1] != expected:
        raise ShapeError(f"{data.shape[-1]} bytes a row cannot be {length} codes of {bits} bits; expected {expected}")
    count, size = group(bits)
    if count == 1:
        return data
    mask = (1 << bits) - 1
    if size == 1:
        # Not torch.stack: torch.compile would keep what is stacked for a backward pass, a byte a code.
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        return (data[..., None] >> shifts).bitwise_and_(mask).flatten(-2)[..., :length]
    missing = -data.shape[-1] % size
    padded = torch.nn.functional.pad(data, (0, missing)) if missing else data
    parts = padded.reshape(*padded.shape[:-1], padded.shape[-1] // size, size).unbind(-1)
    codes = [_code(parts, place, bits) & mask for place in range(count)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :length]


def _code(data: tuple[Tensor, ...], place: int, bits: int) -> Tensor:
    """Return one code of a group, with bits of others above it."""
    byte, shift = divmod(place * bits, 8)
    low = _shifted(data[byte], -shift)
    return low if shift + bits <= 8 else low | data[byte + 1] << 8 - shift
