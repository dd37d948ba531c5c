"""Codes to bytes and back.

Along the last dimension, the earlier code in the lower bits: two 4-bit codes to a byte (as compressed-tensors,
ModelOpt and gpt-oss checkpoints have them), four 6-bit codes to three bytes (as compressed-tensors has them). 8-bit
codes are bytes already.
"""

import torch
from torch import Tensor

from qsurgeon.errors import ShapeError

_GROUPS = {4: (2, 1), 6: (4, 3), 8: (1, 1)}  # bits of a code: how many codes fill how many bytes


def packed_length(length: int, bits: int) -> int:
    """Return how many bytes ``length`` codes take. Raises: ShapeError for a width that has no layout here."""
    if bits not in _GROUPS:
        raise ShapeError(f"no byte layout for codes of {bits} bits; known: {', '.join(map(str, _GROUPS))}")
    return -(-length * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return ``codes`` (..., k) of ``bits`` bits as bytes (..., ceil(k · bits / 8)), uint8.

    A last byte that is not full is filled with code 0. Raises: ShapeError for a width that has no layout here.
    """
    length = packed_length(codes.shape[-1], bits)
    count, size = _GROUPS[bits]
    if count == 1:
        return codes.contiguous()
    missing = -codes.shape[-1] % count
    padded = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    groups = padded.reshape(*padded.shape[:-1], padded.shape[-1] // count, count)
    if size == 1:
        return groups[..., 0] | (groups[..., 1] << 4)
    first, second, third, fourth = groups.unbind(-1)
    data = (first | (second << 6), (second >> 2) | (third << 4), (third >> 4) | (fourth << 2))
    return torch.stack(data, dim=-1).flatten(-2)[..., :length]


def unpack(data: Tensor, bits: int, length: int) -> Tensor:
    """Return the first ``length`` codes (..., length), uint8, of the bytes ``data``.

    Raises: ShapeError for a width that has no layout here, and for bytes that do not hold ``length`` codes.
    """
    expected = packed_length(length, bits)
    if data.shape[-1] != expected:
        raise ShapeError(f"{data.shape[-1]} bytes a row cannot be {length} codes of {bits} bits; expected {expected}")
    count, size = _GROUPS[bits]
    if count == 1:
        return data
    if size == 1:
        # Not torch.stack: torch.compile would keep what is stacked for a backward pass, a byte a code.
        shifts = torch.arange(0, 8, 4, dtype=torch.uint8, device=data.device)
        return (data[..., None] >> shifts).bitwise_and_(0xF).flatten(-2)[..., :length]
    missing = -data.shape[-1] % size
    padded = torch.nn.functional.pad(data, (0, missing)) if missing else data
    low, middle, high = padded.reshape(*padded.shape[:-1], padded.shape[-1] // size, size).unbind(-1)
    codes = (low & 63, (low >> 6 | middle << 2) & 63, (middle >> 4 | high << 4) & 63, high >> 2)
    return torch.stack(codes, dim=-1).flatten(-2)[..., :length]
